"""The stages in order over a run folder: estimate, allocate, quantize."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coopq.backends import Backend, get_backend
from coopq.bank import WeightBank, measure_storage
from coopq.baselines import Gains, get_baseline
from coopq.calibration import TokenSet, calibration_set, check_calibration
from coopq.checkpoint import is_saved_model, save_model
from coopq.engine import PrefixEngine, prefix_tree_size
from coopq.errors import BackendError, EstimationError, InfeasibleBudget, Mismatch, OutputError
from coopq.estimators import SPQE, run_estimator
from coopq.files import locked, read_json, require_new_folder, require_writable, write_json
from coopq.game import QuantizationGame
from coopq.journal import Journal
from coopq.models import LoadedModel, fingerprint_weights, load_model
from coopq.plan import Plan, check_solver, plan_budget, plan_gains
from coopq.players import check_granularity, find_players
from coopq.probe import Probe
from coopq.run import Estimation, RunConfig, RunFolder, Subject
from coopq.storage import Budget, Storage
from coopq.types import ProgressCallback, silent


@dataclass(frozen=True)
class Workbench(Subject):
    """A loaded model with everything that measures it, held open over a locked run folder."""

    folder: RunFolder
    loaded: LoadedModel
    backend: Backend
    bank: WeightBank
    calibration: TokenSet
    progress: ProgressCallback

    @contextmanager
    def game(self, tokens: TokenSet, journal: Path, stage: str) -> Iterator[QuantizationGame]:
        """The game on `tokens`, with its values in `journal`."""
        with Journal(journal, {**self.fingerprint, "tokens": tokens.fingerprint, "bos": tokens.bos}) as values:
            engine = PrefixEngine(self.loaded.model, self.bank, tokens.tokens)
            yield QuantizationGame(engine, values, len(self.players), self.progress, stage)

    @contextmanager
    def calibration_game(self, stage: str) -> Iterator[QuantizationGame]:
        """The game that searches play."""
        with self.game(self.calibration, self.folder.journal, stage) as game:
            yield game


@contextmanager
def open_workbench(
    config: RunConfig, run: Path, progress: ProgressCallback = silent, *budgets: Budget
) -> Iterator[Workbench]:
    """Check the request, load the model and lock the run folder; cheap checks come first.

    Args:
        config: What to measure.
        run: The run folder; it is made when missing.
        progress: Told of every step.
        budgets: Checked for feasibility before anything expensive.
    """
    check_config(config)
    backend = get_backend(**config.quantizer, bits=(config.low, config.high))
    require_writable(run)
    folder = RunFolder(run)
    with locked(run):
        folder.check(config)
        progress("loading the model", 0, 1)
        loaded = load_model(config.model, dtype=config.dtype, device=config.device)
        progress("loading the model", 1, 1)
        players = find_players(loaded.model, config.granularity)
        storage = measure_storage(players, backend, (config.low, config.high))
        for budget in budgets:
            storage.limit(budget, config.low, config.high)
        max_length = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        calibration = calibration_set(config.calibration, loaded.tokenizer, max_length)
        weights = {
            "weights": fingerprint_weights(loaded.model),
            "players": config.granularity,
            "backend": backend.fingerprint(),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": loaded.model.device.type,
        }
        if backend.whole_model:
            weights["hessians"] = calibration.fingerprint
        fingerprint = {**weights, "tokens": calibration.fingerprint, "bos": calibration.bos, "loss": "nll"}
        # What belongs to another model refuses before anything is written over.
        with Journal(folder.journal, fingerprint):
            pass
        bank = WeightBank(folder.bank, loaded, players, backend, weights)
        folder.start(config)
        bank.build((config.low, config.high), calibration.tokens, progress)
        yield Workbench(config, players, storage, fingerprint, folder, loaded, backend, bank, calibration, progress)


def check_config(config: RunConfig) -> None:
    """Check everything that needs no model.

    Raises:
        CoopQError: Naming what is wrong.
    """
    if not config.low < config.high:
        raise EstimationError(f"bits {config.low},{config.high} must be two different widths, the lower one first")
    if config.permutations < 2:
        raise EstimationError(f"permutations = {config.permutations}, but a covariance needs at least 2")
    if config.seed < 0 or config.calibration.seed < 0:
        raise EstimationError(f"seeds {config.seed} and {config.calibration.seed} must not be negative")
    check_granularity(config.granularity)
    check_calibration(config.calibration)


def estimate(config: RunConfig, run: Path, progress: ProgressCallback = silent) -> Estimation:
    """Play the game on the permutation walks of SPQE; an interrupted run goes on where it was.

    Args:
        config: What to measure.
        run: The run folder.
        progress: Told of every loss.
    """
    with open_workbench(config, run, progress) as bench:
        return estimate_on(bench)


def estimate_on(bench: Workbench) -> Estimation:
    """`estimate` on an open workbench."""
    config, n_players, blocks = bench.config, len(bench.players), [player.block for player in bench.players]
    estimator = SPQE(n_players, low=config.low, high=config.high, permutations=config.permutations, seed=config.seed)
    with bench.calibration_game("measuring the walks") as game:
        result = run_estimator(estimator, game).estimate()
    estimation = Estimation(
        config=config,
        players=bench.players,
        storage=bench.storage,
        estimate=result,
        fingerprint=bench.fingerprint,
        layer_forwards=prefix_tree_size(estimator.points, blocks),
        layer_forwards_unshared=config.permutations * n_players * len(set(blocks)),
    )
    bench.folder.save(estimation)
    return estimation


def gains_on(bench: Workbench, method: str) -> tuple[Gains, int]:
    """A baseline's gains, and the layer forwards that they take; kept in the run folder."""
    path = bench.folder.path / "scores" / f"{method}.json"
    fingerprint = {**bench.fingerprint, "low": bench.config.low, "high": bench.config.high}
    if path.is_file():
        record = read_json(path)
        if record.get("fingerprint") == json.loads(json.dumps(fingerprint)):
            return np.array(record["gains"]), record["layer_forwards"]
    engine = PrefixEngine(bench.loaded.model, bench.bank, bench.calibration.tokens)
    probe = Probe(engine, bench.bank, bench.config.low, bench.config.high)
    bench.progress(f"scoring by {method}", 0, 1)
    gains = get_baseline(method)(probe)
    bench.progress(f"scoring by {method}", 1, 1)
    if not np.isfinite(gains).all():
        raise EstimationError(f"the scores of {method} are not all numbers; choose another method, or float32")
    path.parent.mkdir(exist_ok=True)
    record = {"fingerprint": fingerprint, "gains": gains.tolist(), "layer_forwards": probe.layer_forwards}
    write_json(path, record)
    return gains, probe.layer_forwards


