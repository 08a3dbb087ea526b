import dataclasses
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coopq.search.solver.exact import allocate, near_optimum
from coopq.search.solver.lower_bound import _project, lower_bound
from coopq.search.solver.quadratic_program import QuadraticProgram, paper_program
from coopq.search.synthetic import SyntheticGame
from tests.command_line import interruptible


def random_program(seed: int, n: int, magnitude: float) -> QuadraticProgram:
    rng = np.random.default_rng(seed)
    K = rng.normal(size=(n, n)) * magnitude
    step_bytes = rng.integers(1, 10**6, size=n)
    return QuadraticProgram.two_widths(
        a=rng.normal(size=n) * magnitude,
        K=K + K.T,
        step_bytes=step_bytes,
        capacity=int(rng.integers(0, step_bytes.sum() + 1)),
    )


def best_by_enumeration(program: QuadraticProgram) -> float:
    points = (np.array(q) for q in product([False, True], repeat=len(program.a)))
    return min(program.objective(q) for q in points if program.is_feasible(q))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 8), magnitude=st.sampled_from([1e-4, 1.0, 1e3]))
@settings(max_examples=60)
def test_the_solver_finds_the_optimum_of_any_sign_and_size(seed: int, n: int, magnitude: float) -> None:
    program = random_program(seed, n, magnitude)
    allocation = allocate(program)
    assert program.is_feasible(allocation.q)
    assert allocation.status == "optimal"
    assert allocation.gap == 0
    assert allocation.objective == program.objective(allocation.q)
    assert allocation.objective == pytest.approx(best_by_enumeration(program), abs=1e-7 * magnitude)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 16), definite=st.booleans(), equal=st.booleans())
@settings(max_examples=10)
def test_allocations_and_bounds_against_brute_force(seed: int, n: int, definite: bool, equal: bool) -> None:
    program = random_program(seed, n, 1.0)
    if definite:
        program = dataclasses.replace(program, K=program.K @ program.K.T)
    if equal:
        program = dataclasses.replace(program, step_bytes=np.full(n, 7), capacity=7 * (n // 2) + 3)
    q = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float)
    values = q @ program.a + ((q @ program.K) * q).sum(axis=1)
    best = values[(1 - q) @ program.step_bytes <= program.capacity].min()
    assert allocate(program).objective == pytest.approx(best, abs=1e-6)
    near = near_optimum(program)
    assert program.is_feasible(near.q)
    tight = dataclasses.replace(program, capacity=int(program.step_bytes.min()) * (seed % 2))
    fits = values[(1 - q) @ tight.step_bytes <= tight.capacity].min()
    assert lower_bound(tight) <= fits + 1e-9
    assert near.bound <= best + 1e-9
    assert near.objective >= best - 1e-9
    assert lower_bound(program) <= best + 1e-9


@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), share=st.floats(0, 1))
@settings(max_examples=60)
def test_the_projection_is_the_nearest_point_of_the_budget(seed: int, n: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    weights, x = rng.uniform(0.1, 3, n), rng.normal(0, 2, n)
    least = share * float(weights.sum())
    q = _project(x, weights, least)
    assert ((q >= 0) & (q <= 1)).all()
    assert weights @ q >= least - 1e-9
    feasible = rng.uniform(0, 1, (200, n))
    feasible = np.concatenate([feasible[feasible @ weights >= least], np.ones((1, n))])
    # From the point of a convex set that is nearest to x, no point of the set lies in the direction of x.
    assert ((feasible - q) @ (x - q)).max() <= 1e-9


def test_players_of_equal_gain_per_byte_are_solved_to_proof() -> None:
    step_bytes = np.tile([576, 192, 192, 576, 1536, 1536, 1536], 30) * 64
    gains = step_bytes * np.repeat(np.linspace(1, 2, 30), 7)  # layers inherit the ranking of their blocks
    program = QuadraticProgram.two_widths(gains, np.zeros((210, 210)), step_bytes, int(step_bytes.sum() * 0.37))
    allocation = allocate(program)
    assert allocation.status == "optimal"
    assert program.is_feasible(allocation.q)
    assert allocation.objective <= program.objective(near_optimum(program).q) + 1e-6
    assert allocation.objective == pytest.approx(lower_bound(program), rel=1e-3)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 10))
