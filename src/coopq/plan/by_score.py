"""Plans by what gradients, activations or weights say, without a loss of any assignment."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from coopq.search.solver.exact import allocate, near_optimum
from coopq.plan.scores import BASELINES, PAPER_BASELINES, Gains, fisher, get_baseline
from coopq.core.errors import EstimationError
from coopq.core.files import read_json, write_json
from coopq.plan.plan import Plan, plan_gains, setting_of
from coopq.game.sensitivity import Probe
from coopq.core.sizes import Budget
from coopq.core.types import Assignments
from coopq.game.session import Workbench

_log = logging.getLogger(__name__)
SCORES = ("fisher", *BASELINES)
STARTERS = ("fisher", *PAPER_BASELINES)
"""Scores whose choices the active search measures first: those that take a few forwards of the model."""


def plans_by_score(bench: Workbench, method: str, budgets: Sequence[Budget], time_limit: float | None) -> list[Plan]:
    """Plans by what gradients, activations or weights say, without a loss of any assignment."""
    gains, pairs, spent = terms_on(bench, method, probes_of(bench))
    return [
        plan_gains(bench, method, gains, budget, pairs=pairs, layer_forwards=spent, time_limit=time_limit)
        for budget in bench.each(f"solving the program, {method}", budgets)
    ]


def probes_of(bench: Workbench) -> list[Probe]:
    """What scores look at: a score of two widths is that of a step between neighbours, the highest first."""
    engine = bench.engine(bench.calibration)
    return [Probe(engine, bench.bank, low, high, bench.levels) for high, low in pairwise(bench.config.widths[::-1])]


def terms_on(bench: Workbench, method: str, probes: Sequence[Probe]) -> tuple[Gains, Gains | None, int]:
    """Linear and, for "fisher", pair terms of a score, and the layer forwards that it takes; kept in the run folder."""
    path = bench.folder.path / "scores" / f"{method}.json"
    config = bench.config
    if any(player.is_end for player in bench.players):
        raise EstimationError(
            f"method {method!r} scores layers in blocks, not embeddings; take a search, or leave them"
        )
    fingerprint = {**bench.fingerprint, "low": config.low, "high": config.high}
    if config.between:
        fingerprint["between"] = config.between
    if any(levels != config.widths for levels in bench.levels):  # which a run's target may change
        fingerprint["levels"] = bench.levels
    if path.is_file():
        record = read_json(path)
        if record.get("fingerprint") == json.loads(json.dumps(fingerprint)):
            pairs = record.get("pairs")
            return np.array(record["gains"]), None if pairs is None else np.array(pairs), record["layer_forwards"]
    before = sum(probe.layer_forwards for probe in probes)
    bench.progress(f"scoring by {method}", 0, 1)
    if method == "fisher":
        gains, pairs = fisher.terms(probes)
    else:
        gains, pairs = np.stack([get_baseline(method)(probe) for probe in probes], axis=1).ravel(), None
    layer_forwards = sum(probe.layer_forwards for probe in probes) - before
    bench.progress(f"scoring by {method}", 1, 1)
    gains = _of_own_steps(bench, gains)
    pairs = None if pairs is None else _of_own_steps(bench, _of_own_steps(bench, pairs).T)
    if not (np.isfinite(gains).all() and np.isfinite(0.0 if pairs is None else pairs).all()):
        raise EstimationError(f"the scores of {method} are not all numbers; choose another method, or float32")
    path.parent.mkdir(exist_ok=True)
    record = {"fingerprint": fingerprint, "gains": gains.tolist(), "layer_forwards": layer_forwards}
    if pairs is not None:
        record["pairs"] = pairs.tolist()
    write_json(path, record)
    return gains, pairs, layer_forwards


def _of_own_steps(bench: Workbench, terms: Gains) -> Gains:
    """Terms of the steps between widths that players have: sums over those between all widths, along the first axis."""
    ends = np.flatnonzero([width in levels for levels in bench.levels for width in bench.config.widths[-2::-1]])
    sums: Gains = np.add.reduceat(terms, np.append(0, ends[:-1] + 1), axis=0)
    return sums


def starts_on(bench: Workbench, budgets: Sequence[Budget]) -> tuple[Assignments, int]:
    """What the scores choose for the budgets (fisher's by descents), and the layer forwards that they take."""
    setting, layer_forwards = setting_of(bench, budgets), 0
    chosen = np.zeros((0, setting.n_steps), dtype=bool)
    if any(player.is_end for player in bench.players):  # which scores know nothing of
        return setting.assignments(chosen), 0
    probes = probes_of(bench)
    for method in STARTERS:
        try:
            gains, pairs, spent = terms_on(bench, method, probes)
        except EstimationError as error:  # only a hint: the search does without
            _log.warning("%s; the search starts without it", error)
            continue
        layer_forwards += spent
        for capacity in setting.capacities:
            program = dataclasses.replace(setting.program(capacity), linear=gains)
            if pairs is not None:
                program = dataclasses.replace(program, quadratic=pairs)
            solved = allocate(program) if pairs is None else near_optimum(program)
            chosen = np.concatenate([chosen, solved.q[None]])
    return setting.assignments(chosen), layer_forwards