def plan_on(
    bench: Workbench, method: str, budget: Budget, *, alpha: float = 0.5, time_limit: float | None = None
) -> Plan:
    """The plan of a budget by a method: "coopq" or a baseline."""
    if method == "coopq":
        estimation = estimate_on(bench)
        bench.progress("solving the program", 0, 1)
        plan = plan_budget(estimation, budget, alpha=alpha, time_limit=time_limit)
    else:
        gains, layer_forwards = gains_on(bench, method)
        bench.progress("solving the program", 0, 1)
        plan = plan_gains(bench, method, gains, budget, layer_forwards=layer_forwards, time_limit=time_limit)
    bench.progress("solving the program", 1, 1)
    return plan


def measure(bench: Workbench, plan: Plan) -> Plan:
    """The plan with its loss on the calibration set truly measured; kept in the run folder too."""
    with bench.calibration_game("measuring the plan") as game:
        loss = float(game(np.array([plan.assignment], dtype=np.int8))[0])
    plan = dataclasses.replace(plan, measured_loss=loss)
    bench.folder.plans.mkdir(exist_ok=True)
    plan.save(bench.folder.plans / plan.file_name)
    return plan


def quantize(
    config: RunConfig,
    budget: str,
    out: Path,
    *,
    run: Path | None = None,
    method: str = "coopq",
    alpha: float = 0.5,
    time_limit: float | None = None,
    progress: ProgressCallback = silent,
) -> Plan:
    """The main job: estimate, allocate a budget, measure the plan, save the quantized model.

    Args:
        config: The model and how to measure it.
        budget: "2.5avg", "2.8bpw" or "40MiB".
        out: Folder of the quantized model; it appears whole, at the end.
        run: Folder of the work, "<out>-run" by default; an interrupted job goes on from it.
        method: "coopq", or a baseline of `coopq.baselines`.
        alpha: Shrinkage of the covariance.
        time_limit: Seconds for the solver.
        progress: Told of every step.
    Returns:
        The plan, which is also saved in `out`. A finished job is not repeated.
    """
    parsed = Budget.parse(budget)
    check_solver(alpha, time_limit)
    if method != "coopq":
        get_baseline(method)
    out = out.resolve()
    if is_saved_model(out):
        return _finished(config, method, parsed, alpha if method == "coopq" else None, time_limit, out)
    require_new_folder(out)
    with open_workbench(config, run or default_run(out), progress, parsed) as bench:
        plan = measure(bench, plan_on(bench, method, parsed, alpha=alpha, time_limit=time_limit))
        return save_model(bench.loaded, plan, bench.backend, bench.calibration.tokens, out, progress)


