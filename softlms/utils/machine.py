"""This machine: the hardware that numbers depend on, and how work uses it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import transformers

__all__ = ["device", "fast_bf16", "hardware", "use_threads", "versions"]


def hardware(threads: int | None = None) -> str:
    """Processor, threads and accelerator; numbers of two machines are never mixed in one comparison.

    Parameters
    ----------
    threads : int, optional
        Threads in use; default: torch's current number.
    """
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{_processor()}, {threads or torch.get_num_threads()} threads{gpu}"


@cache
def _processor() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text("utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
    # processors of one name may differ in instructions, and then in numbers
    return f"{model} {torch.backends.cpu.get_cpu_capability()}{'-BF16' if fast_bf16() else ''}"


@cache
def versions() -> str:
    """Versions of the libraries that numbers depend on."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


@cache
def fast_bf16() -> bool:
    """Whether the GPU, or the processor if there is none, computes faster in bfloat16 than in float32.

    A processor without such instructions (AVX512-BF16, AMX) emulates them, many times slower than float32. The profiles
    check this; every run's recipe records what it used.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def device() -> torch.device:
    """The device on which models are scored and decomposed; a Trainer selects the same."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """Set the number of torch threads inside; restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
