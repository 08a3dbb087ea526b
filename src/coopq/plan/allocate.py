"""From what a method says to the plan of a budget: the program, its solution, the sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from coopq.core.errors import BudgetError, PlanError
from coopq.core.files import expanded
from coopq.core.sizes import Budget
from coopq.core.specs import DEFAULT_SOLVER, Request, SolverSpec
from coopq.core.subject import Subject
from coopq.core.types import Assignment, ProgressCallback, as_widths, silent
from coopq.game.run_folder import RunFolder
from coopq.plan.confidence import confidence
from coopq.plan.estimation import Estimation, Spent, load_estimation
from coopq.plan.methods import METHODS
from coopq.plan.plan import Plan, PlayerPlan, Solver
from coopq.search.solver.exact import Allocation, allocate, near_optimum
from coopq.search.solver.quadratic_program import QuadraticProgram, paper_program
from coopq.search.space import SearchSpace
from coopq.search.surrogate import Fidelity

if TYPE_CHECKING:  # a session imports torch, and plans are allocated without
    from coopq.game.session import Session

_SETTLE_SECONDS = 15.0
"""For programs of fitted interactions, whose proof can take hours (docs/decisions/0010-hard-programs.md)."""
_MOST_EXACT = 32
"""Steps up to which those programs are solved by branch and bound; K is indefinite, and hard beyond (same decision)."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """What a method chose for a budget, and why.

    Attributes:
        method: Name of the method.
        assignment: Width of each player, shape (n_players,).
        allocation: The solution of the method's program; None for searches, which solve none.
        scores: What the method says of each player, shape (n_players,).
        spent: What the method took.
        stderr: Standard errors of the scores, shape (n_players,); None for methods without.
        alpha: Shrinkage of the covariance; None for methods without.
        predicted_loss: Loss that the method predicts, nats per token; None for methods that predict none.
        fidelity: How far the method's surrogate can be trusted; None for methods without one.
    """

    method: str
    assignment: Assignment
    allocation: Allocation | None
    scores: Array
    spent: Spent
    stderr: Array | None = None
    alpha: float | None = None
    predicted_loss: float | None = None
    fidelity: Fidelity | None = None


def search_space(subject: Subject, budgets: Sequence[Budget] = ()) -> SearchSpace:
    """What a search for budgets chooses from; capacities are the bytes above all players at their lowest width."""
    widths, sizes = subject.request.widths, subject.sizes
    return SearchSpace(
        player_widths=subject.player_widths,
        step_bytes=sizes.step_bytes(widths.bits),
        capacities=tuple(sizes.capacity(budget, widths.bits) for budget in budgets),
        seed=subject.request.search.seed,
    )


def choose_by_walks(estimation: Estimation, budget: Budget, method: str, solver: SolverSpec) -> Choice:
    """What the paper's program chooses.

    Args:
        estimation: A finished estimation.
        budget: The limit on bytes.
        method: "coopq"; "pruning" where the walks removed players instead of lowering them, and predict no loss.
        solver: Shrinkage of the covariance, and the time limit.
    """
    estimate, space = estimation.estimate, search_space(estimation, [budget])
    program = paper_program(
        estimate.shapley, estimate.covariance, solver.alpha, step_bytes=space.step_bytes, capacity=space.capacities[0]
    )
    allocation = allocate(program, solver.time_limit)
    return Choice(
        method=method,
        assignment=space.assignments(allocation.q),
        allocation=allocation,
        scores=estimate.shapley,
        spent=estimation.spent,
        stderr=estimate.stderr,
        alpha=solver.alpha,
        predicted_loss=estimate.loss_high + allocation.objective if method == "coopq" else None,
    )


def choose_by_gains(
    space: SearchSpace, capacity: int, method: str, gains: Array, pairs: Array | None, spent: Spent, solver: SolverSpec
) -> Choice:
    """What a score chooses: the exact knapsack over the gains of steps, or a local optimum if there are pair terms.

    Args:
        space: Players and steps.
        capacity: Bytes that steps not taken may cost together.
        method: Name of the score.
        gains: Loss saved by not taking each step down, shape (n_steps,).
        pairs: What pairs of steps cost beyond that, symmetric, shape (n_steps, n_steps); None for no pair terms.
        spent: What the score took.
        solver: The time limit.
    """
    program = replace(space.constraint(capacity), a=gains)
    allocation = allocate(program, solver.time_limit) if pairs is None else settle(replace(program, K=pairs), solver)
    return Choice(
        method=method,
        assignment=space.assignments(allocation.q),
        allocation=allocation,
        scores=space.sum_by_player(gains),
        spent=spent,
    )


def settle(program: QuadraticProgram, solver: SolverSpec) -> Allocation:
    """A solution with a bound, in bounded time, of a program that can be hard."""
    if len(program.step_bytes) > _MOST_EXACT:
        return near_optimum(program)
    return allocate(program, solver.time_limit or _SETTLE_SECONDS)


def make_plan(subject: Subject, budget: Budget, choice: Choice) -> Plan:
    """The plan of a choice, with its sizes."""
    sizes = subject.sizes
    assignment, allocation = as_widths(choice.assignment), choice.allocation
    stderr = [None] * len(assignment) if choice.stderr is None else choice.stderr.tolist()
    return Plan(
        method=choice.method,
        alpha=choice.alpha,
        budget=budget.text,
        budget_bytes=sizes.limit(budget, subject.request.widths.bits),
        bytes=sizes.total_bytes(assignment),
        file_bytes=sizes.file_bytes(assignment),
        untouched_bytes=sizes.untouched_bytes(assignment),
        average_bits=sizes.average_bits(assignment),
        bits_per_weight=sizes.bits_per_weight(assignment),
        players=tuple(
            PlayerPlan(
                name=player.name,
                bits=bits,
                modules=tuple(linear.name for linear in player.linears),
                score=score,
                stderr=error,
                block=player.block,
                n_weights=player.n_weights,
                n_bytes=sizes.bytes_by_width(index),
            )
            for index, (player, bits, score, error) in enumerate(
                zip(subject.players, assignment, choice.scores.tolist(), stderr, strict=True)
            )
        ),
        solver=None if allocation is None else _proof(allocation),
        predicted_loss=choice.predicted_loss,
        measured_loss=None,
        request=subject.request,
        fingerprint=dict(subject.fingerprint),
        block_forwards=choice.spent.block_forwards,
        block_forwards_unshared=choice.spent.unshared,
        fidelity=choice.fidelity,
    )


def _proof(allocation: Allocation) -> Solver:
    return Solver(allocation.status, allocation.objective, allocation.bound, allocation.gap)


def allocate_run(
    run: Path,
    budgets: Sequence[str] = (),
    *,
    front: int = 0,
    solver: SolverSpec = DEFAULT_SOLVER,
    progress: ProgressCallback = silent,
) -> dict[Path, Plan]:
    """Solve the paper's program for budgets of a finished estimation; nothing is measured.

    A plan keeps its measured loss if its budget was solved before, with the same assignment.

    Args:
        run: Run folder of the estimation.
        budgets: Budgets as for `coopq.quantize`.
        front: As many budgets, evenly between the two widths, beside those named.
        solver: Shrinkage of the covariance, and the time limit.
        progress: Told of every budget.
    Returns:
        The plans by their files in RUN/plans.
    Raises:
        BudgetError: If there is no budget, or one is infeasible; then none is solved.
    """
    run, parsed = expanded(run), [Budget.parse(text) for text in budgets]
    estimation = load_estimation(run)
    widths = estimation.request.widths
    parsed += [
        Budget.parse(f"{widths.low + (widths.high - widths.low) * k / (front + 1):.4g}avg") for k in range(1, front + 1)
    ]
    if not parsed:
        raise BudgetError("no budget is given; name some with --budget, or take a whole front with --front 9")
    for budget in parsed:
        estimation.sizes.limit(budget, widths.bits)
    plans: list[Plan] = []
    for budget in parsed:
        progress("solving the program", len(plans), len(parsed))
        plans.append(make_plan(estimation, budget, choose_by_walks(estimation, budget, "coopq", solver)))
    progress("solving the program", len(plans), len(parsed))
    folder = RunFolder(run).plans
    folder.mkdir(exist_ok=True)
    saved = {folder / plan.file_name: _with_kept_loss(plan, folder / plan.file_name) for plan in plans}
    for path, plan in saved.items():
        plan.save(path)
    return saved


def _with_kept_loss(plan: Plan, path: Path) -> Plan:
    """The plan, with the measured loss and the confidence of the plan in a file if both are the same assignment."""
    try:
        kept = Plan.load(path)
    except PlanError:  # missing or damaged: to allocate again is the way out
        return plan
    if (kept.assignment, kept.fingerprint) != (plan.assignment, plan.fingerprint):
        return plan
    return plan.replace(measured_loss=kept.measured_loss, confidence=kept.confidence, runner_up=kept.runner_up)


def measure_plan(session: "Session", plan: Plan) -> Plan:
    """The plan with its loss on the calibration set measured, and the confidence in it; kept in the run folder."""
    if plan.confidence is None:
        with session.game("measuring the plan") as game:
            losses = game.per_sequence(np.array([plan.assignment], dtype=np.float32))[0]
        plan = plan.replace(measured_loss=float(losses.mean()), confidence=confidence(losses, None))
    session.folder.plans.mkdir(exist_ok=True)
    plan.save(session.folder.plans / plan.file_name)
    return plan


def has_other_walks(plan: Plan, request: Request) -> bool:
    """Whether a plan was read off other walks than those of a request."""
    ours, asked = plan.request.search, request.search
    walks_differ = (ours.permutations, ours.seed) != (asked.permutations, asked.seed)
    return METHODS[plan.method].kind == "walks" and walks_differ
