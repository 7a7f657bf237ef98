"""Dynamic-k experts: a token runs only the part of a feed-forward that matters to it."""

from softlms.methods.dynamic_moe.method import METHODS
from softlms.methods.dynamic_moe.surgery import experts_of, put_experts, set_threshold

__all__ = ["METHODS", "experts_of", "put_experts", "set_threshold"]
