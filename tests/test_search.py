"""Searches on games whose optimum is known."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coopq.core.types import Assignments, Losses
from coopq.search import (
    ActiveSearch,
    Enumeration,
    Evolution,
    Greedy,
    OneShot,
    Regression,
    Search,
    SearchSpace,
    run,
    run_search,
)
from coopq.search.solver.local_search import random_fill
from coopq.search.surrogate import fit_surrogates, rank_correlation
from coopq.search.synthetic import HIGH, LOW, SyntheticGame, TableGame

SEARCHES: dict[str, Callable[[SearchSpace], Search]] = {
    "active": ActiveSearch,
    "down": Greedy,
    "up": lambda space: Greedy(space, direction="up"),
    "batched": lambda space: Greedy(space, per_move=3, candidates=5),
    "batched up": lambda space: Greedy(space, direction="up", per_move=3, candidates=5),
    "regression": lambda space: Regression(space, n_points=30),
    "one-shot high": lambda space: OneShot(space, "high"),
    "one-shot low": lambda space: OneShot(space, "low"),
    "evolution": Evolution,
}


def optimum(game: SyntheticGame, space: SearchSpace, capacity: int) -> float:
    search = run(Enumeration(space), game)
    return float(game(search.choose(capacity)[None])[0])


@pytest.mark.parametrize("name", SEARCHES)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 9))
@settings(max_examples=15)
def test_every_budget_is_kept_with_players_of_any_size(name: str, seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    step_bytes = rng.integers(1, 1000, size=n)
    capacities = tuple(sorted(int(x) for x in rng.integers(0, step_bytes.sum() + 1, size=2)))
    space = SearchSpace.uniform((LOW, HIGH), step_bytes, capacities, seed)
    game = TableGame(rng.normal(size=2**n))
    search = run(SEARCHES[name](space), game)
    for capacity in capacities:
        chosen = search.choose(capacity)
        assert step_bytes[chosen == HIGH].sum() <= capacity
        assert set(chosen.tolist()) <= {LOW, HIGH}


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow] * (form == "super-linear")) for form in SyntheticGame.FORMS]
)
def test_active_finds_the_optimum_of_small_games(form: str) -> None:
    for seed in range(3):
        game = SyntheticGame(12, form, seed)
        space = SearchSpace.uniform((LOW, HIGH), np.ones(12, dtype=np.int64), (2, 5, 9), seed)
        search = run(ActiveSearch(space), game)
        assert len(search.measured) < 250
        for capacity in space.capacities:
            assert game(search.choose(capacity)[None])[0] == pytest.approx(optimum(game, space, capacity), rel=1e-9)


@pytest.mark.slow
def test_active_is_better_than_greedy() -> None:
    losses: dict[str, list[float]] = {"active": [], "down": [], "up": []}
    for form in SyntheticGame.FORMS:
        game = SyntheticGame(18, form, 5)
        space = SearchSpace.uniform((LOW, HIGH), np.ones(18, dtype=np.int64), (5, 9, 14), 5)
        chance = [
            game(space.assignments(np.array([random_fill(space.constraint(c), np.random.default_rng(0))]))).mean()
            for c in space.capacities
        ]
        for name in losses:
            search = run(SEARCHES[name](space), game)
            chosen = np.array([search.choose(capacity) for capacity in space.capacities])
            losses[name].append(float(np.mean(game(chosen) / chance)))
    assert np.mean(losses["active"]) < min(np.mean(losses["down"]), np.mean(losses["up"]))


def test_active_is_soon_sure_of_a_quadratic_game() -> None:
    game = SyntheticGame(12, "quadratic", 0)
    space = SearchSpace.uniform((LOW, HIGH), np.ones(12, dtype=np.int64), (6,))
    search = run(ActiveSearch(space), game)
    assert len(search.measured) < 100
    assert game(search.choose(6)[None])[0] == pytest.approx(optimum(game, space, 6))


def test_a_surrogate_knows_how_wrong_it_is() -> None:
    """Probabilities to fall below a loss agree with the shares of unseen points that fall below the loss."""
    rng, n = np.random.default_rng(0), 12
    quadratic = SyntheticGame(n, "quadratic", 3)
    noise = TableGame(rng.normal(scale=0.1, size=2**n))
    space = SearchSpace.uniform((LOW, HIGH), np.ones(n, dtype=np.int64), (n // 2,))
    q = np.array([random_fill(space.constraint(n // 2), rng) for _ in range(600)])
    losses = quadratic(space.assignments(q)) + noise(space.assignments(q))
    for surrogate in fit_surrogates(q[:150], losses[:150], fills=np.full(150, 0.5), fill=0.5):
        for quantile in (0.1, 0.5, 0.9):
            loss = float(np.quantile(losses[150:], quantile))
            improvement, probability = surrogate.improvement(q[150:], loss)
            assert probability.mean() == pytest.approx(quantile, abs=0.08)
            assert (improvement >= 0).all()
            is_sure = (probability < 0.2) | (probability > 0.8)
            is_below = (losses[150:] < loss)[is_sure]
            assert ((probability[is_sure] > 0.5) == is_below).mean() > 0.95


def test_a_killed_search_resumes_to_the_same_end() -> None:
    """A search that replays losses from a journal proposes the same points."""
    game = SyntheticGame(10, "saturating", 1)
    space = SearchSpace.uniform((LOW, HIGH), np.ones(10, dtype=np.int64), (3, 6), 2)
    proposals: list[Assignments] = []

    class Recording(SyntheticGame):
        def __call__(self, assignments: Assignments) -> Losses:
            proposals.append(assignments)
            return super().__call__(assignments)

    first = run(ActiveSearch(space), Recording(10, "saturating", 1))
    again = ActiveSearch(space)
    for points in proposals:
        np.testing.assert_array_equal(again.propose(), points)
        again.learn(points, game(points))
    assert len(again.propose()) == 0
    for capacity in space.capacities:
        np.testing.assert_array_equal(first.choose(capacity), again.choose(capacity))


def test_known_points_are_used() -> None:
    game = SyntheticGame(10, "quadratic", 1)
    space = SearchSpace.uniform((LOW, HIGH), np.ones(10, dtype=np.int64), (4,))
    everything = (np.arange(2**10)[:, None] >> np.arange(10) & 1).astype(bool)
    points = space.assignments(everything)
    search = ActiveSearch(space, known=(points, game(points)))
    run(search, game)
    assert game(search.choose(4)[None])[0] == pytest.approx(optimum(game, space, 4))


def test_greedy_by_hand() -> None:
    # Player 0 is cheap alone, and makes player 1 expensive; greedy down cannot foresee it.
    game = TableGame(np.array([0.0, 1.0, 2.0, 9.0, 3.0, 5.0, 4.5, 12.0]))
    space = SearchSpace.uniform((LOW, HIGH), np.ones(3, dtype=np.int64), (1,))
    down = run(Greedy(space), game)
    assert down.choose(1).tolist() == [LOW, HIGH, LOW]  # lowers 0 (1.0), then 2 (5.0) rather than 1 (9.0)
    up = run(Greedy(space, direction="up"), game)
    assert up.choose(1).tolist() == [HIGH, LOW, LOW]  # raising 0 gives 4.5, the optimum


@pytest.mark.parametrize("end", ["high", "low"])
def test_one_shot_is_exact_where_losses_add_up(end: str) -> None:
    game = SyntheticGame(9, "quadratic", 0)
    game.K[:] = 0
    space = SearchSpace.uniform((LOW, HIGH), np.array([3, 1, 4, 1, 5, 9, 2, 6, 5]), (10, 20), 0)
    search = run(OneShot(space, end), game)
    assert len(search.measured) == 10
    for capacity in space.capacities:
        assert game(search.choose(capacity)[None])[0] == pytest.approx(optimum(game, space, capacity), rel=1e-9)


def test_one_shot_scores_by_hand() -> None:
    # From no player lowered to all players lowered: bit i of the index says that player i is lowered.
    table = np.array([0.0, 1.0, 2.0, 9.0, 3.0, 5.0, 5.5, 10.0])
    space = SearchSpace.uniform((LOW, HIGH), np.ones(3, dtype=np.int64), (1,), 0)
    high, low = (run(OneShot(space, end), TableGame(table)) for end in ("high", "low"))
    assert high.choose(1).tolist() == [LOW, LOW, HIGH], "lowered alone, player 2 costs most: 3"
    assert low.choose(1).tolist() == [LOW, HIGH, LOW], "raised alone, player 1 gains most: 10 - 5"


def test_evolution_selects_on_more_and_more_sequences() -> None:
    full, rough = SyntheticGame(10, "s-shaped", 0), SyntheticGame(10, "s-shaped", 1)
    space = SearchSpace.uniform((LOW, HIGH), np.ones(10, dtype=np.int64), (3, 6), 0)
    asked: dict[float, int] = {}

    def games(share: float) -> Callable[[Assignments], Losses]:
        def play(points: Assignments) -> Losses:
            asked[share] = asked.get(share, 0) + len(points)
            return (full if share == 1 else rough)(points)

        return play

    search = run_search(Evolution(space), games)  # type: ignore[arg-type]
    assert asked == {1 / 16: 26 * 2 * 32, 1 / 4: 26 * 2 * 8, 1.0: 26 * 2 * 2 + 25 * 2}
    assert (search.measured.losses == full(search.measured.known()[0])).all(), "losses on a share are left out"
    exact = run_search(Evolution(space), lambda _: full)
    for capacity in space.capacities:
        assert full(exact.choose(capacity)[None])[0] == pytest.approx(optimum(full, space, capacity), rel=1e-9)


def test_ranks_of_equal_losses_are_averaged() -> None:
    """Equal losses share a rank: their order among the points says nothing about a surrogate."""
    predicted, losses, fills = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 2.0, 2.0]), np.full(4, 0.5)
    expected = np.corrcoef([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 3.0, 3.0])[0, 1]  # not 1, as ranks without ties would say
    for order in (np.arange(4), np.array([3, 1, 0, 2])):
        assert rank_correlation(predicted[order], losses[order], fills, 0.5) == pytest.approx(expected)
    assert rank_correlation(predicted[:3], losses[:3], fills[:3], 0.5) is None, "a group needs four points"
