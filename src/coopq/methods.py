"""Every way from a budget to a plan, by name, on an open workbench."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from coopq.allocate import allocate, near_optimum
from coopq.baselines import BASELINES, PAPER_BASELINES, Gains, fisher, get_baseline
from coopq.beginnings import Beginnings
from coopq.engine import prefix_tree_size
from coopq.errors import EstimationError, InfeasibleBudget, hint
from coopq.estimators import (
    SPQE,
    ActiveSearch,
    CrossLayer,
    Enumeration,
    Evolution,
    Greedy,
    Known,
    Measured,
    OneShot,
    Regression,
    Search,
    Setting,
    run_estimator,
    run_search,
)
from coopq.estimators.exact import check_enumerable
from coopq.evidence import Evidence
from coopq.files import read_json, write_json
from coopq.game import Meter, Meters
from coopq.plan import WALK_METHODS, Plan, plan_budget, plan_gains, plan_search, setting_of
from coopq.probe import Probe
from coopq.program import local_optima
from coopq.run import Estimation
from coopq.storage import Budget
from coopq.surrogate import best_surrogate
from coopq.types import REMOVED, UNTOUCHED, Assignments, Game, Player
from coopq.workbench import Workbench

_log = logging.getLogger(__name__)
_POINTS_PER_PLAYER = 8
"""Coalitions that the regression measures for each player."""
_FINALISTS = 8
"""Assignments of each budget that a search with screening measures on the whole calibration set."""

SEARCHES: dict[str, Callable[[Setting, Known, Assignments], Search]] = {
    "active": ActiveSearch,
    "greedy-down": lambda setting, *_: Greedy.paced(setting, "down"),
    "greedy-up": lambda setting, *_: Greedy.paced(setting, "up"),
    "regression": lambda setting, known, _: Regression(setting, known, n_points=_POINTS_PER_PLAYER * setting.n_steps),
    "cross-layer": lambda setting, *_: CrossLayer(setting),
    "one-shot-high": lambda setting, *_: OneShot(setting, "high"),
    "one-shot-low": lambda setting, *_: OneShot(setting, "low"),
    "evopress": lambda setting, *_: Evolution(setting),
    "exact": lambda setting, *_: Enumeration(setting),
}
LEARNERS = ("active", "regression")
"""Searches that learn from what was measured before them; the others only find it measured."""
BELIEVERS = ("regression", "cross-layer", "one-shot-high", "one-shot-low")
"""Searches that choose what their surrogate thinks best, measured or not."""
SHRUNK = ("coopq", "pruning")
"""Methods that solve the paper's program, with its alpha."""
_SCORES = ("fisher", *BASELINES)
_STARTERS = ("fisher", *PAPER_BASELINES)
"""Scores whose choices the active search measures first: those that take a few forwards of the model."""
OF_TWO_WIDTHS = (*WALK_METHODS, "cross-layer")
"""Methods whose sources know a lower and a higher width; all others choose among any number."""
UNPROVEN = (*SEARCHES, "interactions", "fisher")
"""Methods whose programs are not solved to proof: their optimum is not the point, or nobody would wait for it."""
METHODS = (*SEARCHES, *WALK_METHODS, *_SCORES)


def check_method(method: str) -> None:
    """Check a method's name before anything expensive.

    Raises:
        EstimationError: If it is unknown.
    """
    if method not in METHODS:
        raise EstimationError(f"method {method!r} is unknown; {hint(method, METHODS)}")


def check_players(methods: Sequence[str], players: Sequence[Player], n_widths: int) -> None:
    """Check that methods can do with players and widths, before any weights are quantized.

    Raises:
        EstimationError: If there are too many to enumerate, blocks cannot be removed whole, or a method knows only two
            widths.
    """
    of_two = [method for method in methods if method in OF_TWO_WIDTHS]
    if of_two and n_widths > 2:
        raise EstimationError(
            f"method {of_two[0]!r} is of two widths, and {n_widths} are given; take two, or another method: 'active'"
        )
    scores = [method for method in methods if method in _SCORES]
    if scores and any(player.is_end for player in players):
        raise EstimationError(
            f"method {scores[0]!r} scores layers in blocks, not embeddings; take a search, or leave --embeddings out"
        )
    if "exact" in methods:
        check_enumerable(len(players), n_widths)
    if "pruning" in methods and len({player.block for player in players}) < len(players):
        raise EstimationError("pruning removes whole blocks; leave out --granularity, or take another method")


