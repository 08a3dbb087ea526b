"""A plan: the width of every module, where the plan came from and what it costs."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from coopq.core.errors import PlanError
from coopq.core.files import read_record, write_record
from coopq.core.sizes import Budget
from coopq.core.specs import DEFAULT_SOLVER, QuantizerSpec, Request
from coopq.core.types import UNTOUCHED, Width
from coopq.plan.confidence import Confidence
from coopq.plan.methods import METHODS
from coopq.search.surrogate import Fidelity

_FORMAT_VERSION = 4
_ROUNDING = 1e-6
"""What an average may be off by rounding, in bits."""


class PlayerPlan(Struct, frozen=True, forbid_unknown_fields=True):
    """One player of a plan.

    Attributes:
        name: The player's name.
        bits: Its width.
        modules: Its linear modules by their names in the model.
        score: What the method says of the player: for "coopq" the Shapley value, in nats per token; other methods have
            units of their own.
        stderr: Standard error of the score; None for methods without one.
        block: Index of the transformer block that holds the player.
        n_weights: Number of weights.
        n_bytes: Bytes at each width that was to choose from, by the width as text.
    """

    name: str
    bits: int | float
    modules: tuple[str, ...]
    score: float
    stderr: float | None
    block: int
    n_weights: int
    n_bytes: dict[str, int]


class Solver(Struct, frozen=True, forbid_unknown_fields=True):
    """How the program of a budget was solved; see `coopq.search.solver.exact.Allocation`."""

    status: str
    objective: float
    bound: float
    gap: float


class Plan(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A plan as it is saved in plan.json.

    Attributes:
        method: A name of `coopq.plan.methods.METHODS`.
        alpha: Shrinkage of the covariance; None for methods without one.
        budget: The budget as the user wrote it.
        budget_bytes: The budget of the players' weights in bytes.
        bytes: Bytes of the players' weights under this plan.
        file_bytes: Bytes of the whole file of weights: of the target's file as predicted, or of the saved model's.
            Until the model is saved, the most that the file can take.
        source_bytes: Bytes of the files that the model came from; 0 until the model is saved.
        untouched_bytes: Bytes of the players that stay untouched: in the target's file, if there is a target.
        average_bits: Width averaged over the quantized weights; scales and zeros do not count.
        bits_per_weight: Stored bits per quantized weight; scales, zeros and padding count.
        players: Each player with its width.
        solver: How well the program is solved; None for searches, which measure and solve none.
        predicted_loss: Loss on the calibration set that the surrogate predicts, nats per token; None for methods
            without a surrogate, and where the loss was measured before.
        measured_loss: The loss truly measured, nats per token; None until it is.
        request: What was asked for.
        fingerprint: What the losses depend on.
        block_forwards: Forwards of one block over all calibration tokens that the method takes, uninterrupted, beyond
            what was known before the method began.
        block_forwards_unshared: The same number if no two assignments shared the forwards of a common prefix.
        deployment: The quantizer that makes the weights, if it is not the one that was measured.
        saved_loss: Negative log-likelihood of the saved model, nats per token, where the weights of a mixed model are
            not those that were measured (gptq, autoround).
        stopped_after: What ended the search before its own end: a limit ("60 forwards"), or an interrupt ("12 losses");
            None if the search ended by itself.
        max_loss: The limit on the loss that was asked for instead of a budget, nats per token.
        runner_up: Width of each player in the best measured assignment that differs in a real choice, see
            `coopq.plan.rivals`; None if none was measured.
        confidence: How sure the choice is; None until the loss is measured.
        fidelity: How far the method's surrogate can be trusted; None for methods without one.
    """

    method: str
    alpha: float | None
    budget: str
    budget_bytes: int
    bytes: int
    file_bytes: int
    average_bits: float
    bits_per_weight: float
    players: tuple[PlayerPlan, ...]
    solver: Solver | None
    predicted_loss: float | None
    measured_loss: float | None
    request: Request
    fingerprint: dict[str, Any]
    block_forwards: int
    block_forwards_unshared: int
    deployment: QuantizerSpec | None = None
    saved_loss: float | None = None
    stopped_after: str | None = None
    max_loss: float | None = None
    runner_up: tuple[int | float, ...] | None = None
    confidence: Confidence | None = None
    fidelity: Fidelity | None = None
    untouched_bytes: int = 0
    source_bytes: int = 0

    @property
    def quantizer(self) -> QuantizerSpec:
        """The backend that makes the weights: the one deployed, or else the one measured."""
        return self.deployment or self.request.quantizer

    @property
    def asked(self) -> str:
        """What was asked for: a budget, or a limit on the loss."""
        return self.budget if self.max_loss is None else f"a loss of at most {self.max_loss:g} nats per token"

    @property
    def is_interrupted(self) -> bool:
        """Whether the search was broken off before its limit, so that its cost is not known."""
        return self.stopped_after is not None and not self.stop_options

    @property
    def label(self) -> str:
        """The budget, after the method where that is not the paper's, and before an alpha that is not the default."""
        method = "" if self.method == "coopq" else f"{self.method} "
        alpha = "" if self.alpha in (None, DEFAULT_SOLVER.alpha) else f" alpha {self.alpha:g}"
        return f"{method}{self.budget}{alpha}"

    @property
    def stop_options(self) -> dict[str, str]:
        """The limits that ended the search, as options; none if it was interrupted or ran to its end."""
        parts = [] if self.stopped_after is None else [limit.split() for limit in self.stopped_after.split(" or ")]
        return {unit: amount for amount, unit in parts if unit in ("forwards", "minutes")}

    @property
    def goal_words(self) -> list[str]:
        """What was wanted, as words of a command line: the size or the loss, the method, its limits."""
        goal = {"budget": Budget.parse(self.budget).text} if self.max_loss is None else {"max-loss": str(self.max_loss)}
        goal["method"] = self.method
        if METHODS[self.method].takes_alpha and self.alpha != DEFAULT_SOLVER.alpha:
            goal["alpha"] = str(self.alpha)
        return [word for name, value in (goal | self.stop_options).items() for word in (f"--{name}", value)]

    @property
    def file_name(self) -> str:
        """Name of the plan's file in a run folder."""
        return f"{self.label.replace(' ', '-')}.json"

    @property
    def assignment(self) -> list[Width]:
        """Width of each player, in order."""
        return [player.bits for player in self.players]

    @property
    def modules(self) -> dict[str, Width]:
        """Width of each linear module by its name in the model."""
        return {name: player.bits for player in self.players for name in player.modules}

    @property
    def quantized(self) -> dict[str, Width]:
        """Width of each linear module that is quantized: `modules` without those that stay as they are."""
        return {name: bits for name, bits in self.modules.items() if bits != UNTOUCHED}

    @property
    def keeps_quantized(self) -> bool:
        """Whether players stay as they are that were quantized before: these have fewer than 16 bits."""
        n_weights = sum(player.n_weights for player in self.players if player.bits == UNTOUCHED)
        return 0 < 8 * self.untouched_bytes < (UNTOUCHED - 1) * n_weights

    @property
    def covered(self) -> float | None:
        """Share of the weights of the blocks that belongs to players; None if it is not recorded."""
        share: float | None = self.fingerprint.get("covered")
        return share

    @property
    def source_notes(self) -> tuple[str, ...]:
        """What was done to the model's weights when they were loaded, and what of the files is not used."""
        rounded = self.fingerprint.get("rounded to")
        note = () if rounded is None else (f"weights that stay are rounded to {rounded}, for the loss as in the file",)
        return (*self.fingerprint.get("source", ()), *note)

    def replace(self, **changes: Any) -> "Plan":
        """The plan with other values of some fields."""
        return msgspec.structs.replace(self, **changes)

    def save(self, path: Path) -> None:
        """Write the plan, atomically."""
        write_record(path, self, _FORMAT_VERSION)

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read a plan.

        Raises:
            PlanError: If the file is missing, is no plan, has another version's format, was changed, or contradicts
                itself.
        """
        plan = read_record(
            path,
            Plan,
            _FORMAT_VERSION,
            what="plan",
            missing=f"no plan at {path}; `coopq quantize` and `coopq allocate` write plans",
            way_out="repeat the command that made it",
            error=PlanError,
        )
        if (wrong := _contradiction(plan)) is not None:
            raise PlanError(f"{path} contradicts itself: {wrong}; repeat the command that made it")
        return plan


def interrupted_plans(folder: Path) -> list[Path]:
    """Files of plans that interrupted searches left in a folder; files that cannot be read are left out."""
    found = []
    for file in sorted(folder.glob("*.json")):
        with suppress(PlanError):
            if Plan.load(file).is_interrupted:
                found.append(file)
    return found


def _contradiction(plan: Plan) -> str | None:
    """What in a plan cannot be true beside the rest of the plan; None if nothing is found."""
    modules, doubled = set[str](), None
    for name in (name for player in plan.players for name in player.modules):
        doubled = name if name in modules and doubled is None else doubled
        modules.add(name)
    foreign = next((bits for bits in (*plan.assignment, *(plan.runner_up or ())) if not 0 < bits <= UNTOUCHED), None)
    n_untouched = plan.assignment.count(UNTOUCHED)
    if not modules:
        return "it has no modules"
    if doubled is not None:
        return f"module {doubled} belongs to two players"
    if foreign is not None:
        return f"{foreign:g} bits are no width"
    if plan.runner_up is not None and len(plan.runner_up) != len(plan.players):
        return f"its runner-up has {len(plan.runner_up)} players, and the plan {len(plan.players)}"
    if not 0 < plan.bytes <= plan.budget_bytes:
        return f"its weights take {plan.bytes} bytes of a budget of {plan.budget_bytes}"
    if not 0 <= plan.untouched_bytes <= plan.bytes or (plan.untouched_bytes > 0) != (n_untouched > 0):
        return f"{n_untouched} players are untouched, and take {plan.untouched_bytes} of {plan.bytes} bytes"
    if not min(plan.assignment) - _ROUNDING <= plan.average_bits <= max(plan.assignment) + _ROUNDING:
        return f"{plan.average_bits} are not the average of its players' bits"
    if plan.file_bytes < (plan.bytes if plan.request.target.form is None else 1):
        return f"its weights take {plan.bytes} bytes of a file of {plan.file_bytes}"
    if sum(player.n_bytes.get(f"{player.bits:g}", -1) for player in plan.players) != plan.bytes:
        return f"the bytes of its players do not add up to {plan.bytes}"
    if plan.bits_per_weight <= 0 or min(plan.block_forwards, plan.block_forwards_unshared) < 0:
        return "a size or a cost is negative"
    return None


def load_plans(paths: Sequence[Path]) -> list[Plan]:
    """The plans of several files, in order."""
    return [Plan.load(path) for path in paths]
