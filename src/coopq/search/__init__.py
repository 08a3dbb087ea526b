"""Estimators: which points of the game to measure, and what they say."""

from coopq.search.strategies.active import ActiveSearch
from coopq.search.space import Estimator, Known, Measured, Search, Setting, ShapleyEstimate, run_estimator
from coopq.search.strategies.cross_layer import CrossLayer
from coopq.search.strategies.evolution import Evolution, run_search
from coopq.search.strategies.exhaustive import Enumeration
from coopq.search.strategies.greedy import Greedy
from coopq.search.strategies.one_shot import OneShot
from coopq.search.strategies.regression import Regression
from coopq.search.shapley import SPQE

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