def estimate_on(bench: Workbench) -> Estimation:
    """`coopq.estimate` on an open workbench."""
    estimation = _estimation(bench, _spqe(bench))
    bench.folder.save(estimation)
    return estimation


def _pruning_on(bench: Workbench) -> Estimation:
    """The same from walks that remove players instead of lowering them: the paper's ablation."""
    return _estimation(bench, _spqe(bench, low=REMOVED, high=UNTOUCHED))


def _spqe(bench: Workbench, low: int | None = None, high: int | None = None) -> SPQE:
    config = bench.config
    return SPQE(
        len(bench.players),
        low=config.low if low is None else low,
        high=config.high if high is None else high,
        permutations=config.permutations,
        seed=config.seed,
    )


def _estimation(bench: Workbench, estimator: SPQE) -> Estimation:
    config, n_players, blocks = bench.config, len(bench.players), [player.block for player in bench.players]
    with bench.calibration_game("measuring the walks") as game:
        result = run_estimator(estimator, game).estimate()
    return Estimation(
        config=config,
        players=bench.players,
        storage=bench.storage,
        estimate=result,
        fingerprint=bench.fingerprint,
        layer_forwards=prefix_tree_size(estimator.points, blocks),
        layer_forwards_unshared=config.permutations * n_players * len(set(blocks)),
    )


def terms_on(bench: Workbench, method: str) -> tuple[Gains, Gains | None, int]:
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
    if path.is_file():
        record = read_json(path)
        if record.get("fingerprint") == json.loads(json.dumps(fingerprint)):
            pairs = record.get("pairs")
            return np.array(record["gains"]), None if pairs is None else np.array(pairs), record["layer_forwards"]
    engine, descending = bench.engine(bench.calibration), config.widths[::-1]
    # A score of two widths is that of a step between neighbours.
    probes = [Probe(engine, bench.bank, low, high) for high, low in pairwise(descending)]
    bench.progress(f"scoring by {method}", 0, 1)
    if method == "fisher":
        gains, pairs = fisher.terms(probes)
    else:
        gains, pairs = np.stack([get_baseline(method)(probe) for probe in probes], axis=1).ravel(), None
    layer_forwards = sum(probe.layer_forwards for probe in probes)
    bench.progress(f"scoring by {method}", 1, 1)
    if not (np.isfinite(gains).all() and np.isfinite(0.0 if pairs is None else pairs).all()):
        raise EstimationError(f"the scores of {method} are not all numbers; choose another method, or float32")
    path.parent.mkdir(exist_ok=True)
    record = {"fingerprint": fingerprint, "gains": gains.tolist(), "layer_forwards": layer_forwards}
    if pairs is not None:
        record["pairs"] = pairs.tolist()
    write_json(path, record)
    return gains, pairs, layer_forwards


def plans_on(
    bench: Workbench,
    method: str,
    budgets: Sequence[Budget],
    *,
    alpha: float = 0.5,
    time_limit: float | None = None,
) -> list[Plan]:
    """The plans of budgets by a method; a search takes all budgets at once and shares what it measures."""
    check_method(method)
    if method in SEARCHES:
        return _search_on(bench, method, budgets, time_limit)
    if method in _SCORES:
        return _scored_on(bench, method, budgets, time_limit)
    return _walked_on(bench, method, budgets, alpha, time_limit)


def measure(bench: Workbench, plan: Plan) -> Plan:
    """The plan with its loss on the calibration set truly measured, and the evidence for it; kept in the run folder."""
    points = np.array([plan.assignment, plan.runner_up or plan.assignment], dtype=np.int8)
    with bench.calibration_game("measuring the plan") as game:
        chosen, runner_up = game.per_sequence(points)
    evidence = Evidence.of(chosen, None if plan.runner_up is None else runner_up)
    plan = dataclasses.replace(plan, measured_loss=float(chosen.mean()), evidence=evidence)
    bench.folder.plans.mkdir(exist_ok=True)
    plan.save(bench.folder.plans / plan.file_name)
    return plan


def _scored_on(bench: Workbench, method: str, budgets: Sequence[Budget], time_limit: float | None) -> list[Plan]:
    """Plans by what gradients, activations or weights say, without a loss of any assignment."""
    gains, pairs, spent = terms_on(bench, method)
    return [
        plan_gains(bench, method, gains, budget, pairs=pairs, layer_forwards=spent, time_limit=time_limit)
        for budget in _solving(bench, method, budgets)
    ]


