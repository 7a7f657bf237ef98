"""Disks of a test's own: small ones, full ones, read-only ones."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def mounted(place, size):
    """A new folder on a disk of its own, of a size as mount reads it; the test is skipped where none can be mounted."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def make_read_only(place):
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
