"""Estimators: from losses of assignments to what each player contributes."""

from coopq.estimators.base import Estimator, ShapleyEstimate, run_estimator
from coopq.estimators.spqe import SPQE

__all__ = ["SPQE", "Estimator", "ShapleyEstimate", "run_estimator"]
