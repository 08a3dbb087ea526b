"""Estimators that measure the whole game give the exact values of the game."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coopq.core.errors import EstimationError
from coopq.search import CrossLayer, Enumeration, SearchSpace, Steps, run
from coopq.search.shapley import marginals, permutation_walk
from coopq.search.strategies.exhaustive import best_quadratic, shapley_values
from coopq.search.surrogate import fit_surrogates
from coopq.search.synthetic import HIGH, LOW, SyntheticGame, TableGame

Floats = npt.NDArray[np.float64]


def space(n: int, *capacities: int) -> SearchSpace:
    return SearchSpace.uniform((LOW, HIGH), np.ones(n, dtype=np.int64), capacities or (n // 2,))


def quadratic_table(seed: int, n: int) -> tuple[Floats, Floats, Floats]:
    """a, K and the table of a random quadratic game."""
    rng = np.random.default_rng(seed)
    a, K = rng.normal(size=n), np.triu(rng.normal(size=(n, n)), 1)
    K = (K + K.T) / 2
    q = coalitions(n).astype(float)
    return a, K, 1.5 + q @ a + ((q @ K) * q).sum(axis=1)


def coalitions(n: int) -> Steps:
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


def test_exact_values_against_shapiq() -> None:
    from shapiq import ExactComputer

    table = np.random.default_rng(0).normal(size=2**6)
    oracle = ExactComputer(lambda members: table[members.astype(int) @ (1 << np.arange(6))], 6)
    np.testing.assert_allclose(shapley_values(table), oracle("SV", 1).get_n_order_values(1), atol=1e-10)
    faithful = oracle("FBII", 2)
    constant, a, K = best_quadratic(table)
    np.testing.assert_allclose(a, faithful.get_n_order_values(1), atol=1e-8)
    np.testing.assert_allclose(2 * K, faithful.get_n_order_values(2), atol=1e-8)
    assert constant == pytest.approx(faithful.baseline_value, abs=1e-8)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 6))
@settings(max_examples=25)
def test_enumeration_finds_every_optimum(seed: int, n: int) -> None:
    table = np.random.default_rng(seed).normal(size=2**n)
    game, all_budgets = TableGame(table), space(n, *range(n + 1))
    search = run(Enumeration(all_budgets), game)
    np.testing.assert_array_equal(search.table(), table)
    for capacity in range(n + 1):
        best = min(loss for coalition, loss in enumerate(table) if n - coalition.bit_count() <= capacity)
        assert game(search.choose(capacity)[None])[0] == best


def test_too_many_players_to_enumerate() -> None:
    with pytest.raises(EstimationError, match="at most 16,384 are enumerated"):
        Enumeration(space(15))


@given(seed=st.integers(0, 10**6), n=st.integers(4, 7))
@settings(max_examples=25)
def test_quadratic_games_are_found_exactly(seed: int, n: int) -> None:
    a, K, table = quadratic_table(seed, n)
    game = TableGame(table)
    # by least squares over all coalitions
    constant, linear, pairs = best_quadratic(table)
    assert constant == pytest.approx(1.5)
    np.testing.assert_allclose(linear, a, atol=1e-9)
    np.testing.assert_allclose(pairs, K, atol=1e-9)
    # by players and pairs lowered from the high width
    program = run(CrossLayer(space(n)), game).program(1)
    np.testing.assert_allclose(program.a, a, atol=1e-9)
    np.testing.assert_allclose(program.K, K, atol=1e-9)
    # by a walk and the same walk in reverse order
    order = np.random.default_rng(seed).permutation(n)
    walks = [marginals(walk, game(permutation_walk(walk, LOW, HIGH))) for walk in (order, order[::-1])]
    np.testing.assert_allclose(np.mean(walks, axis=0), shapley_values(table), atol=1e-9)
    # by the surrogate, fitted to the whole game
    q = coalitions(n)
    (fitted,) = fit_surrogates(q, table, fills=1 - q.mean(axis=1), fill=0.5, transforms=["raw"])
    np.testing.assert_allclose(fitted.predict(q), table, atol=1e-4)
    np.testing.assert_allclose(fitted.K, K, atol=1e-4)
    np.testing.assert_allclose(fitted.a, a, atol=1e-4)


def test_cross_layer_finds_the_optimum_of_a_quadratic_game() -> None:
    game = SyntheticGame(12, "quadratic", 0)
    cross, truth = (run(make(space(12, 3, 6)), game) for make in (CrossLayer, Enumeration))
    for capacity in (3, 6):
        assert game(cross.choose(capacity)[None]) == pytest.approx(game(truth.choose(capacity)[None]))
