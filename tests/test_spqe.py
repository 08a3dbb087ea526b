from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coopq.core.errors import EstimationError
from coopq.search import SPQE, run
from coopq.search.shapley import marginals, permutation_walk
from coopq.search.strategies.exhaustive import shapley_values
from coopq.search.synthetic import HIGH, LOW, TableGame

tables = st.integers(2, 4).flatmap(
    lambda n: arrays(np.float64, 2**n, elements=st.floats(-10, 10, allow_nan=False, width=32))
)


def test_a_walk_lowers_one_player_after_the_other() -> None:
    walk = permutation_walk(np.array([2, 0, 1]), 2, 4)
    assert walk.tolist() == [[4, 4, 4], [4, 4, 2], [2, 4, 2], [2, 2, 2]]
    np.testing.assert_array_equal(marginals(np.array([2, 0, 1]), np.array([1.0, 1.5, 3.0, 7.0])), [1.5, 4.0, 0.5])


@given(tables)
@settings(max_examples=50)
def test_the_mean_over_all_permutations_is_the_exact_shapley_value(
    table: "np.ndarray[tuple[int], np.dtype[np.float64]]",
) -> None:
    game = TableGame(table)
    orders = [np.array(order) for order in permutations(range(game.n_players))]
    samples = [marginals(order, game(permutation_walk(order, LOW, HIGH))) for order in orders]
    np.testing.assert_allclose(np.mean(samples, axis=0), shapley_values(game.table), atol=1e-9)


@given(tables, st.integers(2, 30), st.integers(0, 1000))
@settings(max_examples=50)
def test_every_estimate_is_efficient_and_its_covariance_has_no_row_sums(
    table: "np.ndarray[tuple[int], np.dtype[np.float64]]", walks: int, seed: int
) -> None:
    game = TableGame(table)
    estimate = run(SPQE(game.n_players, low=LOW, high=HIGH, permutations=walks, seed=seed), game).estimate()
    assert estimate.loss_high == table[0]
    # The marginal contributions of every walk add up to the whole loss increase, so their sum does not vary.
    assert estimate.shapley.sum() == pytest.approx(table[-1] - table[0], abs=1e-9)
    np.testing.assert_allclose(estimate.covariance.sum(axis=0), 0, atol=1e-8)


def test_mean_error_and_covariance_by_hand() -> None:
    game = TableGame(np.array([0.0, 1.0, 2.0, 7.0]))  # players 0 and 1 interact by 4
    estimator = SPQE(2, low=LOW, high=HIGH, permutations=40, seed=3)
    estimate = run(estimator, game).estimate()
    first = np.array([[1.0, 6.0] if order[0] == 0 else [5.0, 2.0] for order in estimator.orders])
    np.testing.assert_allclose(estimate.shapley, first.mean(axis=0))
    np.testing.assert_allclose(estimate.stderr, first.std(axis=0, ddof=1) / np.sqrt(40))
    centred = first - first.mean(axis=0)
    np.testing.assert_allclose(estimate.covariance, centred.T @ centred / 39)


def test_more_permutations_extend_a_run() -> None:
    few = SPQE(9, low=2, high=4, permutations=3, seed=5).points
    many = SPQE(9, low=2, high=4, permutations=8, seed=5).points
    np.testing.assert_array_equal(few, many[: len(few)])
    assert not np.array_equal(few, SPQE(9, low=2, high=4, permutations=3, seed=6).points)


def test_one_permutation_is_too_few() -> None:
    with pytest.raises(EstimationError, match="at least 2"):
        SPQE(4, low=2, high=4, permutations=1, seed=0)
