"""A plan: the bit-width of every module, where it came from and what it should cost."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.allocate import Allocation, allocate
from coopq.errors import PlanError
from coopq.files import write_json
from coopq.program import QuadraticProgram, paper_program
from coopq.run import Estimation, RunConfig, Subject
from coopq.storage import Budget

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class PlayerPlan:
    """One player: its bits, its linear modules, and the method's score of it.

    The score of "coopq" is the Shapley value, with its standard error, in nats per token; those of the baselines have
    no error, and units of their own.
    """

    name: str
    bits: int
    modules: tuple[str, ...]
    score: float
    stderr: float | None


@dataclass(frozen=True)
class Solver:
    """How the program was solved; see `coopq.allocate.Allocation`."""

    status: str
    objective: float
    bound: float
    gap: float


@dataclass(frozen=True)
class Plan:
    """A plan as it is saved in plan.json.

    Attributes:
        method: "coopq", or a baseline.
        alpha: Shrinkage of the covariance; None for methods without one.
        budget: As the user wrote it.
        budget_bytes: The same in bytes.
        bytes: Bytes of the quantized weights under this plan.
        average_bits: Weight bits alone, averaged over the quantized weights.
        bits_per_weight: With scales, zeros and padding.
        players: Bits of each player.
        solver: How sure the solver is.
        predicted_loss: Loss on the calibration set by the surrogate, nats per token; None for methods without one.
        measured_loss: The same truly measured; None until it is.
        config: The run's configuration.
        fingerprint: What the losses depend on.
        layer_forwards: Forwards of one block over all calibration tokens that the method takes, uninterrupted.
        layer_forwards_unshared: The same without sharing prefixes.
        deployment: Backend and options, where they are not those that the losses were measured with.
        saved_loss: Loss of the model as saved, for backends whose mixed weights are not the bank's (gptq).
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
    def assignment(self) -> list[int]:
        """Bits of each player, in order."""
        return [player.bits for player in self.players]

    @property
    def modules(self) -> dict[str, int]:
        """Bits of each linear module by its name in the model."""
        return {name: player.bits for player in self.players for name in player.modules}

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
            plan = cls(players=players, solver=Solver(**data.pop("solver")), **data)
            RunConfig.from_json(plan.config)
            if not all(isinstance(p.bits, int) and isinstance(p.score, float | int) for p in players):
                raise TypeError("bits and scores of players must be numbers")
            return plan
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path} is not a complete plan ({error}); allocate it again") from error


def plan_budget(estimation: Estimation, budget: Budget, *, alpha: float = 0.5, time_limit: float | None = None) -> Plan:
    """Allocate one budget by the paper's program.

    Args:
        estimation: A finished estimation.
        budget: The limit on bytes.
        alpha: Shrinkage of the covariance towards its diagonal, 0 to 1.
        time_limit: Seconds for the solver; None waits for the proof.
    Raises:
        InfeasibleBudget: With the smallest and largest feasible budget.
        PlanError: If alpha is out of range.
    """
    check_solver(alpha, time_limit)
    config, storage, estimate = estimation.config, estimation.storage, estimation.estimate
    program = paper_program(
        estimate.shapley,
        estimate.covariance,
        alpha,
        costs=storage.raise_costs(config.low, config.high),
        capacity=_capacity(estimation, budget),
    )
    allocation = allocate(program, time_limit)
    return _plan(
        estimation,
        budget,
        allocation,
        estimate.shapley.tolist(),
        estimate.stderr.tolist(),
        method="coopq",
        alpha=alpha,
        predicted_loss=estimate.loss_high + allocation.objective,
        layer_forwards=estimation.layer_forwards,
        layer_forwards_unshared=estimation.layer_forwards_unshared,
    )


def plan_gains(
    subject: Subject,
    method: str,
    gains: npt.NDArray[np.float64],
    budget: Budget,
    *,
    layer_forwards: int,
    time_limit: float | None = None,
) -> Plan:
    """Allocate one budget by a one-layer score: the exact knapsack over what raising each player is worth.

    Args:
        subject: What the plan is for.
        method: Name of the score.
        gains: What raising each player is worth, shape (n_players,).
        budget: The limit on bytes.
        layer_forwards: What the score took.
        time_limit: Seconds for the solver; None waits for the proof.
    Raises:
        InfeasibleBudget: With the smallest and largest feasible budget.
    """
    config, storage = subject.config, subject.storage
    program = QuadraticProgram(
        linear=gains,
        quadratic=np.zeros((len(gains), len(gains))),
        costs=storage.raise_costs(config.low, config.high),
        capacity=_capacity(subject, budget),
    )
    allocation = allocate(program, time_limit)
    return _plan(
        subject,
        budget,
        allocation,
        gains.tolist(),
        [None] * len(gains),
        method=method,
        alpha=None,
        predicted_loss=None,
        layer_forwards=layer_forwards,
        layer_forwards_unshared=layer_forwards,
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


def _capacity(subject: Subject, budget: Budget) -> int:
    """Bytes that the budget leaves above all players at the low width."""
    config, storage = subject.config, subject.storage
    return storage.limit(budget, config.low, config.high) - sum(storage.n_bytes[config.low])


def _plan(
    subject: Subject,
    budget: Budget,
    allocation: Allocation,
    scores: Sequence[float],
    stderr: Sequence[float | None],
    **fields: Any,
) -> Plan:
    """The plan of an allocation, with its sizes."""
    config, storage = subject.config, subject.storage
    assignment = np.where(allocation.q, config.low, config.high).tolist()
    return Plan(
        budget=budget.text,
        budget_bytes=storage.limit(budget, config.low, config.high),
        bytes=storage.bytes_of(assignment),
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