def apply(
    plan: Plan,
    out: Path,
    *,
    model: str | None = None,
    backend: str | None = None,
    group_size: int | None = None,
    progress: ProgressCallback = silent,
) -> Plan:
    """Quantize the model of a plan and save it.

    Args:
        plan: The plan.
        out: Folder of the quantized model.
        model: Where the model is now; None takes the plan's word.
        backend: Deploy with this backend instead of the one that was measured; the saved plan says so.
        group_size: Group size of that other backend.
        progress: Told of every step.
    Returns:
        The plan as it was saved.
    Raises:
        Mismatch: If the model is not the plan's.
    """
    out = out.resolve()
    require_new_folder(out)
    config = RunConfig.from_json(plan.config)
    if backend is None and group_size is not None:
        raise BackendError(f"group size {group_size} goes with a backend to deploy by; name one, or leave it out")
    deployed = RunConfig(config.model, backend or "", group_size).quantizer
    if backend is not None and deployed != plan.quantizer:
        plan = dataclasses.replace(plan, deployment=deployed, measured_loss=None)
    quantizer = get_backend(**plan.quantizer, bits=tuple(sorted(set(plan.assignment))))
    progress("loading the model", 0, 1)
    loaded = load_model(model or config.model, dtype=plan.fingerprint["dtype"], device=config.device)
    progress("loading the model", 1, 1)
    ours: dict[str, Any] = {"weights": fingerprint_weights(loaded.model)}
    if plan.deployment is None:
        ours["backend"] = json.loads(json.dumps(quantizer.fingerprint()))
    theirs = {name: plan.fingerprint[name] for name in ours}
    if ours != theirs:
        raise Mismatch(
            f"the plan was made for another model than {model or config.model!r}, or by another backend",
            ours,
            theirs,
            "name the plan's model, install what it was measured with, or allocate a new plan",
        )
    if plan.deployment is not None:
        players = find_players(loaded.model, config.granularity)
        plan = _resized(plan, measure_storage(players, quantizer, (config.low, config.high)))
    tokens = calibration_set(config.calibration, loaded.tokenizer).tokens if quantizer.whole_model else None
    return save_model(loaded, plan, quantizer, tokens, out, progress)


def _resized(plan: Plan, storage: Storage) -> Plan:
    """The plan with the sizes of the backend that deploys it, if they still keep the budget."""
    config = RunConfig.from_json(plan.config)
    limit, n_bytes = (
        storage.limit(Budget.parse(plan.budget), config.low, config.high),
        storage.bytes_of(plan.assignment),
    )
    if n_bytes > limit:
        raise InfeasibleBudget(
            f"by backend {plan.quantizer['name']!r} the plan takes {n_bytes} bytes, and its budget {plan.budget} is "
            f"{limit}; allocate a smaller budget, or estimate with that backend"
        )
    bits_per_weight = storage.bits_per_weight(plan.assignment)
    return dataclasses.replace(plan, bytes=n_bytes, budget_bytes=limit, bits_per_weight=bits_per_weight)


def default_run(out: Path) -> Path:
    """The run folder of an output folder: beside it, so that the output holds nothing but the model."""
    out = out.resolve()
    return out.with_name(f"{out.name}-run")


def _finished(
    config: RunConfig, method: str, budget: Budget, alpha: float | None, time_limit: float | None, out: Path
) -> Plan:
    """The plan of an output that is complete, if it answers this very request."""
    plan = Plan.load(out / "plan.json")
    ours = {**config.to_json(), "method": method, "budget": budget.text, "alpha": alpha, "deployment": None}
    theirs = {
        **RunConfig.from_json(plan.config).to_json(),
        "method": plan.method,
        "budget": plan.budget,
        "alpha": plan.alpha,
        "deployment": plan.deployment,
    }
    if time_limit is None:  # a proof is asked for
        ours["solver"], theirs["solver"] = "optimal", plan.solver.status
    if ours != theirs:
        differing = Mismatch("", ours, theirs, "").fields
        raise OutputError(
            f"output folder {out} is not empty: it holds a model made with another {', '.join(differing)}; "
            "name another folder, or empty it first"
        )
    return plan
