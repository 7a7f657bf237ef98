"""Linears stored in few bytes: one decoder for all layers of a kind, and its baselines. No training of the model."""

from softlms.methods.shared_decoder.method import METHODS

__all__ = ["METHODS"]