@settings(max_examples=50)
def test_knapsacks_are_exact(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    step_bytes = rng.integers(1, 50, size=n) * 12
    K = np.diag(rng.normal(size=n))
    capacity = int(rng.integers(0, step_bytes.sum() + 1))
    program = QuadraticProgram.two_widths(rng.normal(size=n), K, step_bytes, capacity)
    found = allocate(program)
    assert program.is_feasible(found.q)
    assert found.objective == pytest.approx(best_by_enumeration(program), abs=1e-9)


def test_hundreds_of_players_with_any_interactions_take_seconds() -> None:
    game = SyntheticGame(300, "quadratic", 0)
    program = QuadraticProgram.two_widths(game.a, game.K, np.ones(300, dtype=np.int64), 150)
    near = near_optimum(program)
    assert near.gap < 0.15
    assert near.status == "local optimum"


def test_a_budget_is_kept_to_the_byte() -> None:
    step_bytes = np.array([999_999_937, 999_999_929])  # primes: no common unit
    all_bytes = int(step_bytes.sum())
    program = QuadraticProgram.two_widths(np.ones(2), np.zeros((2, 2)), step_bytes, all_bytes - 1)
    assert allocate(program).q.sum() == 1
    assert allocate(dataclasses.replace(program, capacity=all_bytes)).q.sum() == 0


def test_no_capacity_takes_every_step() -> None:
    program = dataclasses.replace(random_program(1, 5, 1.0), capacity=0)
    assert allocate(program).q.all()


@given(seed=st.integers(0, 10**6), alpha=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=50)
def test_the_papers_objective_is_a_mean_variance_rule(seed: int, alpha: float) -> None:
    """All walks have the same sum, so C 1 = 0, and the objective is phi'q + diag(C)'q + (1 - alpha) q'Cq."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(size=(12, 6))
    samples -= samples.mean(axis=1, keepdims=True)  # all walks have the same sum
    covariance, shapley = np.cov(samples, rowvar=False).astype(np.float64), rng.normal(size=6)
    program = paper_program(shapley, covariance, alpha, np.ones(6, dtype=np.int64), 3)
    q = rng.random(6) < 0.5
    diagonal = np.diag(covariance)
    expected = shapley @ q + diagonal @ q + (1 - alpha) * (q @ covariance @ q)
    assert program.objective(q) == pytest.approx(expected)


def test_the_papers_program_by_hand() -> None:
    covariance = np.array([[4.0, 1.0], [1.0, 9.0]])
    program = paper_program(np.array([0.3, 0.7]), covariance, 0.5, np.array([10, 20]), 15)
    np.testing.assert_allclose(program.K, [[4.0, 0.5], [0.5, 9.0]])
    np.testing.assert_allclose(program.a, [-0.2, 0.2])
    assert allocate(program).q.tolist() == [False, True]  # only player 0 can be raised


def test_many_large_unequal_players_keep_the_budget_exactly() -> None:
    rng = np.random.default_rng(5)
    step_bytes = rng.integers(10**9, 2 * 10**9, size=10)
    for capacity in (int(step_bytes[:4].sum()) - 1, int(step_bytes[2:8].sum()), int(step_bytes.sum()) - 1):
        program = QuadraticProgram.two_widths(rng.random(10) + 0.5, np.zeros((10, 10)), step_bytes, capacity)
        allocation = allocate(program)
        assert program.is_feasible(allocation.q)
        assert allocation.objective == pytest.approx(best_by_enumeration(program))


def test_an_interrupt_is_not_a_solution() -> None:
    code = """
import sys
import traceback
import pyscipopt
from tests.test_allocate import random_program
from coopq.search.solver import exact


class Announce(pyscipopt.Eventhdlr):
    def eventinit(self):
        self.model.catchEvent(pyscipopt.SCIP_EVENTTYPE.NODEFOCUSED, self)

    def eventexec(self, event):
        print("solving", flush=True)


scip_model = exact._scip_model

def announcing(*arguments):
    model, variables = scip_model(*arguments)
    model.includeEventhdlr(Announce(), "announce", "says that the solver runs")
    return model, variables


exact._scip_model = announcing
try:
    exact.allocate(random_program(7, 60, 1.0))
except KeyboardInterrupt as stop:  # while the solver runs, the solver answers the interrupt
    sys.exit(42 if traceback.extract_tb(stop.__traceback__)[-1].name == "_branch_and_bound" else 1)
"""
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "solving\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 42, errors


def test_a_time_limit_is_a_normal_outcome_with_a_bound_and_a_gap() -> None:
    program = random_program(7, 60, 1.0)
    allocation = allocate(program, time_limit=1)
    assert allocation.status == "time limit"
    assert program.is_feasible(allocation.q)
    assert allocation.bound < allocation.objective
    assert allocation.gap > 0
