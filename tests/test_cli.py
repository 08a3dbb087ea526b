"""The command line as its users meet it, in its own process."""

import json
import shutil
from pathlib import Path

import pytest

from tests.command_line import FAST, coopq, refused


def test_show_for_machines(finished: Path) -> None:
    for target in (finished, finished / "plan.json"):
        code, out, _ = coopq("show", target, "--json")
        data = json.loads(out)
        assert code == 0
        assert set(data["bits"].values()) <= {2, 4}
        assert list(data["bits"]) == list(data["shapley"]) == list(data["stderr"])
        assert data["status"] == "optimal"
        assert data["gap"] == 0
        assert 0 < data["layer_forwards"] < data["layer_forwards_unshared"] == 3 * 5 * 5


def test_show_for_people(finished: Path) -> None:
    code, out, _ = coopq("show", finished.with_name("out-run"))
    assert code == 0
    assert "model.layers.4" in out
    assert "layer forwards" in out


def test_several_budgets_from_one_estimation(job: Path) -> None:
    run = job.with_name("out-run")
    code, out, err = coopq("allocate", run, "--budget", "2.5avg", "--budget", "3.6bpw", "--budget", "95KiB", "--json")
    assert code == 0, err
    plans = json.loads(out)["plans"]
    assert [plan["budget"] for plan in plans] == ["2.5avg", "3.6bpw", "95KiB"]
    assert plans[1]["bits_per_weight"] <= 3.6
    assert plans[2]["bytes"] <= 95 * 1024
    line = refused("allocate", run, "--budget", "3.9avg", "--budget", "9avg")
    assert "budget 9avg is infeasible" in line
    assert not (run / "plans" / "3.9avg.json").exists(), "all budgets or none"
    code, out, _ = coopq("show", run, "--json")
    data = json.loads(out)
    assert set(data["bits"]) == {"3avg", "2.5avg", "3.6bpw", "95KiB"}, "the plan of the one-shot job among them"
    assert data["layer_forwards"] > 0


def test_a_plan_is_applied(job: Path, stories: str) -> None:
    run = job.with_name("out-run")
    assert coopq("allocate", run, "--budget", "2.5avg")[0] == 0
    out = job.with_name("applied")
    code, text, err = coopq("apply", run / "plans" / "2.5avg.json", "--out", out)
    assert code == 0, err
    assert "budget 2.5avg by coopq" in text
    assert (out / "quantized.safetensors").is_file()


def test_a_plan_is_deployed_by_another_backend_and_says_so(job: Path) -> None:
    out = job.with_name("deployed")
    code, text, err = coopq("apply", job / "plan.json", "--out", out, "--backend", "hqq", "--json")
    assert code == 0, err
    data = json.loads(text)
    assert data["deployment"] == {"name": "hqq", "group_size": None, "act_order": None, "symmetric": None}
    assert data["measured_loss"] is None
    assert data["bytes"] != json.loads((job / "plan.json").read_text())["bytes"]
    code, text, err = coopq("evaluate", out, "--tokens", "256", "--sequence-length", "64", "--json")
    assert code == 0, err
    evaluation = json.loads(text)
    assert evaluation["bytes"] == data["bytes"]
    (row,) = [row for row in evaluation["comparison"] if row["method"] == "coopq"]
    assert row["nll"] == pytest.approx(evaluation["nll"], abs=1e-5), "compared with the backend that was deployed"


def test_deployment_keeps_the_budget_and_says_what_it_ignores(job: Path) -> None:
    run, out = job.with_name("out-run"), job.with_name("deployed")
    assert coopq("allocate", run, "--budget", "3.19bpw")[0] == 0
    plan = run / "plans" / "3.19bpw.json"
    assert "its budget 3.19bpw is" in refused("apply", plan, "--out", out, "--backend", "hqq")
    assert "goes with a backend" in refused("apply", plan, "--out", out, "--group-size", "32")
    same = coopq("apply", job / "plan.json", "--out", out, "--backend", "rtn", "--json")
    assert json.loads(same[1])["deployment"] is None


