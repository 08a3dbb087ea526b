"""Estimators run to the full game give its exact values."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coopq.core.errors import EstimationError
from coopq.search import SPQE, CrossLayer, Enumeration, Setting, run_estimator
from coopq.search.strategies.exhaustive import best_quadratic, shapley_interactions, shapley_values
from coopq.search.surrogate import fit_surrogates
from coopq.quantize.contract import HIGH, LOW, SyntheticGame, TableGame

Floats = npt.NDArray[np.float64]


def setting(n: int, *capacities: int) -> Setting:
    return Setting((LOW, HIGH), np.ones(n, dtype=np.int64), capacities or (n // 2,))


def quadratic_table(seed: int, n: int) -> tuple[Floats, Floats, Floats]:
    """Linear terms, pair terms and the table of a random quadratic game."""
    rng = np.random.default_rng(seed)
    linear, pairs = rng.normal(size=n), np.triu(rng.normal(size=(n, n)), 1)
    pairs = (pairs + pairs.T) / 2
    q = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float)
    return linear, pairs, 1.5 + q @ linear + ((q @ pairs) * q).sum(axis=1)


def test_exact_values_against_shapiq() -> None:
    from shapiq import ExactComputer

    table = np.random.default_rng(0).normal(size=2**6)
    oracle = ExactComputer(lambda coalitions: table[coalitions.astype(int) @ (1 << np.arange(6))], 6)
    np.testing.assert_allclose(shapley_values(table), oracle("SV", 1).get_n_order_values(1), atol=1e-10)
    np.testing.assert_allclose(shapley_interactions(table), oracle("SII", 2).get_n_order_values(2), atol=1e-10)
    faithful = oracle("FBII", 2)
    constant, linear, pairs = best_quadratic(table)
    np.testing.assert_allclose(linear, faithful.get_n_order_values(1), atol=1e-8)
    np.testing.assert_allclose(2 * pairs, faithful.get_n_order_values(2), atol=1e-8)
    assert constant == pytest.approx(faithful.baseline_value, abs=1e-8)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_enumeration_finds_every_optimum(seed: int, n: int) -> None:
    table = np.random.default_rng(seed).normal(size=2**n)
    game, all_budgets = TableGame(table), setting(n, *range(n + 1))
    search = run_estimator(Enumeration(all_budgets), game)
    np.testing.assert_array_equal(search.table(), table)
    for raised in range(n + 1):
        best = min(loss for coalition, loss in enumerate(table) if n - coalition.bit_count() <= raised)
        assert game(search.choose(raised)[None])[0] == best


def test_too_many_players_to_enumerate() -> None:
    with pytest.raises(EstimationError, match="at most 16,384 are enumerated"):
        Enumeration(setting(15))


@given(seed=st.integers(0, 10**6), n=st.integers(4, 7))
@settings(max_examples=25, deadline=None)
def test_quadratic_games_are_found_exactly(seed: int, n: int) -> None:
    linear, pairs, table = quadratic_table(seed, n)
    game = TableGame(table)
    # by least squares over all coalitions
    constant, singles, interactions = best_quadratic(table)
    assert constant == pytest.approx(1.5)
    np.testing.assert_allclose(singles, linear, atol=1e-9)
    np.testing.assert_allclose(interactions, pairs, atol=1e-9)
    np.testing.assert_allclose(shapley_interactions(table), 2 * pairs, atol=1e-9)
    # by singles and pairs at the high end
    program = run_estimator(CrossLayer(setting(n)), game).program(1)
    np.testing.assert_allclose(program.linear, linear, atol=1e-9)
    np.testing.assert_allclose(program.quadratic, pairs, atol=1e-9)
    # by one antithetic pair of walks
    walks = SPQE(n, low=LOW, high=HIGH, permutations=2, seed=seed, antithetic=True)
    np.testing.assert_allclose(run_estimator(walks, game).estimate().shapley, shapley_values(table), atol=1e-9)
    # by the surrogate, fitted to the whole game
    lowered = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)
    (fitted,) = fit_surrogates(lowered, table, sizes=1 - lowered.mean(axis=1), size=0.5, transforms=["raw"])
    np.testing.assert_allclose(fitted.predict(lowered), table, atol=1e-4)
    np.testing.assert_allclose(fitted.quadratic, pairs, atol=1e-4)
    np.testing.assert_allclose(fitted.linear, linear, atol=1e-4)


def test_cross_layer_finds_the_optimum_of_a_quadratic_game() -> None:
    game = SyntheticGame(12, "quadratic", 0)
    cross, truth = (run_estimator(make(setting(12, 3, 6)), game) for make in (CrossLayer, Enumeration))
    for capacity in (3, 6):
        assert game(cross.choose(capacity)[None]) == pytest.approx(game(truth.choose(capacity)[None]))
