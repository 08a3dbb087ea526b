"""Games with more than two widths: a player has a step from each width down to the next lower width."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import coopq
from coopq.core.sizes import Budget, Sizes
from coopq.core.specs import Request, SolverSpec
from coopq.core.types import Assignments, Losses
from coopq.export.checkpoint import SavedModel
from coopq.game.engines.prefix_engine import model_nll
from coopq.game.prepared import prepare
from coopq.game.session import open_session
from coopq.judge.references import random_assignments
from coopq.model.load import load_model
from coopq.model.texts import calibration_set
from coopq.plan.allocate import measure_plan
from coopq.plan.by_score import cached_score, sensitivities
from coopq.plan.methods import METHODS, get_method, make_plans, names
from coopq.plan.searches.by_search import make_search
from coopq.search import ActiveSearch, Enumeration, Greedy, OneShot, Regression, SearchSpace, run
from coopq.search.solver.exact import allocate
from coopq.search.solver.local_search import descend, local_optima, neighbours, random_fill
from coopq.search.solver.quadratic_program import QuadraticProgram
from coopq.search.synthetic import SteppedGame, SyntheticGame
from tests.command_line import command, refused
from tests.conftest import STORIES
from tests.folders import save_source

WIDTHS = (2, 3, 4, 8)
HALVES = (2, 2.5, 4, 8)
TEXT: list[str | Path] = ["--tokens", "256", "--sequence-length", "64"]


def random_space(seed: int, n: int, n_widths: int, n_capacities: int = 1) -> SearchSpace:
    """A space whose players have all widths; with an odd seed, players lack some widths between the ends."""
    rng, (low, *between, high) = np.random.default_rng(seed), HALVES[-n_widths:]
    player_widths = tuple(
        (low, *(width for width in between if rng.random() < 0.5 or seed % 2 == 0), high) for _ in range(n)
    )
    step_bytes = rng.integers(1, 100, size=sum(map(len, player_widths)) - n)
    capacities = sorted(int(x) for x in rng.integers(0, step_bytes.sum() + 1, size=n_capacities))
    return SearchSpace(player_widths, step_bytes, tuple(capacities), seed)


def all_assignments(space: SearchSpace) -> Assignments:
    return np.array(list(product(*space.player_widths)), dtype=np.float32)


def random_program(space: SearchSpace, seed: int, quadratic: bool = True) -> QuadraticProgram:
    rng, n = np.random.default_rng(seed), space.n_steps
    K = rng.normal(size=(n, n)) * quadratic
    return replace(space.constraint(space.capacities[0]), a=rng.normal(size=n), K=K + K.T)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), n_widths=st.integers(2, 4))
@settings(max_examples=30)
def test_assignments_are_steps_in_order(seed: int, n: int, n_widths: int) -> None:
    space = random_space(seed, n, n_widths)
    assignments = all_assignments(space)
    points = space.steps_down(assignments)
    assert points.shape == (len(assignments), space.n_steps)
    assert np.array_equal(space.assignments(points), assignments)
    for step, player in enumerate(space.player_of_step):
        widths = space.player_widths[player][::-1]
        steps_down = step - int(np.flatnonzero(space.player_of_step == player)[0]) + 1
        down, up = (space.assignments(q[step]) for q in (space.one_player_down(), space.one_player_up()))
        assert down[player] == widths[steps_down]
        assert up[player] == widths[steps_down - 1]
        assert all(down[k] == max(space.player_widths[k]) for k in range(n) if k != player)
        assert all(up[k] == min(space.player_widths[k]) for k in range(n) if k != player)
    loose = space.constraint(int(space.step_bytes.sum()))
    every_q = np.array(list(product([False, True], repeat=space.n_steps)))
    assert {q.tobytes() for q in every_q if loose.is_feasible(q)} == {q.tobytes() for q in points}
    for q in points:
        movable_back, movable_down = loose.movable(q)
        for step in range(space.n_steps):
            flipped = q.copy()
            flipped[step] = not flipped[step]
            assert (movable_back if q[step] else movable_down)[step] == loose.is_feasible(flipped)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), n_widths=st.integers(3, 4), quadratic=st.booleans())
@settings(max_examples=40)
def test_programs_are_solved_to_the_optimum(seed: int, n: int, n_widths: int, quadratic: bool) -> None:
    space = random_space(seed, n, n_widths)
    program = random_program(space, seed, quadratic)
    points = space.steps_down(all_assignments(space))
    lowest = min(program.objective(q) for q in points if program.is_feasible(q))
    allocation = allocate(program)
    assert program.is_feasible(allocation.q)
    assert allocation.objective == pytest.approx(lowest, abs=1e-6)
    assert allocation.bound <= lowest + 1e-6


@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), n_widths=st.integers(3, 4))
@settings(max_examples=40)
def test_descents_keep_budget_and_order(seed: int, n: int, n_widths: int) -> None:
    space, rng = random_space(seed, n, n_widths), np.random.default_rng(seed)
    program = random_program(space, seed)
    start = random_fill(program, rng)
    end = descend(program, start)
    assert program.objective(end) <= program.objective(start)
    for q in (start, end, *neighbours(program, end)):
        assert program.is_feasible(q)
    assert all(program.objective(q) >= program.objective(end) - 1e-9 for q in neighbours(program, end))


def test_descents_regroup_steps_of_unequal_size() -> None:
    # Player 0 gains most by 8 instead of 4 bits, whose bytes all four other players save by 2 instead of 3 bits.
    space = SearchSpace.uniform((2, 3, 4, 8), np.tile([40, 10, 10], 5), (40,))
    a = np.array([[5.0, 1.0, 1.0]] + [[0.1, 0.2, 1.0]] * 4).ravel()
    program = replace(space.constraint(60), a=a)
    start = np.array([[1, 1, 0]] + [[1, 1, 0]] * 4, dtype=bool).ravel()
    assert program.is_feasible(start)
    points = space.steps_down(all_assignments(space))
    best = min(program.objective(q) for q in points if program.is_feasible(q))
    assert program.objective(descend(program, start)) == pytest.approx(best)
    assert program.objective(local_optima(program, start[None], 0, np.random.default_rng(0))[0]) == pytest.approx(best)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_random_assignments_fill_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_bytes = np.cumsum(rng.integers(1, 50, size=(3, 5)), axis=0)
    sizes = Sizes((10,) * 5, dict(zip((2, 4, 8), map(tuple, n_bytes.tolist()), strict=True)))
    limit = int(rng.integers(n_bytes[0].sum(), n_bytes[2].sum() + 1))
    for assignment in random_assignments(sizes, (2, 4, 8), limit, n=3, seed=seed):
        assert sizes.total_bytes(assignment) <= limit
        for player, bits in enumerate(assignment):
            if bits < 8:
                raised = assignment.copy()
                raised[player] = {2: 4, 4: 8}[int(bits)]
                assert sizes.total_bytes(raised) > limit


class Smooth:
    """A game whose errors fall to a quarter with each bit, weighted by player; neighbouring players interact."""

    def __init__(self, n: int, seed: int) -> None:
        self._weights = np.random.default_rng(seed).lognormal(0, 1, n)
        self.n_players = n

    def __call__(self, assignments: Assignments) -> Losses:
        error = self._weights * 4.0 ** (2 - assignments.astype(np.float64))
        return np.tanh(error.sum(axis=1) / 4 + 0.2 * (error[:, 1:] * error[:, :-1]).sum(axis=1))


def space_of_bits(widths: tuple[int, ...], n: int, shares: tuple[float, ...], seed: int = 0) -> SearchSpace:
    """A space of players of one weight each, whose capacities are shares of the bits of all steps."""
    bits = np.tile(np.diff(widths)[::-1], n)
    return SearchSpace.uniform(widths, bits, tuple(int(share * bits.sum()) for share in shares), seed)


def test_active_finds_the_optimum_of_small_games() -> None:
    for seed in range(3):
        for n_widths, n, game in (
            (3, 6, SteppedGame(SyntheticGame(12, "saturating", seed), random_space(0, 6, 3))),
            (4, 5, Smooth(5, seed)),
        ):
            space = space_of_bits(WIDTHS[-n_widths:], n, (0.2, 0.5), seed)
            search, enumeration = run(ActiveSearch(space), game).measured, run(Enumeration(space), game).measured
            assert len(search) < len(enumeration) / 2
            for capacity in space.capacities:
                assert search.lowest(capacity) == pytest.approx(enumeration.lowest(capacity), abs=1e-9)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_greedy_of_many_steps_ends_near_the_optimum_of_a_smooth_game(direction: str) -> None:
    game, rng = Smooth(30, 0), np.random.default_rng(0)
    space = SearchSpace.uniform(WIDTHS, np.tile(np.diff(WIDTHS)[::-1], 30), (60, 100))
    search = run(Greedy.paced(space, direction), game)
    for capacity in space.capacities:
        drawn = space.assignments(np.array([random_fill(space.constraint(capacity), rng) for _ in range(50)]))
        assert game(search.choose(capacity)[None])[0] < game(drawn).min()


def test_one_shot_is_the_optimum_where_steps_add_up() -> None:
    rng = np.random.default_rng(0)
    table = np.sort(rng.random((5, 4)), axis=1)[:, ::-1]  # loss of each player at each width

    class Additive:
        n_players = 5

        def __call__(self, assignments: Assignments) -> Losses:
            return table[np.arange(5), np.searchsorted(HALVES, assignments)].sum(axis=1)

    space = random_space(1, 5, 4, 2)
    best = run(Enumeration(space), Additive()).measured
    for search in (OneShot(space, "high"), OneShot(space, "low"), Regression(space, n_points=200)):
        run(search, Additive())
        for capacity in space.capacities:
            value = float(Additive()(search.choose(capacity)[None])[0])
            assert value == pytest.approx(best.lowest(capacity), abs=0.05 if isinstance(search, Regression) else 1e-9)


@pytest.mark.parametrize("name", names(kind="search", most_widths=None))
def test_searches_keep_every_budget(name: str) -> None:
    for seed in range(3):
        space, no_starts = random_space(seed, 5, 3, 2), np.zeros((0, 5), dtype=np.float32)
        search = run(make_search(get_method(name), space, (no_starts, np.zeros(0))), Smooth(5, seed))
        for capacity in space.capacities:
            assert space.constraint(capacity).is_feasible(space.steps_down(search.choose(capacity)))


@pytest.mark.parametrize("own", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_method_on_a_real_model(own: bool, tmp_path: Path) -> None:
    """Where players have widths of their own, too: two players take as many bytes at 4 bits as at 8."""
    request = Request.from_options(model=str(STORIES), bits=(2, 4, 8), tokens=128, sequence_length=64)
    budgets, solver = [Budget.parse("2.6avg"), Budget.parse("4avg")], SolverSpec()
    with open_session(prepare(request), tmp_path) as session:
        if own:
            every = cached_score(session, METHODS["llm-mq"], sensitivities(session)).gains
            n_bytes = session.sizes.n_bytes
            n_bytes = {**n_bytes, 4: (*n_bytes[8][:2], *n_bytes[4][2:])}
            session = replace(session, sizes=replace(session.sizes, n_bytes=n_bytes))
            assert [len(widths) for widths in session.player_widths] == [2, 2, 3, 3, 3]
            gains = cached_score(session, METHODS["llm-mq"], sensitivities(session)).gains
            assert gains == pytest.approx([*every[:4].reshape(2, 2).sum(axis=1), *every[4:]])
        best = [measure_plan(session, plan).measured_loss for plan in make_plans(session, "exact", budgets, solver)]
        for method in names(most_widths=None):
            for plan, optimum in zip(make_plans(session, method, budgets, solver), best, strict=True):
                plan = measure_plan(session, plan)
                assert plan.bytes <= plan.budget_bytes
                pairs = zip(plan.assignment, session.player_widths, strict=True)
                assert all(bits in widths for bits, widths in pairs)
                assert plan.measured_loss is not None
                assert optimum is not None
                assert plan.measured_loss >= optimum - 1e-12
                if method == "active":
                    assert plan.measured_loss <= optimum + 0.01


@pytest.mark.slow
def test_the_main_job_with_four_widths(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: list[str | Path] = ["quantize", STORIES, "--bits", "8,2,4,3", "--budget", "3.4bpw", *TEXT, "--out", out]
    code, text, err = command(*arguments, "--granularity", "fused", "--json")
    assert code == 0, err
    plan = coopq.Plan.load(out / "plan.json")
    assert json.loads(text)["bytes"] == plan.bytes == SavedModel(out).n_bytes()
    assert plan.bytes <= plan.budget_bytes
    assert len(set(plan.assignment)) >= 3
    assert plan.request.widths.bits == WIDTHS
    again = command(*arguments, "--granularity", "fused", "--json")
    assert again[0] == 0
    assert json.loads(again[1]) == json.loads(text)
    line = refused(*arguments[:5], "3.5avg", *TEXT, "--out", out, "--granularity", "fused")
    assert "another budget" in line


def test_the_main_job_with_widths_between(tmp_path: Path) -> None:
    """Of a model whose rows have ggml's types of 2.5 and 4.5 bits."""
    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = hf.LlamaConfig(vocab_size=512, num_hidden_layers=2, **size, bos_token_id=1, eos_token_id=2)
    save_source(hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32), tmp_path / "model")
    out = tmp_path / "out"
    arguments: list[str | Path] = ["quantize", tmp_path / "model", "--backend", "ggml-iq", "--bits", "2.5,4.5,8"]
    arguments += ["--granularity", "linear", "--fit-tokens", "256", *TEXT, "--budget", "3.5avg", "--out", out]
    code, text, err = command(*arguments)
    assert code == 0, err
    plan = coopq.Plan.load(out / "plan.json")
    assert {2.5, 4.5} <= set(plan.assignment)
    assert 3.4 < plan.average_bits <= 3.5
    assert plan.bytes == SavedModel(out).n_bytes() <= plan.budget_bytes
    assert "2.5, 4.5 and 8 bits by linear" in " ".join(text.split())
    journal = (tmp_path / "out-run" / "journal.jsonl").read_bytes()
    shutil.rmtree(out)
    code, _, err = command(*arguments)
    assert code == 0, err
    assert coopq.Plan.load(out / "plan.json") == plan
    assert (tmp_path / "out-run" / "journal.jsonl").read_bytes() == journal
    tokens = calibration_set(plan.request.text, load_model(str(STORIES)).tokenizer).tokens
    saved = np.concatenate(list(model_nll(coopq.load(out, device="cpu"), tokens))).mean()
    assert saved == pytest.approx(plan.measured_loss, abs=1e-5)


