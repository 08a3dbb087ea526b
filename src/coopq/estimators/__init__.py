"""Estimators: which points of the game to measure, and what they say."""

from coopq.estimators.active import ActiveSearch
from coopq.estimators.base import Estimator, Known, Measured, Search, Setting, ShapleyEstimate, run_estimator
from coopq.estimators.cross_layer import CrossLayer
from coopq.estimators.evolution import Evolution, run_search
from coopq.estimators.exact import Enumeration
from coopq.estimators.greedy import Greedy
from coopq.estimators.one_shot import OneShot
from coopq.estimators.regression import Regression
from coopq.estimators.spqe import SPQE

__all__ = [
    "SPQE",
    "ActiveSearch",
    "CrossLayer",
    "Enumeration",
    "Estimator",
    "Evolution",
    "Greedy",
    "Known",
    "Measured",
    "OneShot",
    "Regression",
    "Search",
    "Setting",
    "ShapleyEstimate",
    "run_estimator",
    "run_search",
]
