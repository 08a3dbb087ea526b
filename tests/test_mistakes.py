"""Mistakes and mishaps: each gets one line that names the thing and the way out, and loses nothing."""

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import FAST, PAPER, command, in_new_process, interruptible, refused

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 24, 1, 2  # linux/prctl.h, linux/capability.h


@pytest.mark.parametrize("model", ["no-such/model", "./nowhere", "nothing.gguf"])
def test_an_unknown_model(model: str, tmp_path: Path) -> None:
    line = refused("quantize", model, "--budget", "3avg", "--out", tmp_path / "out", *FAST)
    assert model.removeprefix("./") in line


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A proxy that refuses everything, and that new processes ask for the hub."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):  # the server is closed
                while True:
                    with server.accept()[0] as caller:
                        caller.recv(4096)
                        caller.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield


@pytest.mark.usefixtures("proxy")
def test_a_hub_behind_a_proxy_that_refuses(tmp_path: Path, stories: str) -> None:
    def refusal(*arguments: str) -> str:
        return refused(
            "quantize", *arguments, "--budget", "3avg", "--out", tmp_path / "out", *FAST, setup=interruptible
        )

    assert "cannot reach the hub for model 'nobody/nothing' (403 Forbidden)" in refusal("nobody/nothing")
    if importlib.util.find_spec("datasets") is not None:
        message = refusal(stories, "--calibration", "hub:nobody/nothing")
        assert "cannot read data set 'nobody/nothing' (ProxyError: 403 Forbidden)" in message


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "holds no config.json" in refused("quantize", folder, "--budget", "3avg", "--out", tmp_path / "out", *FAST)


def test_a_model_without_linear_modules(tmp_path: Path, stories: str) -> None:
    import transformers as hf

    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=512, n_embd=16, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(stories) / name, tmp_path / "gpt2")
    code, _, err = command("quantize", tmp_path / "gpt2", "--budget", "3avg", "--out", tmp_path / "out", *FAST)
    assert code == 0, err  # its projections are no nn.Linear, and stored transposed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("short.txt", b"Once upon a time.", "gives 0 sequences of 64 tokens, and 2 are needed"),
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
    assert "no text file at" in refused("quantize", stories, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "gptqq"], "backend 'gptqq' is unknown"),
        (["--backend", "quanto", "--bits", "3,4"], "'quanto' has no 3 bits"),
        (["--bits", "5,9"], "'rtn' has no 5 bits"),
        (["--bits", "2.5,4"], "'rtn' has no 2.5 bits; it has 2, 3, 4, 8"),
        (["--backend", "gptq", "--bits", "3,4"], "'gptq' has no 3 bits"),
        (["--backend", "gptq-static", "--bits", "2,4", "--group-size", "48"], "no group size 48; choose from 16, 32"),
        (["--act-order"], "'rtn' has no option act-order"),
        (["--backend", "hqq", "--fit-tokens", "512"], "'hqq' fits its weights to no text; leave --fit-tokens out"),
        (["--backend", "autoround", "--act-order"], "'autoround' has no option act-order"),
        (["--backend", "autoround", "--group-size", "32"], "weights unquantized: sides must be multiples of 32"),
        (["--bits", "4"], "bits = 4 are not two or more different widths; write 2,4"),
        (["--bits", "two,4"], "bits = 'two,4' are not widths with commas between; write 2,4"),
        (["--bits", "4,4"], "bits = 4, 4 are not two or more different widths"),
        (["--budget", "1.5avg"], "the smallest is 2avg"),
        (["--budget", "small"], "'small' cannot be read"),
        (["--tokens", "100"], "tokens = 100 is not a positive multiple of sequence-length = 64"),
        (["--tokens", "1024", "--sequence-length", "1024"], "exceed the model's 512 positions"),
        (["--permutations", "1"], "permutations = 1 does not fit: expected int >= 2"),
        (["--time-limit", "-1"], "time-limit = -1.0 is not a positive number of seconds; leave it out"),
        (["--granularity", "head"], "granularity = 'head' does not fit: choose from block, fused, linear"),
        (["--loss", "kld"], "loss = 'kld' does not fit: choose from nll, kl"),
        (["--seed", "-1"], "seed = -1 does not fit: expected int >= 0"),
        (["--context", "0"], "context = 0 is not a number of tokens"),
        (["--target", "ggfu"], "'ggfu' is unknown; did you mean 'gguf'?"),
        (["--method", "lmi"], "method 'lmi' is unknown; did you mean 'lim'?"),
        (["--alpha", "2"], "alpha = 2.0 does not fit: expected float <= 1"),
        (["--device", "warp"], "device 'warp' is not available"),
        (["--dtype", "int3"], "dtype = 'int3' does not fit: choose from auto, float32, bfloat16, float16"),
        (["--calibration", "hub:/nowhere/at/all"], "cannot read data set"),
        (["--calibration", "hub:"], "'hub:' names no data set; write hub:NAME or hub:NAME:CONFIGURATION"),
        (["--calibration", "hub:a:b:c:d"], "'hub:a:b:c:d' names no data set"),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path, stories: str) -> None:
    out = tmp_path / "out"
    assert message in refused("quantize", stories, "--budget", "3avg", "--out", out, *FAST, *options)
    assert not (tmp_path / "out-run" / "journal.jsonl").exists(), "refused before anything is measured"


