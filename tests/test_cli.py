"""The command line as its users meet it."""

import json
import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from coopq.cli import terminal
from coopq.core.specs import QuantizerSpec, SolverSpec, TargetSpec, option_fields
from coopq.export.checkpoint import SavedModel
from coopq.export.formats import FORMS
from coopq.game.journal import Journal
from coopq.plan.methods import METHODS, names
from coopq.plan.plan import Plan
from tests.command_line import FAST, PAPER, command, in_new_process, refused
from tests.conftest import STORIES


def test_show_for_machines(finished: Path) -> None:
    for target in (finished, finished / "plan.json"):
        code, out, _ = command("show", target, "--json")
        data = json.loads(out)
        assert code == 0
        assert set(data["bits"].values()) <= {2, 4}
        assert list(data["bits"]) == list(data["shapley"]) == list(data["stderr"])
        assert data["status"] == "optimal"
        assert data["gap"] == 0
        assert 0 < data["block_forwards"] < data["block_forwards_unshared"] == 3 * 5 * 5


def test_show_for_people(finished: Path) -> None:
    code, out, _ = command("show", finished.with_name("out-run"))
    assert code == 0
    assert "model.layers.4" in out
    assert "block forwards" in out


def test_several_budgets_from_one_estimation(job: Path) -> None:
    run = job.with_name("out-run")
    code, out, err = command(
        "allocate", run, "--budget", "2.5avg", "--budget", "3.6bpw", "--budget", "255KiB", "--json"
    )
    assert code == 0, err
    plans = json.loads(out)["plans"]
    assert [plan["budget"] for plan in plans] == ["2.5avg", "3.6bpw", "255KiB"]
    assert plans[1]["bits_per_weight"] <= 3.6
    assert plans[2]["bytes"] < plans[2]["file_bytes"] <= 255 * 1024
    line = refused("allocate", run, "--budget", "3.9avg", "--budget", "9avg")
    assert "budget 9avg is infeasible" in line
    assert not (run / "plans" / "3.9avg.json").exists(), "all budgets or none"
    code, out, _ = command("show", run, "--json")
    data = json.loads(out)
    assert set(data["bits"]) == {"3avg", "2.5avg", "3.6bpw", "255KiB"}, "the plan of the one-shot job among them"
    assert data["block_forwards"] > 0


def test_a_plan_is_applied(job: Path) -> None:
    run = job.with_name("out-run")
    assert command("allocate", run, "--budget", "2.5avg")[0] == 0
    out = job.with_name("applied")
    code, text, err = command("apply", run / "plans" / "2.5avg.json", "--out", out)
    assert code == 0, err
    assert "budget 2.5avg by coopq" in text
    assert (out / "quantized.safetensors").is_file()


def test_a_plan_is_deployed_by_another_backend_and_says_so(job: Path) -> None:
    out = job.with_name("deployed")
    code, text, err = command("apply", job / "plan.json", "--out", out, "--backend", "hqq", "--json")
    assert code == 0, err
    data = json.loads(text)
    assert {name: value for name, value in data["deployment"].items() if value is not None} == {"backend": "hqq"}
    assert data["measured_loss"] is None
    assert data["bytes"] != json.loads((job / "plan.json").read_text())["bytes"]
    code, text, err = command("evaluate", out, "--tokens", "256", "--sequence-length", "64", "--json")
    assert code == 0, err
    evaluation = json.loads(text)
    assert evaluation["bytes"] == data["bytes"]
    (row,) = [row for row in evaluation["comparison"] if row["method"] == "coopq"]
    assert row["nll"] == pytest.approx(evaluation["nll"], abs=1e-5), "compared with the backend that was deployed"


