"""Estimators that answer with assignments, on games whose optimum is known."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coopq.search import (
    ActiveSearch,
    Enumeration,
    Evolution,
    Greedy,
    OneShot,
    Regression,
    Search,
    Setting,
    run_estimator,
    run_search,
)
from coopq.search.strategies.active import descent
from coopq.search.solver.quadratic_program import random_fill
from coopq.search.surrogate import fit_surrogates
from coopq.quantize.contract import HIGH, LOW, SyntheticGame, TableGame
from coopq.core.types import Assignments, Losses

SEARCHES: dict[str, Callable[[Setting], Search]] = {
    "active": ActiveSearch,
    "down": Greedy,
    "up": lambda setting: Greedy(setting, direction="up"),
    "batched": lambda setting: Greedy(setting, per_step=3, candidates=5),
    "batched up": lambda setting: Greedy(setting, direction="up", per_step=3, candidates=5),
    "swaps": lambda setting: Greedy(setting, per_step=2, swaps=4),
    "regression": lambda setting: Regression(setting, n_points=30),
    "one-shot high": lambda setting: OneShot(setting, "high"),
    "one-shot low": lambda setting: OneShot(setting, "low"),
    "evolution": Evolution,
}


def optimum(game: SyntheticGame, setting: Setting, capacity: int) -> float:
    search = run_estimator(Enumeration(setting), game)
    return float(game(search.choose(capacity)[None])[0])


@pytest.mark.parametrize("name", SEARCHES)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 9))
@settings(max_examples=15, deadline=None)
def test_every_budget_is_kept_with_players_of_any_size(name: str, seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 1000, size=n)
    capacities = tuple(sorted(int(x) for x in rng.integers(0, costs.sum() + 1, size=2)))
    setting = Setting((LOW, HIGH), costs, capacities, seed)
    game = TableGame(rng.normal(size=2**n))
    search = run_estimator(SEARCHES[name](setting), game)
    for capacity in capacities:
        chosen = search.choose(capacity)
        assert costs[chosen == HIGH].sum() <= capacity
        assert set(chosen.tolist()) <= {LOW, HIGH}


@pytest.mark.parametrize("form", SyntheticGame.FORMS)
def test_active_finds_the_optimum_of_small_games(form: str) -> None:
    for seed in range(3):
        game = SyntheticGame(12, form, seed)
        setting = Setting((LOW, HIGH), np.ones(12, dtype=np.int64), (2, 5, 9), seed)
        search = run_estimator(ActiveSearch(setting), game)
        assert len(search.measured) < 250
        for capacity in setting.capacities:
            assert game(search.choose(capacity)[None])[0] == pytest.approx(optimum(game, setting, capacity), rel=1e-9)


def test_active_is_better_than_greedy() -> None:
    losses: dict[str, list[float]] = {"active": [], "down": [], "up": []}
    for form in SyntheticGame.FORMS:
        game = SyntheticGame(18, form, 5)
        setting = Setting((LOW, HIGH), np.ones(18, dtype=np.int64), (5, 9, 14), 5)
        chance = [
            game(setting.assignments(np.array([random_fill(setting.program(c), np.random.default_rng(0))]))).mean()
            for c in setting.capacities
        ]
        for name in losses:
            search = run_estimator(SEARCHES[name](setting), game)
            chosen = np.array([search.choose(capacity) for capacity in setting.capacities])
            losses[name].append(float(np.mean(game(chosen) / chance)))
    assert np.mean(losses["active"]) < min(np.mean(losses["down"]), np.mean(losses["up"]))


def test_many_players_begin_with_a_descent_and_soon_go_below_it() -> None:
    setting = Setting((LOW, HIGH), np.random.default_rng(0).choice([1, 3, 8], size=66), (100,), seed=0)
    game = SyntheticGame(66, "saturating", 0)
    opening = descent(setting)
    assert opening is not None
    down, active = run_estimator(opening, game), ActiveSearch(setting)
    while len(active.measured) < len(down.measured) + 60:
        points = active.propose()
        active.learn(points, game(points))
    assert set(map(bytes, down.measured.lowered)) <= set(map(bytes, active.measured.lowered))
    finer = run_estimator(Greedy.paced(setting), game)
    assert len(active.measured) < len(finer.measured)
    assert active.measured.lowest(100) < min(down.measured.lowest(100), finer.measured.lowest(100))


def test_active_is_soon_sure_of_a_quadratic_game() -> None:
    game = SyntheticGame(12, "quadratic", 0)
    setting = Setting((LOW, HIGH), np.ones(12, dtype=np.int64), (6,))
    search = run_estimator(ActiveSearch(setting), game)
    assert len(search.measured) < 100
    assert game(search.choose(6)[None])[0] == pytest.approx(optimum(game, setting, 6))


def test_a_surrogate_knows_how_wrong_it_is() -> None:
    """Probabilities to fall below a loss agree with how often points that it has not seen do."""
    rng, n = np.random.default_rng(0), 12
    quadratic = SyntheticGame(n, "quadratic", 3)
    noise = TableGame(rng.normal(scale=0.1, size=2**n))
    setting = Setting((LOW, HIGH), np.ones(n, dtype=np.int64), (n // 2,))
    lowered = np.array([random_fill(setting.program(n // 2), rng) for _ in range(600)])
    losses = quadratic(setting.assignments(lowered)) + noise(setting.assignments(lowered))
    size = np.full(150, 0.5)
    for surrogate in fit_surrogates(lowered[:150], losses[:150], sizes=size, size=0.5):
        for quantile in (0.1, 0.5, 0.9):
            loss = float(np.quantile(losses[150:], quantile))
            improvement, probability = surrogate.improvement(lowered[150:], loss)
            assert probability.mean() == pytest.approx(quantile, abs=0.08)
            assert (improvement >= 0).all()
            sure = (probability < 0.2) | (probability > 0.8)
            below = (losses[150:] < loss)[sure]
            assert ((probability[sure] > 0.5) == below).mean() > 0.95


def test_a_killed_search_goes_on_to_the_same_end() -> None:
    """Replaying known losses from a journal changes no proposal."""
    game = SyntheticGame(10, "saturating", 1)
    setting = Setting((LOW, HIGH), np.ones(10, dtype=np.int64), (3, 6), 2)
    proposals: list[Assignments] = []

    class Recording(SyntheticGame):
        def __call__(self, assignments: Assignments) -> Losses:
            proposals.append(assignments)
            return super().__call__(assignments)

    first = run_estimator(ActiveSearch(setting), Recording(10, "saturating", 1))
    again = ActiveSearch(setting)
    for points in proposals:
        np.testing.assert_array_equal(again.propose(), points)
        again.learn(points, game(points))
    assert len(again.propose()) == 0
    for capacity in setting.capacities:
        np.testing.assert_array_equal(first.choose(capacity), again.choose(capacity))


def test_what_is_known_is_used() -> None:
    game = SyntheticGame(10, "quadratic", 1)
    setting = Setting((LOW, HIGH), np.ones(10, dtype=np.int64), (4,))
    everything = (np.arange(2**10)[:, None] >> np.arange(10) & 1).astype(bool)
    points = setting.assignments(everything)
    search = ActiveSearch(setting, known=(points, game(points)))
    run_estimator(search, game)
    assert game(search.choose(4)[None])[0] == pytest.approx(optimum(game, setting, 4))


def test_greedy_by_hand() -> None:
    # Player 0 is cheap alone, and ruins what 1 does; greedy down does not see it coming.
    game = TableGame(np.array([0.0, 1.0, 2.0, 9.0, 3.0, 5.0, 4.5, 12.0]))
    setting = Setting((LOW, HIGH), np.ones(3, dtype=np.int64), (1,))
    down = run_estimator(Greedy(setting), game)
    assert down.choose(1).tolist() == [LOW, HIGH, LOW]  # lowers 0 (1.0), then 2 (5.0) rather than 1 (9.0)
    up = run_estimator(Greedy(setting, direction="up"), game)
    assert up.choose(1).tolist() == [HIGH, LOW, LOW]  # raising 0 gives 4.5, the optimum


@pytest.mark.parametrize("end", ["high", "low"])
def test_one_shot_is_exact_where_losses_add_up(end: str) -> None:
    game = SyntheticGame(9, "quadratic", 0)
    game.pairs[:] = 0
    setting = Setting((LOW, HIGH), np.array([3, 1, 4, 1, 5, 9, 2, 6, 5]), (10, 20), 0)
    search = run_estimator(OneShot(setting, end), game)
    assert len(search.measured) == 10
    for capacity in setting.capacities:
        assert game(search.choose(capacity)[None])[0] == pytest.approx(optimum(game, setting, capacity), rel=1e-9)


def test_one_shot_scores_by_hand() -> None:
    #         nobody lowered .. everybody: bit i of the index says that player i is lowered
    table = np.array([0.0, 1.0, 2.0, 9.0, 3.0, 5.0, 5.5, 10.0])
    setting = Setting((LOW, HIGH), np.ones(3, dtype=np.int64), (1,), 0)
    high, low = (run_estimator(OneShot(setting, end), TableGame(table)) for end in ("high", "low"))
    assert high.choose(1).tolist() == [LOW, LOW, HIGH], "alone lowered, the third costs most: 3"
    assert low.choose(1).tolist() == [LOW, HIGH, LOW], "alone raised, the second gains most: 10 - 5"


def test_evolution_selects_on_more_and_more_sequences() -> None:
    full, rough = SyntheticGame(10, "s-shaped", 0), SyntheticGame(10, "s-shaped", 1)
    setting = Setting((LOW, HIGH), np.ones(10, dtype=np.int64), (3, 6), 0)
    asked: dict[float, int] = {}

    def game_of(share: float) -> Callable[[Assignments], Losses]:
        def play(points: Assignments) -> Losses:
            asked[share] = asked.get(share, 0) + len(points)
            return (full if share == 1 else rough)(points)

        return play

    search = run_search(Evolution(setting), game_of)  # type: ignore[arg-type]
    assert asked == {1 / 16: 26 * 2 * 32, 1 / 4: 26 * 2 * 8, 1.0: 26 * 2 * 2 + 25 * 2}
    assert (search.measured.losses == full(search.measured.known()[0])).all(), "none of what was seen in part"
    exact = run_search(Evolution(setting), lambda _: full)
    for capacity in setting.capacities:
        assert full(exact.choose(capacity)[None])[0] == pytest.approx(optimum(full, setting, capacity), rel=1e-9)