def test_judging_windows_that_are_too_long(tmp_path: Path, stories: str) -> None:
    said = refused("compare", stories, "--judge-length", "600", "--budget", "3avg", "--run", tmp_path / "run", *FAST)
    assert "sequences of 600 tokens exceed the model's 512 positions" in said
    assert not (tmp_path / "run" / "bank").exists(), "refused before anything is quantized"


def test_after_a_mistake_the_same_folder_works(tmp_path: Path, stories: str) -> None:
    out = tmp_path / "out"
    refused("quantize", "no-such/model", "--budget", "3avg", "--out", out, *FAST)
    refused("quantize", stories, "--budget", "9avg", "--out", out, *FAST)
    assert command("quantize", stories, "--budget", "3avg", "--out", out, *FAST)[0] == 0


@pytest.mark.parametrize(
    ("backend", "package"), [("hqq", "hqq"), ("quanto", "optimum"), ("gptq", "gptqmodel"), ("autoround", "auto_round")]
)
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
    code, _, err = in_new_process(*arguments)
    assert code == 0, err
    assert "the last line is not whole (the line has no end) and is skipped" in err
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
    changes: list[dict[str, object]] = [{"request": {}}, {"players": [{"name": "x"}]}, {"colour": "blue"}]
    for change in changes:
        (tmp_path / "plan.json").write_text(json.dumps(plan | change))
        line = refused("show", tmp_path / "plan.json")
        assert "is not a complete plan" in line
        assert line.endswith("repeat the command that made it")
    estimate = job.with_name("out-run") / "estimate.json"
    record = json.loads(estimate.read_text())
    del record["estimate"]
    for content, message in (
        (json.dumps(record), "estimate.json is not a complete record of an estimation"),
        ("{", "estimate.json is not a"),
    ):
        estimate.write_text(content)
        line = refused("show", job.with_name("out-run"))
        assert message in line
        assert line.endswith("use another run folder")
    estimate.unlink()
    assert "holds no finished estimation" in refused("allocate", job.with_name("out-run"), "--budget", "3avg")


@pytest.mark.parametrize("version", [1, 99])
def test_files_of_another_format_are_refused_in_one_line(version: int, job: Path, tmp_path: Path, stories: str) -> None:
    run = job.with_name("out-run")

    def line_for(path: Path, *arguments: str | Path) -> str:
        """What is said if `path` has the other format, which is put right again."""
        content = path.read_text()
        first, newline, rest = content.partition("\n") if path.suffix == ".jsonl" else (content, "", "")
        path.write_text(json.dumps(json.loads(first) | {"format_version": version}) + newline + rest)
        line = refused(*arguments)
        assert str(path) in line
        assert re.search(r"reads \d;", line), "the format that is read"
        path.write_text(content)
        return line

    show: tuple[str | Path, ...] = ("show", run)
    allocate: tuple[str | Path, ...] = ("allocate", run, "--budget", "2.5avg")
    other = tmp_path / "other"
    again: tuple[str | Path, ...] = ("quantize", stories, "--budget", "2.5avg", "--out", other, "--run", run, *PAPER)
    assert f"has plan format {version}" in line_for(job / "plan.json", "show", job)
    assert "repeat the command that made it" in line_for(run / "plans" / "3avg.json", *show)
    for arguments in (show, allocate, again):
        assert "use another run folder" in line_for(run / "run.json", *arguments)
    for arguments in (show, allocate):
        assert "use another run folder" in line_for(run / "estimate.json", *arguments)
    line = line_for(run / "journal.jsonl", *again)
    assert f"has format {version}" in line
    assert "use another run folder" in line
    assert not other.exists()


def test_an_output_folder_that_is_not_empty(job: Path, tmp_path: Path, stories: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("my only copy")
    line = refused("quantize", stories, "--budget", "3avg", "--out", tmp_path / "mine", *FAST)
    assert "is not empty" in line
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "my only copy"
    assert "another budget" in refused("quantize", stories, "--budget", "3.5avg", "--out", job, *PAPER)
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
    walks = [*PAPER, "--permutations", "12"]  # for a journal of some length
    arguments = ["quantize", stories, "--budget", "3avg", "--out", str(out), "--run", str(run), *walks]
    whole = command(*arguments[:5], str(tmp_path / "whole"), *walks)
    assert whole[0] == 0, whole[2]
    shutil.copytree(tmp_path / "whole-run" / "bank", run / "bank")

    def short_files() -> None:
        # The kernel refuses longer files, as it does on a full disk: the journal breaks off in the middle.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2600, 2600))

    line = refused(*arguments, setup=short_files)
    assert "nothing computed is lost" in line
    assert not out.exists()
    kept = [
        record for record in (run / "journal.jsonl").read_bytes().splitlines(keepends=True) if record.endswith(b"\n")
    ]
    assert len(kept) > 3, "values were measured before the disk was full"
    code, _, err = command(*arguments)
    assert code == 0, err
    assert (run / "journal.jsonl").read_bytes().startswith(b"".join(kept))
    assert (out / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    code, _, err = command("show", tmp_path / "none.json", "--debug")
    assert code == 2
    assert "Traceback" in err
