"""Fewer blocks: optimal network depth, and the same depth by other rules."""

from softlms.methods.depth.cut import keep_blocks
from softlms.methods.depth.method import METHODS

__all__ = ["METHODS", "keep_blocks"]