def test_the_main_job_may_leave_players_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: list[str | Path] = ["quantize", STORIES, "--bits", "2,16", "--budget", "8avg", *TEXT]
    code, _, err = command(*arguments, "--out", out)
    assert code == 0, err
    plan = coopq.Plan.load(out / "plan.json")
    assert set(plan.assignment) == {2, 16}
    assert plan.bytes == SavedModel(out).n_bytes() <= plan.budget_bytes
    tensors = load_file(out / "quantized.safetensors")
    untouched = next(name for name, bits in plan.modules.items() if bits == 16)
    assert tensors[f"{untouched}.weight"].dtype == torch.float16
    loaded = load_model(str(STORIES), device="cpu")
    tokens = calibration_set(plan.request.text, loaded.tokenizer).tokens
    saved = np.concatenate(list(model_nll(coopq.load(out, device="cpu"), tokens))).mean()
    assert saved == pytest.approx(plan.measured_loss, abs=1e-5)
    code, _, err = command("apply", out / "plan.json", "--out", tmp_path / "again")
    assert code == 0, err
    again = load_file(tmp_path / "again" / "quantized.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    code, _, err = command(*arguments[:5], "16avg", *TEXT, "--out", tmp_path / "whole")
    assert code == 0, err
    assert set(coopq.Plan.load(tmp_path / "whole" / "plan.json").assignment) == {16}
    line = refused(*arguments[:3], "2,5", *arguments[4:], "--out", tmp_path / "other")
    assert "backend 'rtn' has no 5 bits; it has 2, 3, 4, 8, and 16 for layers that stay as they are" in line


def test_methods_of_two_widths_refuse_more(tmp_path: Path) -> None:
    arguments: list[str | Path] = [STORIES, "--bits", "2,3,4", *TEXT]
    line = refused("quantize", *arguments, "--budget", "3avg", "--out", tmp_path / "out", "--method", "coopq")
    assert "method 'coopq' chooses between 2 widths, and 3 are given; take two, or another method: 'active'" in line
    line = refused("estimate", *arguments, "--run", tmp_path / "run")
    assert "method 'coopq' chooses between 2 widths" in line
    for bits in ("4", "2,4,4"):
        line = refused("quantize", STORIES, "--bits", bits, "--budget", "3avg", "--out", tmp_path / "out")
        assert f"bits = {bits.replace(',', ', ')} are not two or more different widths" in line
