"""Early exits: rows leave a model as soon as a head behind one of its blocks is sure (Zero Time Waste)."""

from softlms.methods.early_exit.method import METHODS
from softlms.methods.early_exit.module import Prediction, predict, put_exits

__all__ = ["METHODS", "Prediction", "predict", "put_exits"]
