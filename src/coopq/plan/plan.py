"""A plan: the bit-width of every module, where it came from and what it should cost."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.search.solver.exact import Allocation, allocate, near_optimum
from coopq.core.errors import PlanError
from coopq.search import Measured, Setting
from coopq.plan.confidence import Evidence
from coopq.core.files import write_json
from coopq.search.solver.quadratic_program import QuadraticProgram, paper_program
from coopq.core.config import Estimation, RunConfig, Subject
from coopq.core.sizes import Budget
from coopq.search.surrogate import Fidelity, best_surrogate
from coopq.core.types import UNTOUCHED, Assignment, Width, as_widths

WALK_METHODS = ("coopq", "shapley", "interactions", "pruning")
"""Methods that read permutation walks; their plans are of one number and seed of walks."""
_FORMAT_VERSION = 1
_SETTLE_SECONDS = 15.0
"""For programs of fitted or estimated interactions, whose proof nobody waits for."""
_MOST_EXACT = 32
"""Players up to which those are solved by branch and bound; their K is indefinite, and hard beyond."""


@dataclass(frozen=True)
class PlayerPlan:
    """One player: its bits, its linear modules, and the method's score of it.

    The score of "coopq" is the Shapley value, with its standard error, in nats per token; those of the baselines have
    no error, and units of their own.
    """

    name: str
    bits: Width
    modules: tuple[str, ...]
    score: float
    stderr: float | None


@dataclass(frozen=True)
class Solver:
    """How the program was solved; see `coopq.search.solver.exact.Allocation`."""

    status: str
    objective: float
    bound: float
    gap: float


@dataclass(frozen=True)
class Plan:
    """A plan as it is saved in plan.json.

    Attributes:
        method: One of `coopq.plan.methods.METHODS`.
        alpha: Shrinkage of the covariance; None for methods without one.
        budget: As the user wrote it.
        budget_bytes: The same in bytes.
        bytes: Bytes of the players' weights under this plan.
        untouched_bytes: Those of them that players left untouched take: in the target's file, if it has one.
        average_bits: Weight bits alone, averaged over the quantized weights.
        bits_per_weight: With scales, zeros and padding.
        players: Bits of each player.
        solver: How sure the solver is.
        predicted_loss: Loss on the calibration set by the surrogate, nats per token; None for methods without one.
        measured_loss: The same truly measured; None until it is.
        config: The run's configuration.
        fingerprint: What the losses depend on.
        layer_forwards: Forwards of one block over all calibration tokens that the method takes, uninterrupted, beyond
            what it knew from before.
        layer_forwards_unshared: The same without sharing prefixes.
        deployment: Backend and options, where they are not those that the losses were measured with.
        saved_loss: Negative log-likelihood of the model as saved, where mixed weights are not the bank's (gptq).
        runner_up: Bits of each player in the best other assignment that the method measured; None if it measured none.
        evidence: How sure the choice is; None until it is measured.
        max_loss: The limit on the loss that was asked for instead of a budget, nats per token.
        fidelity: How far the method's surrogate is to be trusted; None for methods without one.
    """

    method: str
    alpha: float | None
    budget: str
    budget_bytes: int
    bytes: int
    average_bits: float
    bits_per_weight: float
    players: tuple[PlayerPlan, ...]
    solver: Solver
    predicted_loss: float | None
    measured_loss: float | None
    config: Mapping[str, Any]
    fingerprint: Mapping[str, Any]
    layer_forwards: int
    layer_forwards_unshared: int
    deployment: Mapping[str, Any] | None = None
    saved_loss: float | None = None
    max_loss: float | None = None
    runner_up: tuple[Width, ...] | None = None
    evidence: Evidence | None = None
    fidelity: Fidelity | None = None
    untouched_bytes: int = 0

    @property
    def quantizer(self) -> dict[str, Any]:
        """The backend that makes the weights, with its options: the one deployed, or else the one measured."""
        return RunConfig.from_json(self.config).quantizer if self.deployment is None else dict(self.deployment)

    @property
    def label(self) -> str:
        """The budget, after the method where that is a baseline."""
        return self.budget if self.method == "coopq" else f"{self.method} {self.budget}"

    @property
    def file_name(self) -> str:
        """Name of the plan's file in a run folder."""
        return f"{self.label.replace(' ', '-')}.json"

    @property
    def assignment(self) -> list[Width]:
        """Bits of each player, in order."""
        return [player.bits for player in self.players]

    @property
    def modules(self) -> dict[str, Width]:
        """Bits of each linear module by its name in the model."""
        return {name: player.bits for player in self.players for name in player.modules}

    @property
    def quantized(self) -> dict[str, Width]:
        """The same without modules that stay as they are."""
        return {name: bits for name, bits in self.modules.items() if bits != UNTOUCHED}

    def is_of_other_walks(self, config: RunConfig) -> bool:
        """Whether it was read off other walks than those of `config`."""
        ours = RunConfig.from_json(self.config)
        walks = (ours.permutations, ours.seed) != (config.permutations, config.seed)
        return self.method in WALK_METHODS and walks

    def save(self, path: Path) -> None:
        """Write the plan, atomically."""
        write_json(path, {"format_version": _FORMAT_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read a plan.

        Raises:
            PlanError: If the file is missing, is no plan, or has another version's format.
        """
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = data.pop("format_version")
        except FileNotFoundError as error:
            raise PlanError(f"no plan at {path}; `coopq allocate` writes one") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path} is not a plan ({error}); `coopq allocate` writes one") from error
        if version != _FORMAT_VERSION:
            raise PlanError(f"{path} has plan format {version}; this version of coopq reads {_FORMAT_VERSION}")
        try:
            players = tuple(PlayerPlan(**{**p, "modules": tuple(p["modules"])}) for p in data.pop("players"))
            solver, runner_up = Solver(**data.pop("solver")), data.pop("runner_up", None)
            evidence, fidelity = data.pop("evidence", None), data.pop("fidelity", None)
            if evidence is not None and evidence["interval"] is not None:
                evidence["interval"] = tuple(evidence["interval"])
            plan = cls(
                players=players,
                solver=solver,
                runner_up=None if runner_up is None else tuple(runner_up),
                evidence=None if evidence is None else Evidence(**evidence),
                fidelity=None if fidelity is None else Fidelity(**fidelity),
                **data,
            )
            RunConfig.from_json(plan.config)
            if not all(isinstance(p.bits, int | float) and isinstance(p.score, float | int) for p in players):
                raise TypeError("bits and scores of players must be numbers")
            return plan
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path} is not a complete plan ({error}); allocate it again") from error


def plan_budget(
    estimation: Estimation,
    budget: Budget,
    *,
    method: str = "coopq",
    alpha: float = 0.5,
    time_limit: float | None = None,
) -> Plan:
    """Allocate one budget by the paper's program.

    Args:
        estimation: A finished estimation.
        budget: The limit on bytes.
        method: "coopq"; "pruning" where the walks removed players instead of lowering them, and predict nothing.
        alpha: Shrinkage of the covariance towards its diagonal, 0 to 1.
        time_limit: Seconds for the solver; None waits for the proof.
    Raises:
        InfeasibleBudget: With the smallest and largest feasible budget.
        PlanError: If alpha is out of range.
    """
    check_solver(alpha, time_limit)
    estimate, setting = estimation.estimate, setting_of(estimation, [budget])
    program = paper_program(
        estimate.shapley,
        estimate.covariance,
        alpha,
        costs=setting.costs,
        capacity=setting.capacities[0],
    )
    allocation = allocate(program, time_limit)
    return _plan(
        estimation,
        budget,
        as_widths(setting.assignments(allocation.q)),
        allocation,
        estimate.shapley.tolist(),
        estimate.stderr.tolist(),
        method=method,
        alpha=alpha,
        predicted_loss=estimate.loss_high + allocation.objective if method == "coopq" else None,
        layer_forwards=estimation.layer_forwards,
        layer_forwards_unshared=estimation.layer_forwards_unshared,
    )


def plan_gains(
    subject: Subject,
    method: str,
    gains: npt.NDArray[np.float64],
    budget: Budget,
    *,
    pairs: npt.NDArray[np.float64] | None = None,
    layer_forwards: int,
    layer_forwards_unshared: int | None = None,
    time_limit: float | None = None,
) -> Plan:
    """Allocate one budget by a score: the exact knapsack over what raising each player is worth.

    Args:
        subject: What the plan is for.
        method: Name of the score.
        gains: What raising each player is worth, by each step, shape (n_steps,).
        budget: The limit on bytes.
        pairs: What pairs of steps down cost beyond that, symmetric, shape (n_steps, n_steps), if anything.
        layer_forwards: What the score took.
        layer_forwards_unshared: What it would have taken without sharing prefixes, if that is more.
        time_limit: Seconds for the solver; None waits for the proof.
    Raises:
        InfeasibleBudget: With the smallest and largest feasible budget.
    """
    setting = setting_of(subject, [budget])
    program = replace(setting.program(setting.capacities[0]), linear=gains)
    if pairs is not None:
        program = replace(program, quadratic=pairs)
    allocation = allocate(program, time_limit) if pairs is None else _settle(program, time_limit)
    return _plan(
        subject,
        budget,
        as_widths(setting.assignments(allocation.q)),
        allocation,
        setting.by_player(gains).tolist(),
        [None] * setting.n_players,
        method=method,
        alpha=None,
        predicted_loss=None,
        layer_forwards=layer_forwards,
        layer_forwards_unshared=layer_forwards_unshared or layer_forwards,
    )


def plan_search(
    subject: Subject,
    method: str,
    chosen: Assignment,
    budget: Budget,
    *,
    measured: Measured,
    runner_up: Assignment | None,
    layer_forwards: int,
    layer_forwards_unshared: int,
    time_limit: float | None = None,
) -> Plan:
    """The plan of an assignment that a search chose, with what its surrogate says of it.

    The solver's part of the plan is about the surrogate's optimum, in the units of its transform: how far below it any
    assignment could be, if the surrogate were true.

    Args:
        subject: What the plan is for.
        method: Name of the search.
        chosen: The assignment, shape (n_players,).
        budget: The limit on bytes.
        measured: What the search measured.
        runner_up: The best other assignment measured.
        layer_forwards: What the search took.
        layer_forwards_unshared: What it would have taken without sharing prefixes.
        time_limit: Seconds for the solver, with few players; None takes a quarter of a minute.
    """
    setting = setting_of(subject, [budget])
    (capacity,) = setting.capacities
    surrogates = measured.surrogates(capacity)
    surrogate = best_surrogate(surrogates)
    allocation = _settle(surrogate.program(setting.program(capacity)), time_limit)
    lowered = setting.lowered(chosen)
    return _plan(
        subject,
        budget,
        as_widths(chosen),
        allocation,
        setting.by_player(surrogates[0].shapley()).tolist(),
        [None] * len(chosen),
        method=method,
        alpha=None,
        # What the surrogate was fitted to it does not predict.
        predicted_loss=None if lowered in measured else float(surrogate.predict(lowered[None])[0]),
        layer_forwards=layer_forwards,
        layer_forwards_unshared=layer_forwards_unshared,
        runner_up=None if runner_up is None else tuple(as_widths(runner_up)),
        fidelity=surrogate.fidelity,
    )


def check_solver(alpha: float, time_limit: float | None) -> None:
    """Check the settings of the program before anything expensive.

    Raises:
        PlanError: If the shrinkage or the time limit is out of range.
    """
    if not 0 <= alpha <= 1:
        raise PlanError(f"alpha = {alpha} is not between 0 and 1; the paper takes 0.5")
    if time_limit is not None and not 0 < time_limit < math.inf:
        raise PlanError(f"time limit {time_limit} is not a positive number of seconds; leave it out for none")


def setting_of(subject: Subject, budgets: Sequence[Budget] = ()) -> Setting:
    """What a search for budgets is for; capacities are the bytes above all players at the lowest width."""
    config, storage = subject.config, subject.storage
    smallest = sum(storage.n_bytes[config.low])
    capacities = tuple(storage.limit(budget, config.low, config.high) - smallest for budget in budgets)
    return Setting(config.widths, storage.raise_costs(*config.widths), capacities, config.seed, subject.levels)


def _settle(program: QuadraticProgram, time_limit: float | None) -> Allocation:
    """A solution with a bound, in bounded time: these programs can be hard, and their proof is worth no hours."""
    if len(program.costs) > _MOST_EXACT:
        return near_optimum(program)
    return allocate(program, time_limit or _SETTLE_SECONDS)


def _plan(
    subject: Subject,
    budget: Budget,
    assignment: list[Width],
    allocation: Allocation,
    scores: Sequence[float],
    stderr: Sequence[float | None],
    **fields: Any,
) -> Plan:
    """A plan with its sizes."""
    config, storage = subject.config, subject.storage
    return Plan(
        budget=budget.text,
        budget_bytes=storage.limit(budget, config.low, config.high),
        bytes=storage.bytes_of(assignment),
        untouched_bytes=storage.untouched_bytes(assignment),
        average_bits=storage.average_bits(assignment),
        bits_per_weight=storage.bits_per_weight(assignment),
        players=tuple(
            PlayerPlan(player.name, bits, tuple(linear.name for linear in player.linears), score, error)
            for player, bits, score, error in zip(subject.players, assignment, scores, stderr, strict=True)
        ),
        solver=Solver(allocation.status, allocation.objective, allocation.bound, allocation.gap),
        measured_loss=None,
        config=config.to_json(),
        fingerprint=subject.fingerprint,
        **fields,
    )