@pytest.fixture(scope="module")
def linear_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job whose players are linear layers, with its work beside it."""
    out = tmp_path_factory.mktemp("linear") / "out"
    code, _, err = command("quantize", STORIES, "--budget", "3avg", "--granularity", "linear", "--out", out, *PAPER)
    assert code == 0, err
    return out


def test_linear_layers_get_widths_of_their_own(linear_job: Path) -> None:
    code, text, err = command("show", linear_job, "--json")
    assert code == 0, err
    data = json.loads(text)
    assert len(data["bits"]) == len(data["shapley"]) == 35
    assert any(
        len({data["bits"][f"model.layers.{block}.{name}"] for name in ("self_attn.q_proj", "mlp.up_proj")}) == 2
        for block in range(5)
    ), "widths differ within a block"
    assert 0 < data["block_forwards"] < data["block_forwards_unshared"] == 3 * 35 * 5
    journal = linear_job.with_name("out-run") / "journal.jsonl"
    _, forwards = Journal.peek(journal)
    spent = forwards.sum()
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert records[0]["fingerprint"]["players"]["granularity"] == "linear"
    walked = sum(record["block_forwards"] for record in records[1:-1])  # the last is the plan itself
    assert walked == data["block_forwards"] < spent
    assert SavedModel(linear_job).n_bytes() == data["bytes"]
    assert data["bytes"] <= Plan.load(linear_job / "plan.json").budget_bytes


def test_a_saved_model_of_linear_players_is_judged_as_measured(linear_job: Path) -> None:
    code, out, err = command("evaluate", linear_job, "--tokens", "256", "--sequence-length", "64", "--json")
    assert code == 0, err
    data = json.loads(out)
    (row,) = [row for row in data["comparison"] if row["method"] == "coopq"]
    assert row["nll"] == pytest.approx(data["nll"], abs=1e-5)
    assert data["bytes"] == SavedModel(linear_job).n_bytes()


def test_plans_of_linear_players_are_allocated_and_deployed(linear_job: Path, tmp_path: Path) -> None:
    run = linear_job.with_name("out-run")
    assert command("allocate", run, "--budget", "2.5avg")[0] == 0
    plan, out = run / "plans" / "2.5avg.json", tmp_path / "deployed"
    code, text, err = command("apply", plan, "--out", out, "--backend", "hqq", "--json")
    assert code == 0, err
    data = json.loads(text)
    assert data["bytes"] == SavedModel(out).n_bytes() != Plan.load(plan).bytes
    assert len(data["bits"]) == 35


def test_a_run_keeps_its_granularity(finished: Path, stories: str) -> None:
    run = finished.with_name("out-run")
    line = refused("estimate", stories, "--granularity", "linear", "--run", run, *FAST)
    assert "granularity: 'block' there, 'linear' here" in line


def test_deployment_keeps_the_budget_and_says_what_it_ignores(job: Path) -> None:
    run, out = job.with_name("out-run"), job.with_name("deployed")
    assert command("allocate", run, "--budget", "3.19bpw")[0] == 0
    plan = run / "plans" / "3.19bpw.json"
    assert "but the budget 3.19bpw allows" in refused("apply", plan, "--out", out, "--backend", "hqq")
    assert "goes with a backend" in refused("apply", plan, "--out", out, "--group-size", "32")
    same = command("apply", job / "plan.json", "--out", out, "--backend", "rtn", "--json")
    assert json.loads(same[1])["deployment"] is None


def test_compare_makes_a_table_and_a_figure_and_resumes(tmp_path: Path, stories: str) -> None:
    arguments = ["compare", stories, "--budget", "2.5avg", "--budget", "3avg", "--run", str(tmp_path / "run"), *FAST]
    arguments += ["--judge-tokens", "512", "--judge-length", "128", "--json"]
    code, out, err = command(*arguments)
    assert code == 0, err
    rows = json.loads(out)["comparison"]
    methods = {row["method"] for row in rows if row["budget"] == "2.5avg"}
    searches = {"active", "coopq", "shapley", "interactions"}
    assert methods == searches | {"fisher", *names(is_in_paper=True), "random"}
    assert all(row["average_bits"] <= 2.5 for row in rows if row["budget"] == "2.5avg")
    assert (tmp_path / "run" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "run" / "comparison.svg").read_text()
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    assert command(*arguments)[1] == out
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before


def test_evaluate_compares_under_the_same_budget(finished: Path) -> None:
    code, out, err = command("evaluate", finished, "--tokens", "512", "--sequence-length", "128", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["tokens"] == 4 * 127
    assert data["bytes"] == json.loads((finished / "plan.json").read_text())["bytes"]
    rows = {
        (row["method"], row["average_bits"] if row["method"] == "uniform" else row["budget"]): row
        for row in data["comparison"]
    }
    assert list(rows) == [
        ("original", None),
        ("uniform", 4),
        ("uniform", 2),
        ("coopq", "3avg"),
        ("random", "3avg"),
    ]
    assert rows["coopq", "3avg"]["nll"] == pytest.approx(data["nll"], abs=1e-5)
    assert rows["random", "3avg"]["n"] == 5
    assert rows["random", "3avg"]["average_bits"] <= 3
    journals = list(finished.with_name("out-run").glob("evaluation/*.jsonl"))
    before = [journal.read_bytes() for journal in journals]
    again = command("evaluate", finished, "--tokens", "512", "--sequence-length", "128", "--json")
    assert again[1] == out
    assert [journal.read_bytes() for journal in journals] == before, "nothing is measured again"


def test_evaluate_a_full_precision_model(stories: str) -> None:
    code, out, err = command("evaluate", stories, "--tokens", "512", "--sequence-length", "128")
    assert code == 0, err
    assert "perplexity" in out
    assert "windows of 0 tokens" in refused("evaluate", stories, "--sequence-length", "0")
    code, out, _ = command("evaluate", stories, "--tokens", "512", "--sequence-length", "128", "--json")
    data = json.loads(out)
    assert {"nll", "perplexity", "tokens", "bytes"} <= set(data)


def test_a_finished_job_is_not_repeated(job: Path, stories: str) -> None:
    shutil.rmtree(job.with_name("out-run"))
    code, out, err = command("quantize", stories, "--budget", "3avg", "--out", job, *PAPER)
    assert code == 0, err
    assert "3avg" in out
    assert not job.with_name("out-run").exists()


def test_estimate_then_more_permutations(tmp_path: Path, stories: str) -> None:
    run = tmp_path / "run"
    few = command(
        "estimate", stories, "--run", run, "--tokens", "128", "--sequence-length", "64", "--permutations", "2"
    )
    assert few[0] == 0, few[2]
    before = (run / "journal.jsonl").read_text()
    more = command(
        "estimate", stories, "--run", run, "--tokens", "128", "--sequence-length", "64", "--permutations", "6"
    )
    assert more[0] == 0, more[2]
    assert (run / "journal.jsonl").read_text().startswith(before)
    nine = ["--tokens", "128", "--sequence-length", "64", "--permutations", "9", "--method", "zd"]
    code, _, err = command("quantize", stories, "--budget", "3avg", "--run", run, "--out", tmp_path / "out", *nine)
    assert code == 0, err
    assert "holds no finished estimation" in refused("allocate", run, "--budget", "3avg"), (
        "nine walks were asked for, six are done"
    )
    code, shown, err = command("show", run)
    assert code == 0, err
    assert "zd" in shown


def test_a_folder_named_by_a_dot(finished: Path) -> None:
    code, out, err = in_new_process(
        "evaluate", ".", "--no-compare", "--tokens", "128", "--sequence-length", "64", cwd=finished
    )
    assert code == 0, err
    assert "perplexity" in out
    assert not (finished / "-run").exists()


def test_names_are_printed_as_they_are(tmp_path: Path, stories: str) -> None:
    out = tmp_path / "q[bold]" / "x[/x]"
    code, text, err = command("quantize", stories, "--budget", "3avg", "--out", out, *FAST)
    assert code == 0, err
    assert str(out) in text


def test_help_names_every_command() -> None:
    code, out, _ = in_new_process("--help")
    assert code == 0
    for name in ("quantize", "estimate", "allocate", "apply", "export", "show", "compare", "bench", "evaluate"):
        assert name in out


def test_help_of_quantize_has_a_section_for_each_kind_of_option() -> None:
    code, out, _ = command("quantize", "--help")
    assert code == 0
    titles = ["Goal", "Quantizer", "Widths", "Calibration text", "Search", "Solver", "Target engine"]
    places = [out.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places), "as a user meets them"
    solver = out[places[titles.index("Solver")] : places[titles.index("Target engine")]]
    assert [word for word in solver.split() if word.startswith("--")] == ["--alpha", "--time-limit"]
    for kind in (QuantizerSpec, SolverSpec, TargetSpec):
        for field in option_fields(kind):
            assert len(re.findall(rf"^  --{field.encode_name.replace('_', '-')}\b(?!-)", out, re.M)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "m", "--bugdet", "3avg"], "option --bugdet is unknown; did you mean '--budget'?"),
        (["quantize", "m", "--qqqqqq"], "option --qqqqqq is unknown; `coopq quantize --help` lists all"),
        (["show", "--jsn"], "option --jsn is unknown; did you mean '--json'?"),
        (["export", "m", "--taget", "gguf"], "option --taget is unknown"),
    ],
)
def test_misspelt_options(arguments: list[str], message: str) -> None:
    line = refused(*arguments)
    assert message in line
    assert len(line) < 200


def test_a_misspelt_command_is_one_line() -> None:
    code, out, err = in_new_process("quantise", "m")
    assert (code, out) == (2, "")
    assert err == "error: command 'quantise' is unknown; did you mean 'quantize'?\n"


def test_what_is_missing_is_named(tmp_path: Path, stories: str) -> None:
    assert "--out" in refused("quantize", stories, "--budget", "3avg")
    assert "--to" in refused("export", tmp_path, "--out", tmp_path / "model.gguf")
    assert "MODEL" in refused("quantize", "--budget", "3avg", "--out", tmp_path / "out").upper()
    assert not list(tmp_path.iterdir())


def test_the_methods_are_listed() -> None:
    code, text, err = command("methods")
    assert code == 0, err
    code, out, err = command("methods", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(METHODS)
    for row in rows:
        method = METHODS[row["name"]]
        assert row["summary"] == method.summary
        assert (row["kind"], row["cost"]) == (method.kind, method.cost)
        assert method.name in text


def test_the_targets_are_listed() -> None:
    code, text, err = command("targets")
    assert code == 0, err
    code, out, err = command("targets", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(FORMS)
    assert list(FORMS) == ["gguf", "openvino", "mlx", "compressed-tensors", "auto-round"]
    for row in rows:
        form = FORMS[row["name"]]
        assert (row["engine"], row["summary"], row["backends"]) == (form.engine, form.summary, list(form.backends))
        assert row["name"] in text
        assert all(engine in text for engine in form.engine.split(", "))


def test_without_a_terminal_progress_is_told_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    log = StringIO()
    console = Console(file=log, force_terminal=False)
    monkeypatch.setattr(terminal, "stderr", lambda: console)
    with terminal.progress_bars() as report:
        report("measuring", 1, 3)
        assert "1 of 3" not in log.getvalue()
        monkeypatch.setattr(terminal, "_SECONDS_PER_LINE", 0.0)
        report("measuring", 2, 3)
        assert log.getvalue().endswith("measuring: 2 of 3\n")
        report("searching", 1, 1)
        report("searching", 1, 14)
        assert log.getvalue().endswith("searching: 1 so far\n"), "14 are not all: a search finds more to measure"
    assert re.search(r"searching .* 1/1 ", log.getvalue())
