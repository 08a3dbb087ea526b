"""The command line as its users meet it, in its own process, and the one line that each mistake gets."""

import ctypes
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from coopq.cli import main

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 24, 1, 2  # linux/prctl.h, linux/capability.h

FAST = ["--permutations", "3", "--tokens", "128", "--sequence-length", "64"]


def coopq(
    *arguments: str | Path, cwd: Path | None = None, setup: Callable[[], None] | None = None
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    command = [sys.executable, "-m", "coopq.cli", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, preexec_fn=setup, check=False
    )
    return done.returncode, done.stdout, done.stderr


def refused(*arguments: str | Path, setup: Callable[[], None] | None = None) -> str:
    """The one line of a user error; nothing else but progress may be printed.

    In this process, unless it has to be set up otherwise: most mistakes are found faster than libraries are imported.
    """
    if setup is None:
        code, out, err = in_process(*arguments)
    else:
        code, out, err = coopq(*arguments, setup=setup)
    assert code == 2, (code, out, err)
    assert out == ""
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: "), err
    return line


def in_process(*arguments: str | Path) -> tuple[int | str | None, str, str]:
    """The same as `coopq`, without a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["coopq", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        return stop.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    return 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job: out/ holds the model, out-run/ the work."""
    stories = str(Path(__file__).parent / "data" / "stories260k")
    out = tmp_path_factory.mktemp("job") / "out"
    code, _, err = coopq("quantize", stories, "--budget", "3avg", "--out", out, *FAST)
    assert code == 0, err
    return out


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished job to break."""
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(finished.with_name("out-run"), tmp_path / "out-run")
    return tmp_path / "out"


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


# Mistakes. Each gets one line that names the thing and the way out, and loses nothing.


@pytest.mark.parametrize("model", ["no-such/model", "./nowhere", "nothing.gguf"])
def test_an_unknown_model(model: str, tmp_path: Path) -> None:
    line = refused("quantize", model, "--budget", "3avg", "--out", tmp_path / "out", *FAST)
    assert model.removeprefix("./") in line


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "holds no config.json" in refused("quantize", tmp_path, "--budget", "3avg", "--out", tmp_path / "out", *FAST)


def test_a_model_without_blocks(tmp_path: Path, stories: str) -> None:
    import transformers as hf

    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=512, n_embd=16, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(stories) / name, tmp_path / "gpt2")
    line = refused("quantize", tmp_path / "gpt2", "--budget", "3avg", "--out", tmp_path / "out", *FAST)
    assert "looked for one nn.ModuleList of num_hidden_layers = 2" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("short.txt", b"Once upon a time.", "gives 0 sequences of 64 tokens, and 2 are wanted"),
        ("latin.txt", "Il était une fois".encode("latin-1"), "is not UTF-8"),
        ("broken.jsonl", b'{"text": "fine"}\n{"words": 1}\n', "line 2"),
        ("table.csv", b"a,b", "neither .txt nor .jsonl"),
    ],
)
def test_bad_calibration_files(name: str, content: bytes, message: str, tmp_path: Path, stories: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    out = tmp_path / "out"
    assert message in refused("quantize", stories, "--calibration", path, "--budget", "3avg", "--out", out, *FAST)


def test_a_missing_calibration_file(tmp_path: Path, stories: str) -> None:
    arguments: list[str | Path] = ["--calibration", tmp_path / "none.txt", "--out", tmp_path / "out", *FAST]
    arguments += ["--budget", "3avg"]
    assert "no calibration file at" in refused("quantize", stories, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "gptqq"], "backend 'gptqq' is unknown"),
        (["--backend", "quanto", "--bits", "3,4"], "'quanto' has no 3 bits"),
        (["--bits", "5,9"], "'rtn' has no 5 bits"),
        (["--backend", "gptq", "--bits", "3,4"], "'gptq' has no 3 bits"),
        (["--act-order"], "'rtn' has no option act_order"),
        (["--bits", "4"], "is not two widths"),
        (["--bits", "4,4"], "two different widths"),
        (["--budget", "1.5avg"], "the smallest is 2avg"),
        (["--budget", "small"], "'small' cannot be read"),
        (["--tokens", "100"], "not a multiple"),
        (["--tokens", "1024", "--sequence-length", "1024"], "exceed the model's 512 positions"),
        (["--permutations", "1"], "at least 2"),
        (["--time-limit", "-1"], "time limit -1.0 is not a positive number"),
        (["--seed", "-1"], "must not be negative"),
        (["--method", "lmi"], "method 'lmi' is unknown"),
        (["--alpha", "2"], "alpha = 2.0 is not between 0 and 1"),
        (["--device", "warp"], "device 'warp' is not available"),
        (["--dtype", "int3"], "dtype 'int3' is unknown"),
        (["--calibration", "hub:/nowhere/at/all"], "cannot read data set"),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path, stories: str) -> None:
    out = tmp_path / "out"
    assert message in refused("quantize", stories, "--budget", "3avg", "--out", out, *FAST, *options)
    assert not (tmp_path / "out-run" / "journal.jsonl").exists(), "refused before anything is measured"


def test_after_a_mistake_the_same_folder_works(tmp_path: Path, stories: str) -> None:
    out = tmp_path / "out"
    refused("quantize", "no-such/model", "--budget", "3avg", "--out", out, *FAST)
    refused("quantize", stories, "--budget", "9avg", "--out", out, *FAST)
    assert coopq("quantize", stories, "--budget", "3avg", "--out", out, *FAST)[0] == 0


@pytest.mark.parametrize(("backend", "package"), [("hqq", "hqq"), ("quanto", "optimum"), ("gptq", "gptqmodel")])
def test_a_missing_extra_names_the_command_that_installs_it(
    backend: str, package: str, tmp_path: Path, stories: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    # None in sys.modules is what Python itself takes for "not installed".
    (tmp_path / "site" / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    arguments = ["--backend", backend, "--budget", "3avg", "--out", str(tmp_path / "out"), *FAST]
    assert f"pip install 'coopq[{backend}]'" in refused("quantize", stories, *arguments, setup=os.setpgrp)


def test_a_journal_broken_in_the_middle_and_at_its_end(job: Path, stories: str) -> None:
    journal = job.with_name("out-run") / "journal.jsonl"
    whole = journal.read_bytes()
    arguments = ["quantize", stories, "--budget", "2.5avg", "--out", str(job.with_name("other"))]
    arguments += ["--run", str(job.with_name("out-run")), *FAST]
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], b"garbage\n", *lines[3:]]))
    assert "line 3 is broken" in refused(*arguments)
    journal.write_bytes(whole[:-9])
    code, _, err = coopq(*arguments)
    assert code == 0, err
    assert "dropped a last line" in err
    # The value that was lost is measured again, and the plan of 2.5avg, perhaps a new point, once.
    assert set(journal.read_bytes().splitlines()) >= set(lines[0].splitlines() + whole.splitlines()[1:-1])


def test_a_run_of_another_configuration_and_a_journal_of_another_model(job: Path, stories: str, tmp_path: Path) -> None:
    run = job.with_name("out-run")
    out = tmp_path / "other"
    line = refused("quantize", stories, "--budget", "3avg", "--out", out, "--run", run, *FAST, "--backend", "hqq")
    assert "backend: 'rtn' there, 'hqq' here" in line
    # The same name, other weights: the model was trained on.
    from safetensors.torch import load_file, save_file

    changed = shutil.copytree(stories, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(run / "bank")
    before = {path: path.read_bytes() for path in run.rglob("*.json*")}
    line = refused("quantize", changed, "--budget", "3avg", "--out", out, "--run", run, *FAST)
    assert "journal.jsonl was measured on something else (weights:" in line
    assert {path: path.read_bytes() for path in run.rglob("*.json*")} == before
    line = refused("apply", job / "plan.json", "--model", changed, "--out", out)
    assert "the plan was made for another model" in line


def test_things_that_are_no_plan_and_no_run(job: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    assert "is not a plan" in refused("show", tmp_path / "plan.json")
    assert "no plan at" in refused("show", tmp_path / "none.json")
    for content in ("[]", "nonsense", "3"):
        (tmp_path / "plan.json").write_text(content)
        assert "is not a plan" in refused("show", tmp_path / "plan.json")
    (tmp_path / "empty").mkdir()
    assert "is not a run folder" in refused("show", tmp_path / "empty")
    assert "is not a run folder" in refused("allocate", tmp_path / "empty", "--budget", "3avg")
    plan = json.loads((job / "plan.json").read_text())
    changes: list[dict[str, object]] = [{"config": {}}, {"players": [{"name": "x"}]}]
    for change in changes:
        (tmp_path / "plan.json").write_text(json.dumps(plan | change))
        assert "is not a complete plan" in refused("show", tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"format_version": 99}))
    assert "plan format 99" in refused("show", tmp_path / "plan.json")
    estimate = job.with_name("out-run") / "estimate.json"
    for content, message in (('{"format_version": 1}', "is not complete"), ("{", "is not readable as JSON")):
        estimate.write_text(content)
        assert message in refused("show", job.with_name("out-run"))
    estimate.unlink()
    assert "is not finished" in refused("allocate", job.with_name("out-run"), "--budget", "3avg")


def test_an_output_folder_that_is_not_empty(job: Path, tmp_path: Path, stories: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("my only copy")
    line = refused("quantize", stories, "--budget", "3avg", "--out", tmp_path / "mine", *FAST)
    assert "is not empty" in line
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "my only copy"
    assert "another budget" in refused("quantize", stories, "--budget", "3.5avg", "--out", job, *FAST)
    assert "is not empty" in refused("apply", job / "plan.json", "--out", job)
    assert "is a file" in refused("apply", job / "plan.json", "--out", tmp_path / "mine" / "thesis.txt")


def test_no_permission_to_write(stories: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        locked = Path(place) / "locked"
        locked.mkdir(mode=0o555)

        def obey_permissions() -> None:
            if os.getuid() == 0:  # root may write anywhere, unless it gives that up
                for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
                    assert ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0

        line = refused("quantize", stories, "--budget", "3avg", "--out", locked / "out", *FAST, setup=obey_permissions)
        assert "cannot write to" in line
        assert "Permission denied" in line


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, stories: str) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    arguments = ["quantize", stories, "--budget", "3avg", "--out", str(out), "--run", str(run), *FAST]
    arguments[arguments.index("3")] = "12"  # walks, for a journal of some length
    whole = coopq(*arguments[:5], str(tmp_path / "whole"), *FAST[2:], "--permutations", "12")
    assert whole[0] == 0, whole[2]
    shutil.copytree(tmp_path / "whole-run" / "bank", run / "bank")

    def short_files() -> None:
        # The kernel refuses longer files, as it does on a full disk: the journal breaks off in the middle.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    line = refused(*arguments, setup=short_files)
    assert "nothing computed is lost" in line
    assert not out.exists()
    kept = [
        record for record in (run / "journal.jsonl").read_bytes().splitlines(keepends=True) if record.endswith(b"\n")
    ]
    assert len(kept) > 3, "values were measured before the disk was full"
    code, _, err = coopq(*arguments)
    assert code == 0, err
    assert (run / "journal.jsonl").read_bytes().startswith(b"".join(kept))
    assert (out / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()


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


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    code, _, err = coopq("show", tmp_path / "none.json", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_help_names_every_command() -> None:
    code, out, _ = coopq("--help")
    assert code == 0
    for command in ("quantize", "estimate", "allocate", "apply", "compare", "evaluate", "show"):
        assert command in out