def _walked_on(
    bench: Workbench, method: str, budgets: Sequence[Budget], alpha: float, time_limit: float | None
) -> list[Plan]:
    """Plans by permutation walks: the paper's way, and other readings of the same walks."""
    estimation = _pruning_on(bench) if method == "pruning" else estimate_on(bench)
    setting = setting_of(bench, budgets)
    walked = Measured(setting)
    if method != "pruning":
        points = _spqe(bench).points
        with bench.calibration_game("measuring the walks") as game:
            walked.add(points, game(points))
    spent: dict[str, Any] = {
        "layer_forwards": estimation.layer_forwards,
        "layer_forwards_unshared": estimation.layer_forwards_unshared,
        "time_limit": time_limit,
    }
    plans = []
    for budget, capacity in zip(_solving(bench, method, budgets), setting.capacities, strict=True):
        best = [tuple(row.tolist()) for row in setting.assignments(walked.best(capacity, 2))]
        if method == "shapley":
            plan = plan_gains(bench, method, estimation.estimate.shapley, budget, **spent)
        elif method == "interactions":
            program = best_surrogate(walked.surrogates(capacity)).program(setting.program(capacity))
            optima = local_optima(program, walked.best(capacity, 3), 100, np.random.default_rng([setting.seed, 0]))
            chosen = setting.assignments(optima[0])
            plan = plan_search(bench, method, chosen, budget, measured=walked, runner_up=None, **spent)
        else:
            plan = plan_budget(estimation, budget, method=method, alpha=alpha, time_limit=time_limit)
        others = [row for row in best if row != tuple(plan.assignment)]
        plans.append(dataclasses.replace(plan, runner_up=others[0] if others else None))
    return plans


def _search_on(bench: Workbench, method: str, budgets: Sequence[Budget], time_limit: float | None) -> list[Plan]:
    """Plans by a search on the true loss: on the screening sequences, and decided on all of them."""
    setting, blocks = setting_of(bench, budgets), [player.block for player in bench.players]
    nowhere = np.zeros((0, setting.n_steps), dtype=bool)
    starts, scoring = _starts(bench, budgets) if method == "active" else (setting.assignments(nowhere), 0)
    with bench.screening_game(f"searching, {method}") as game:
        name = _search_name(method, setting, game.journal.path)
        knows = Beginnings(bench.folder.path).known(name, game.journal) if method in LEARNERS else 0
        known = game.journal.first(knows)
        search, meters = _run(bench, SEARCHES[method](setting, known, starts), game, known[0])
    layer_forwards = scoring + round(meters.layer_forwards * bench.screening_share)
    unshared = scoring + round(meters.evaluations * bench.screening_share) * len(set(blocks))
    ranked = {c: _ranked(setting, search, c) for c in setting.capacities}
    if bench.screening_share < 1:
        n_finalists = 1 if method in BELIEVERS else _FINALISTS
        finalists = np.unique(np.concatenate([of[:n_finalists] for of in ranked.values()]), axis=0)
        with bench.calibration_game("deciding") as game:
            deciding = Measured(setting)
            deciding.add(finalists, game(finalists))
        ranked = {c: setting.assignments(deciding.best(c, 2)) for c in setting.capacities}
        layer_forwards += prefix_tree_size(finalists, blocks)
        unshared += len(finalists) * len(set(blocks))
    plans = []
    for budget, capacity in zip(_solving(bench, method, budgets), setting.capacities, strict=True):
        chosen, *others = ranked[capacity]
        plan = plan_search(
            bench,
            method,
            chosen,
            budget,
            measured=search.measured,
            runner_up=others[0] if others else None,
            layer_forwards=layer_forwards,
            layer_forwards_unshared=unshared,
            time_limit=time_limit,
        )
        # What was fitted to the screening sequences predicts no loss of all of them.
        plans.append(plan if bench.screening_share == 1 else dataclasses.replace(plan, predicted_loss=None))
    return plans


def _run(bench: Workbench, search: Search, game: Game, known: Assignments) -> tuple[Search, Meters]:
    """Run a search; the meters of what it took."""
    with ExitStack() as stack:

        def game_of(n: int) -> Game:
            part = bench.first_sequences(n, "searching, evopress")
            return game if n == bench.n_screening else stack.enter_context(part)

        meters = Meters(game_of, bench.n_screening, [player.block for player in bench.players], known)
        return run_search(search, meters), meters


