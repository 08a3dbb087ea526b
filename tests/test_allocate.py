import dataclasses
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coopq.search.solver.exact import allocate, best_allocations, near_optimum
from coopq.search.solver.quadratic_program import QuadraticProgram, paper_program
from coopq.search.solver.lower_bound import _project, lower_bound
from coopq.quantize.contract import SyntheticGame
from tests.command_line import interruptible


def random_program(seed: int, n: int, magnitude: float) -> QuadraticProgram:
    rng = np.random.default_rng(seed)
    quadratic = rng.normal(size=(n, n)) * magnitude
    costs = rng.integers(1, 10**6, size=n)
    return QuadraticProgram(
        linear=rng.normal(size=n) * magnitude,
        quadratic=quadratic + quadratic.T,
        costs=costs,
        capacity=int(rng.integers(0, costs.sum() + 1)),
    )


def best_by_enumeration(program: QuadraticProgram) -> float:
    points = (np.array(q) for q in product([False, True], repeat=len(program.linear)))
    return min(program.objective(q) for q in points if program.feasible(q))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 8), magnitude=st.sampled_from([1e-4, 1.0, 1e3]))
@settings(max_examples=60, deadline=None)
def test_the_solver_finds_the_optimum_of_any_sign_and_size(seed: int, n: int, magnitude: float) -> None:
    program = random_program(seed, n, magnitude)
    allocation = allocate(program)
    assert program.feasible(allocation.q)
    assert allocation.status == "optimal"
    assert allocation.gap == 0
    assert allocation.objective == program.objective(allocation.q)
    assert allocation.objective == pytest.approx(best_by_enumeration(program), abs=1e-7 * magnitude)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 7), k=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_the_k_best_in_order(seed: int, n: int, k: int) -> None:
    program = random_program(seed, n, 1.0)
    points = (np.array(q) for q in product([False, True], repeat=n))
    expected = sorted(program.objective(q) for q in points if program.feasible(q))[:k]
    found = best_allocations(program, k)
    assert [allocation.objective for allocation in found] == pytest.approx(expected, abs=1e-6)
    assert len({allocation.q.tobytes() for allocation in found}) == len(expected)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 16), definite=st.booleans(), equal=st.booleans())
@settings(max_examples=10, deadline=None)
def test_allocations_and_bounds_against_brute_force(seed: int, n: int, definite: bool, equal: bool) -> None:
    program = random_program(seed, n, 1.0)
    if definite:
        program = dataclasses.replace(program, quadratic=program.quadratic @ program.quadratic.T)
    if equal:
        program = dataclasses.replace(program, costs=np.full(n, 7), capacity=7 * (n // 2) + 3)
    q = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float)
    values = q @ program.linear + ((q @ program.quadratic) * q).sum(axis=1)
    best = values[(1 - q) @ program.costs <= program.capacity].min()
    assert allocate(program).objective == pytest.approx(best, abs=1e-6)
    near = near_optimum(program)
    assert program.feasible(near.q)
    tight = dataclasses.replace(program, capacity=int(program.costs.min()) * (seed % 2))
    fits = values[(1 - q) @ tight.costs <= tight.capacity].min()
    assert lower_bound(tight) <= fits + 1e-9
    assert near.bound <= best + 1e-9
    assert near.objective >= best - 1e-9
    assert lower_bound(program) <= best + 1e-9


@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_projection_is_the_nearest_point_of_the_budget(seed: int, n: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    costs, x = rng.uniform(0.1, 3, n), rng.normal(0, 2, n)
    kept = share * float(costs.sum())
    q = _project(x, costs, kept)
    assert ((q >= 0) & (q <= 1)).all()
    assert costs @ q >= kept - 1e-9
    others = rng.uniform(0, 1, (200, n))
    others = np.concatenate([others[others @ costs >= kept], np.ones((1, n))])
    # Of a convex set, the nearest point is the one from which no other lies in the direction of x.
    assert ((others - q) @ (x - q)).max() <= 1e-9


def test_players_of_equal_worth_by_the_byte_are_no_problem() -> None:
    costs = np.tile([576, 192, 192, 576, 1536, 1536, 1536], 30) * 64
    worth = costs * np.repeat(np.linspace(1, 2, 30), 7)  # a ranking of blocks, inherited by their layers
    program = QuadraticProgram(worth, np.zeros((210, 210)), costs, int(costs.sum() * 0.37))
    allocation = allocate(program)
    assert allocation.status == "optimal"
    assert program.feasible(allocation.q)
    assert allocation.objective <= program.objective(near_optimum(program).q) + 1e-6
    assert allocation.objective == pytest.approx(lower_bound(program), rel=1e-3)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 10))