def test_compare_makes_a_table_and_a_figure_and_resumes(tmp_path: Path, stories: str) -> None:
    arguments = ["compare", stories, "--budget", "2.5avg", "--budget", "3avg", "--run", str(tmp_path / "run"), *FAST]
    arguments += ["--judge-tokens", "512", "--judge-length", "128", "--json"]
    code, out, err = coopq(*arguments)
    assert code == 0, err
    rows = json.loads(out)["comparison"]
    methods = {row["method"] for row in rows if row["budget"] == "2.5avg"}
    assert methods == {"coopq", "llm-mq", "llm-mq-block", "lim", "zd", "zd-two-sided", "activation", "random"}
    assert all(row["average_bits"] <= 2.5 for row in rows if row["budget"] == "2.5avg")
    assert (tmp_path / "run" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "run" / "comparison.svg").read_text()
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    assert coopq(*arguments)[1] == out
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before


def test_evaluate_compares_under_the_same_budget(finished: Path) -> None:
    code, out, err = coopq("evaluate", finished, "--tokens", "512", "--sequence-length", "128", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["tokens"] == 4 * 127
    assert data["bytes"] == json.loads((finished / "plan.json").read_text())["bytes"]
    rows = {
        (row["method"], row["average_bits"] if row["method"] == "uniform" else row["budget"]): row
        for row in data["comparison"]
    }
    assert list(rows) == [
        ("full precision", None),
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
    again = coopq("evaluate", finished, "--tokens", "512", "--sequence-length", "128", "--json")
    assert again[1] == out
    assert [journal.read_bytes() for journal in journals] == before, "nothing is measured again"


def test_evaluate_a_full_precision_model(stories: str) -> None:
    code, out, err = coopq("evaluate", stories, "--tokens", "512", "--sequence-length", "128")
    assert code == 0, err
    assert "perplexity" in out
    assert "cannot be scored" in refused("evaluate", stories, "--sequence-length", "0")
    code, out, _ = coopq("evaluate", stories, "--tokens", "512", "--sequence-length", "128", "--json")
    data = json.loads(out)
    assert {"nll", "perplexity", "tokens", "bytes"} <= set(data)


def test_a_finished_job_is_not_repeated(job: Path, stories: str, finished: Path) -> None:
    shutil.rmtree(job.with_name("out-run"))
    code, out, err = coopq("quantize", stories, "--budget", "3avg", "--out", job, *FAST)
    assert code == 0, err
    assert "3avg" in out
    assert not job.with_name("out-run").exists()


def test_estimate_then_more_permutations(tmp_path: Path, stories: str) -> None:
    run = tmp_path / "run"
    few = coopq("estimate", stories, "--run", run, "--tokens", "128", "--sequence-length", "64", "--permutations", "2")
    assert few[0] == 0, few[2]
    before = (run / "journal.jsonl").read_text()
    more = coopq("estimate", stories, "--run", run, "--tokens", "128", "--sequence-length", "64", "--permutations", "6")
    assert more[0] == 0, more[2]
    assert (run / "journal.jsonl").read_text().startswith(before)
    record = json.loads((run / "run.json").read_text())
    record["config"]["permutations"] = 9
    (run / "run.json").write_text(json.dumps(record))
    assert "is not finished" in refused("allocate", run, "--budget", "3avg"), "nine walks were asked for, six are done"


def test_a_folder_named_by_a_dot(finished: Path) -> None:
    code, out, err = coopq("evaluate", ".", "--no-compare", "--tokens", "128", "--sequence-length", "64", cwd=finished)
    assert code == 0, err
    assert "perplexity" in out
    assert not (finished / "-run").exists()


def test_names_are_printed_as_they_are(tmp_path: Path, stories: str) -> None:
    out = tmp_path / "q[bold]" / "x[/x]"
    code, text, err = coopq("quantize", stories, "--budget", "3avg", "--out", out, *FAST)
    assert code == 0, err
    assert str(out) in text


def test_help_names_every_command() -> None:
    code, out, _ = coopq("--help")
    assert code == 0
    for command in ("quantize", "estimate", "allocate", "apply", "compare", "evaluate", "show"):
        assert command in out
