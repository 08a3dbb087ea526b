"""Searches: which assignments to measure, and what the measured losses say about all others."""

from coopq.search.measured import Known, Measured
from coopq.search.protocol import Estimator, Search, run, run_search
from coopq.search.shapley import SPQE, ShapleyEstimate
from coopq.search.solver.quadratic_program import Steps
from coopq.search.space import SearchSpace
from coopq.search.strategies.active import ActiveSearch
from coopq.search.strategies.cross_layer import CrossLayer
from coopq.search.strategies.evolution import Evolution
from coopq.search.strategies.exhaustive import Enumeration
from coopq.search.strategies.greedy import Greedy
from coopq.search.strategies.one_shot import OneShot
from coopq.search.strategies.regression import Regression

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
    "SearchSpace",
    "ShapleyEstimate",
    "Steps",
    "run",
    "run_search",
]