@settings(max_examples=50, deadline=None)
def test_knapsacks_are_exact(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 50, size=n) * 12
    quadratic = np.diag(rng.normal(size=n))
    program = QuadraticProgram(rng.normal(size=n), quadratic, costs, int(rng.integers(0, costs.sum() + 1)))
    found = allocate(program)
    assert program.feasible(found.q)
    assert found.objective == pytest.approx(best_by_enumeration(program), abs=1e-9)


def test_hundreds_of_players_with_any_interactions_take_seconds() -> None:
    game = SyntheticGame(300, "quadratic", 0)
    program = QuadraticProgram(game.linear, game.pairs, np.ones(300, dtype=np.int64), 150)
    near = near_optimum(program)
    assert near.gap < 0.15
    assert near.status == "local optimum"


def test_a_budget_is_kept_to_the_byte() -> None:
    costs = np.array([999_999_937, 999_999_929])  # primes: no common unit
    program = QuadraticProgram(np.array([1.0, 1.0]), np.zeros((2, 2)), costs, int(costs.sum()) - 1)
    assert allocate(program).q.sum() == 1
    assert allocate(QuadraticProgram(np.array([1.0, 1.0]), np.zeros((2, 2)), costs, int(costs.sum()))).q.sum() == 0


def test_extreme_budgets() -> None:
    program = random_program(1, 5, 1.0)
    nothing = QuadraticProgram(program.linear, program.quadratic, program.costs, 0)
    assert allocate(nothing).q.all()


@given(seed=st.integers(0, 10**6), alpha=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=50)
def test_the_papers_objective_is_a_mean_variance_rule(seed: int, alpha: float) -> None:
    """Walks add up to the same, so C 1 = 0, and the objective is phi'q + diag(C)'q + (1 - alpha) q'Cq."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(size=(12, 6))
    samples -= samples.mean(axis=1, keepdims=True)  # every walk adds up to the same
    covariance, shapley = np.cov(samples, rowvar=False).astype(np.float64), rng.normal(size=6)
    program = paper_program(shapley, covariance, alpha, np.ones(6, dtype=np.int64), 3)
    q = rng.random(6) < 0.5
    diagonal = np.diag(covariance)
    expected = shapley @ q + diagonal @ q + (1 - alpha) * (q @ covariance @ q)
    assert program.objective(q) == pytest.approx(expected)


def test_the_papers_program_by_hand() -> None:
    covariance = np.array([[4.0, 1.0], [1.0, 9.0]])
    program = paper_program(np.array([0.3, 0.7]), covariance, 0.5, np.array([10, 20]), 15)
    np.testing.assert_allclose(program.quadratic, [[4.0, 0.5], [0.5, 9.0]])
    np.testing.assert_allclose(program.linear, [-0.2, 0.2])
    assert allocate(program).q.tolist() == [False, True]  # only player 0 can be raised


def test_many_large_unequal_players_keep_the_budget_exactly() -> None:
    rng = np.random.default_rng(5)
    costs = rng.integers(10**9, 2 * 10**9, size=10)
    for capacity in (int(costs[:4].sum()) - 1, int(costs[2:8].sum()), int(costs.sum()) - 1):
        program = QuadraticProgram(rng.random(10) + 0.5, np.zeros((10, 10)), costs, capacity)
        allocation = allocate(program)
        assert program.feasible(allocation.q)
        assert allocation.objective == pytest.approx(best_by_enumeration(program))


def test_an_interrupt_is_not_a_solution() -> None:
    code = """
import sys
import traceback
from tests.test_allocate import random_program
from coopq.search.solver.exact import allocate
program = random_program(7, 60, 1.0)
print("ready", flush=True)
try:
    allocate(program)
except KeyboardInterrupt as stop:  # once the solver runs, the interrupt is the solver's to answer
    sys.exit(42 if traceback.extract_tb(stop.__traceback__)[-1].name == "solve" else 1)
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
    assert process.stdout.readline() == "ready\n"
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 42, errors


def test_a_time_limit_is_a_normal_outcome_with_a_bound_and_a_gap() -> None:
    program = random_program(7, 60, 1.0)
    allocation = allocate(program, time_limit=1)
    assert allocation.status == "time limit"
    assert program.feasible(allocation.q)
    assert allocation.bound < allocation.objective
    assert allocation.gap > 0
