"""Every method on a real model, small enough for its optimum to be enumerated."""

import json
from pathlib import Path

import numpy as np
import pytest

from coopq.core.errors import EstimationError
from coopq.core.goal import Limit
from coopq.core.sizes import Budget
from coopq.core.specs import Request, SolverSpec
from coopq.core.types import Assignments
from coopq.export.checkpoint import SavedModel
from coopq.game.prepared import prepare
from coopq.game.session import open_session
from coopq.plan.allocate import measure_plan
from coopq.plan.confidence import Confidence, confidence
from coopq.plan.methods import METHODS, Method, get_method, make_plans
from coopq.plan.plan import Plan, load_plans
from coopq.plan.searches.by_search import make_search
from coopq.report.words import score_text
from coopq.search import SearchSpace, run
from coopq.search.synthetic import HIGH, LOW, SyntheticGame
from tests.command_line import command, refused
from tests.conftest import STORIES
from tests.toys import ToySearch

REQUEST = Request.from_options(model=str(STORIES), permutations=4, tokens=256, sequence_length=64)
TEXT: list[str | Path] = ["--tokens", "256", "--sequence-length", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods") / "run"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_plan_that_keeps_its_budget(method: str, folder: Path) -> None:
    with open_session(prepare(REQUEST), folder) as session:
        budgets = [Budget.parse("2.5avg"), Budget.parse("3.3avg")]
        plans, best = (
            [measure_plan(session, plan) for plan in make_plans(session, name, budgets, SolverSpec())]
            for name in (method, "exact")
        )
    for plan, best_plan in zip(plans, best, strict=True):
        optimum = best_plan.measured_loss
        assert plan.method == method
        assert plan.bytes <= plan.budget_bytes
        assert plan.measured_loss is not None
        assert optimum is not None
        assert plan.measured_loss >= optimum - 1e-12
        assert plan.confidence is not None
        assert plan.confidence.stderr is not None
        assert 0 <= plan.block_forwards <= plan.block_forwards_unshared
        assert plan.block_forwards > 0 or method in ("regression", "zd", "zd-two-sided", "first-last"), (
            "these measure nothing new"
        )
        if method in ("active", "exact"):
            assert plan.measured_loss == optimum, "32 assignments are searched wholly"
            assert plan.confidence.probability is not None
            assert plan.confidence.interval is not None
            assert plan.confidence.interval[0] <= (plan.confidence.difference or 0) <= plan.confidence.interval[1]
        if get_method(method).kind == "search":
            assert plan.fidelity is not None
            assert (plan.predicted_loss is None) or get_method(method).trusts_surrogate, "of what was not measured"


@pytest.mark.slow
def test_a_search_of_linear_layers_screened_on_few_sequences(tmp_path: Path) -> None:
    arguments: list[str | Path] = ["quantize", STORIES, "--budget", "3avg", "--granularity", "linear", *TEXT, "--json"]
    whole, screened = tmp_path / "whole", tmp_path / "screened"
    code, out, err = command(*arguments, "--out", whole)
    assert code == 0, err
    thorough = json.loads(out)
    code, out, err = command(*arguments, "--out", screened, "--screen-tokens", "64")
    assert code == 0, err
    quick = json.loads(out)
    assert quick["block_forwards"] < 0.7 * thorough["block_forwards"]
    assert quick["measured_loss"] >= thorough["measured_loss"] - 0.02
    assert (tmp_path / "screened-run" / "screening-1.jsonl").is_file()
    assert command(*arguments, "--out", whole, "--permutations", "7")[0] == 0, "finished, and known to be"
    code, text, _ = command("show", tmp_path / "whole-run")
    assert code == 0
    assert "probability of the choice being better" in text
    assert "left-out error" in text


@pytest.mark.parametrize("method", ["greedy-down", "greedy-up"])
def test_greedy_moves_many_players_several_a_step(method: str) -> None:
    space = SearchSpace.uniform((LOW, HIGH), np.ones(96, dtype=np.int64), (48,))
    game = SyntheticGame(96, "quadratic", 0)
    no_starts = np.zeros((0, 96), dtype=np.float32)
    search = run(make_search(get_method(method), space, (no_starts, np.zeros(0))), game)
    assert len(search.measured) < 96 + 18 * 33, "a third of the players before each of 16 moves of 3 players"
    chosen = search.choose(48)
    assert (chosen == HIGH).sum() == 48
    alone = np.argsort(game.a)[:48]  # the players that cost least alone are lowered
    simple = space.assignments(np.isin(np.arange(96), alone))
    assert game(chosen[None])[0] < game(simple[None])[0]


def test_the_smallest_size_that_keeps_a_loss(tmp_path: Path) -> None:
    budgets = [Budget.parse(f"{average}avg") for average in (2, 2.4, 2.8, 3.2, 3.6, 4)]
    with open_session(prepare(REQUEST), tmp_path / "run") as session:
        front = [measure_plan(session, plan) for plan in make_plans(session, "exact", budgets, SolverSpec())]
    losses = [plan.measured_loss or 0.0 for plan in front]
    assert losses == sorted(losses, reverse=True)
    limit = (losses[2] + losses[3]) / 2
    out = tmp_path / "out"
    arguments: list[str | Path] = ["quantize", STORIES, "--max-loss", f"{limit:.6f}", *TEXT, "--json"]
    code, text, err = command(*arguments, "--out", out)
    assert code == 0, err
    plan = json.loads(text)
    assert plan["measured_loss"] <= limit
    assert plan["bytes"] == SavedModel(out).n_bytes() == front[3].bytes, "the next smaller size is over the limit"
    assert command(*arguments, "--out", out)[1] == text, "finished, and known to be"


class Around(ToySearch):
    """All layers at the highest width, then some with one attention layer lowered, then all at the lowest."""

    n_lowered = 0

    def propose(self) -> Assignments:
        n = self._space.n_steps
        attention = [at for at in range(n) if at % 7 < 4][: self.n_lowered]
        rows = np.concatenate([np.zeros((1, n), dtype=bool), np.eye(n, dtype=bool)[attention], np.ones((1, n), bool)])
        return self._space.assignments(rows[: 0 if len(self.measured) else None])


@pytest.mark.parametrize(("n_lowered", "screen_tokens"), [(12, None), (4, 64)])
def test_the_runner_up_is_found_below_many_that_hardly_differ(
    n_lowered: int, screen_tokens: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "around", Method("around", "search", "around", 1, "tests.test_methods:Around"))
    monkeypatch.setattr(Around, "n_lowered", n_lowered)
    request = REQUEST.replace(granularity="linear", screen_tokens=screen_tokens)
    with open_session(prepare(request), tmp_path / "run") as session:
        (plan,) = make_plans(session, "around", [Budget.parse("4avg")], SolverSpec())
    assert plan.runner_up == (2,) * 35, "the others differ from the choice in one or two layers of attention"


def test_losses_that_cannot_be_kept_and_requests_that_make_no_sense(tmp_path: Path) -> None:
    out: list[str | Path] = ["--out", tmp_path / "out", *TEXT]
    assert "with every player at 4 bits the loss is" in refused("quantize", STORIES, "--max-loss", "0.5", *out)
    assert "give one of size" in refused("quantize", STORIES, "--max-loss", "9", "--budget", "3avg", *out)
    assert "give one of size" in refused("quantize", STORIES, *out)
    assert "cannot search for a loss" in refused("quantize", STORIES, "--max-loss", "9", "--method", "lim", *out)
    assert "is no limit" in refused("quantize", STORIES, "--max-loss", "nan", *out)
    assert "leave --screen-tokens out" in refused("quantize", STORIES, "--max-loss", "9", "--screen-tokens", "64", *out)
    linear: list[str | Path] = ["--budget", "3avg", "--granularity", "linear", "--run", tmp_path / "run"]
    assert "at most 16,384 are enumerated" in refused("quantize", STORIES, *linear, "--method", "exact", *out)
    assert "removes whole blocks" in refused("quantize", STORIES, *linear, "--method", "pruning", *out)
    assert not (tmp_path / "run" / "bank").exists(), "refused before weights are quantized"
    assert "did you mean 'active'" in refused("quantize", STORIES, "--budget", "3avg", "--method", "activ", *out)
    line = refused("quantize", STORIES, "--budget", "3avg", "--screen-tokens", "512", *out)
    assert "screen-tokens = 512 is more than tokens = 256" in line
    assert "not a positive multiple" in refused("quantize", STORIES, "--budget", "3avg", "--screen-tokens", "65", *out)


def test_a_front_from_one_estimation(job: Path) -> None:
    run = job.with_name("out-run")
    code, out, err = command("allocate", run, "--front", "3", "--json")
    assert code == 0, err
    plans = json.loads(out)["plans"]
    assert [plan["budget"] for plan in plans] == ["2.5avg", "3avg", "3.5avg"]
    sizes = [plan["bytes"] for plan in plans]
    assert sizes == sorted(sizes)
    assert "no budget is given" in refused("allocate", run)
    code, out, _ = command("show", run, "--json")
    assert -1 <= json.loads(out)["covariance_correlation"] <= 1


def test_an_allocation_keeps_what_was_measured_of_the_same_assignment(job: Path) -> None:
    run = job.with_name("out-run")
    measured = Plan.load(run / "plans" / "3avg.json")
    assert measured.measured_loss is not None
    for alpha in ("0.5", "0.9"):
        code, _, err = command("allocate", run, "--budget", "3avg", "--alpha", alpha)
        assert code == 0, err
    assert {path.name for path in (run / "plans").iterdir()} == {"3avg.json", "3avg-alpha-0.9.json"}
    again, other = load_plans([run / "plans" / "3avg.json", run / "plans" / "3avg-alpha-0.9.json"])
    assert again.assignment == measured.assignment
    for name in ("measured_loss", "confidence", "runner_up"):
        assert getattr(again, name) == getattr(measured, name)
    assert (other.alpha, other.measured_loss) == (0.9, None)


def test_a_method_without_an_early_answer_takes_no_limit(folder: Path) -> None:
    with open_session(prepare(REQUEST), folder) as session:
        for method in ("lim", "coopq", "exact"):
            with pytest.raises(EstimationError, match="cannot answer before its end"):
                make_plans(session, method, [Budget.parse("3avg")], SolverSpec(), Limit(forwards=9))


def test_confidence_by_hand() -> None:
    chosen, other = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.5, 2.5, 3.5, 4.5])
    sure = confidence(chosen, other)
    assert sure.stderr == pytest.approx(np.sqrt(5 / 3) / 2)
    assert sure.difference == 0.5
    assert sure.interval == (0.5, 0.5)
    assert sure.probability == 1
    assert confidence(chosen, chosen).probability == 0.5
    split = confidence(chosen, chosen + np.array([1.0, -1.0, 1.0, -1.0]))
    assert split.interval == (-1.0, 1.0)
    assert split.probability == pytest.approx(0.5, abs=0.02)
    assert confidence(chosen[:1], None) == Confidence(None, None, None, None)


def test_each_kind_of_score_says_what_it_is() -> None:
    said = {name: score_text(name) for name in METHODS}
    assert said["active"].startswith("rise of the loss if the layer alone goes")
    for name in ("greedy-down", "evopress", "regression", "one-shot-high", "exact", "interactions"):
        assert "a quadratic fitted to the losses" in said[name], name
    assert said["coopq"] == said["shapley"] == "Shapley value: rise of the loss by lowering the layer, nats per token"
    assert "by removing the block" in said["pruning"]
    assert "a unit of its own" in said["hawq"]
