"""Smaller embeddings: codes and a decoder in place of the table, for the input and for a head tied to it."""

from softlms.methods.embeddings.method import METHODS

__all__ = ["METHODS"]
