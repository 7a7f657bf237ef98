"""Feed-forwards most of whose activations are zero."""

from softlms.methods.sparse_activations.method import METHODS, SparseTrainer

__all__ = ["METHODS", "SparseTrainer"]