def smallest_on(bench: Workbench, max_loss: float, *, time_limit: float | None = None) -> Plan:
    """The plan of the smallest size whose loss, truly measured on the calibration set, stays under a limit.

    Sizes are bisected, to a hundredth of what lies between the widths; at each an active search goes on from all that
    is measured.

    Raises:
        InfeasibleBudget: If every player at the high width loses more.
    """
    whole, blocks = setting_of(bench), [player.block for player in bench.players]
    low, high = 0, int(whole.costs.sum())
    with bench.calibration_game("searching the smallest size") as game:
        name = _search_name(f"at most {max_loss}", whole, game.journal.path)
        known = game.journal.first(Beginnings(bench.folder.path).known(name, game.journal))
        meter, measured = Meter(game, blocks, known[0]), Measured(whole)
        measured.add(*known)
        ends = whole.assignments(np.array([[False], [True]]).repeat(whole.n_steps, axis=1))
        losses = meter(ends)
        measured.add(ends, losses)
        if losses[0] > max_loss:
            raise InfeasibleBudget(
                f"a loss of {max_loss} cannot be kept: with every player at {whole.widths[-1]} bits it is "
                f"{losses[0]:.4f}; allow more, or take wider widths"
            )
        if losses[1] <= max_loss:
            high = 0
        while high - low > max(int(whole.costs.min()), int(whole.costs.sum()) // 100):
            middle = (low + high) // 2
            setting = dataclasses.replace(whole, capacities=(middle,))
            search = run_estimator(ActiveSearch(setting, measured.known()), meter)
            measured = search.measured
            if measured.lowest(middle) <= max_loss:
                high = int(measured.raised_bytes[measured.losses <= max_loss].min())
            else:
                low = middle
    chosen, *others = whole.assignments(measured.best(high, 2))
    n_bytes = bench.storage.bytes_of(chosen)
    plan = plan_search(
        bench,
        "active",
        chosen,
        Budget.parse(f"{n_bytes}B"),
        measured=measured,
        runner_up=others[0] if others else None,
        layer_forwards=meter.layer_forwards,
        layer_forwards_unshared=meter.evaluations * len(set(blocks)),
        time_limit=time_limit,
    )
    return dataclasses.replace(plan, max_loss=max_loss)


def _starts(bench: Workbench, budgets: Sequence[Budget]) -> tuple[Assignments, int]:
    """What the scores choose for the budgets (fisher's by descents), and the layer forwards that they take."""
    setting, layer_forwards = setting_of(bench, budgets), 0
    chosen = np.zeros((0, setting.n_steps), dtype=bool)
    if any(player.is_end for player in bench.players):  # which scores know nothing of
        return setting.assignments(chosen), 0
    for method in _STARTERS:
        try:
            gains, pairs, spent = terms_on(bench, method)
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


def _ranked(setting: Setting, search: Search, capacity: int) -> Assignments:
    """What a search chooses for a budget, then the best of what else it measured, shape (n, n_players)."""
    chosen = search.choose(capacity)
    best = setting.assignments(search.measured.best(capacity, _FINALISTS))
    return np.concatenate([chosen[None], best[(best != chosen).any(axis=1)]])


def _solving(bench: Workbench, method: str, budgets: Sequence[Budget]) -> Iterator[Budget]:
    """The budgets, with progress."""
    for done, budget in enumerate(budgets):
        bench.progress(f"solving the program, {method}", done, len(budgets))
        yield budget
    bench.progress(f"solving the program, {method}", len(budgets), len(budgets))


def begin_with_nothing(bench: Workbench, methods: Sequence[str], budgets: Sequence[Budget]) -> None:
    """Let searches that have not begun know nothing of what others have measured, as where methods are compared."""
    setting, path = setting_of(bench, budgets), bench.folder.journal
    for method in (method for method in methods if method in LEARNERS):
        Beginnings(bench.folder.path).from_nothing(_search_name(method, setting, path))


def _search_name(method: str, setting: Setting, journal: Path) -> str:
    widths = ",".join(map(str, setting.widths))
    return f"{method} {widths} {setting.capacities} seed {setting.seed} in {journal.name}"
