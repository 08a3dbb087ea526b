"""Files that were damaged or edited: each is refused in one line, and none changes an answer without a word."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coopq.core.errors import BudgetError, CalibrationError, CoopQError, EstimationError, PlanError, RunError
from coopq.core.files import checksum, read_json, read_record, write_record
from coopq.core.sizes import Budget, Sizes
from coopq.core.specs import QuantizerSpec, Request, TextSpec
from coopq.core.subject import SizedRequest
from coopq.core.types import LinearLayer, Player, Width
from coopq.game.journal import Journal
from coopq.judge.bench.config import read_bench
from coopq.judge.evaluation import window_length
from coopq.judge.zero_shot import _from_file
from coopq.model.load import load_model
from coopq.model.texts import calibration_set
from coopq.plan.estimation import load_estimation
from coopq.plan.methods import check_methods
from coopq.plan.plan import Plan
from coopq.plan.searches.search_log import SearchLog
from coopq.quantizers import get_backend
from tests.command_line import FAST, command, refused

Change = Callable[[dict[str, Any]], object]

BROKEN = [
    b"",
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"format_version": NaN}',
    b'{"format_version": 1e999}',
    b"1" * 5000,
    b"[]",
]
PLAN: list[tuple[str, Change]] = [
    ("module .* belongs to two players", lambda plan: plan["players"][1].update(modules=plan["players"][0]["modules"])),
    ("70 bits are no width", lambda plan: plan["players"][0].update(bits=70)),
    ("bytes of a budget", lambda plan: plan.update(bytes=plan["budget_bytes"] + 1)),
    ("bytes of a budget", lambda plan: plan.update(bytes=-1)),
    ("its runner-up has 1 players", lambda plan: plan.update(runner_up=[2])),
    ("players are untouched", lambda plan: plan.update(untouched_bytes=5)),
    ("not the average", lambda plan: plan.update(average_bits=8.5)),
    ("do not add up", lambda plan: plan["players"][0].update(n_bytes={})),
    ("it has no modules", lambda plan: plan.update(players=[])),
    ("negative", lambda plan: plan.update(block_forwards=-3)),
]


def rewrite(path: Path, change: Change, *, mend: bool) -> None:
    """Change a record; with `mend` its checksum fits, as if a wrong program had written it."""
    record = json.loads(path.read_text())
    change(record)
    data = {key: value for key, value in record.items() if key not in ("format_version", "checksum")}
    path.write_text(json.dumps(record | ({"checksum": checksum(data)} if mend else {})))


@pytest.mark.parametrize("content", BROKEN)
def test_broken_bytes_are_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match="repeat the command that made it") as error:
        Plan.load(path)
    assert len(str(error.value)) < 400
    if content != b"[]" and not content.startswith(b"1"):
        with pytest.raises(RunError, match="is not readable as JSON"):
            read_json(path)


@pytest.mark.parametrize(("message", "change"), PLAN)
def test_a_plan_that_contradicts_itself(message: str, change: Change, job: Path) -> None:
    rewrite(job / "plan.json", change, mend=True)
    with pytest.raises(PlanError, match=message):
        Plan.load(job / "plan.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(measured_loss=1.0),
        lambda plan: plan["players"][0].update(bits=2 if plan["players"][0]["bits"] == 4 else 4),
        lambda plan: plan["fingerprint"].update(weights="0"),
        lambda plan: plan.pop("checksum"),
    ],
)
def test_a_plan_that_was_edited(change: Change, job: Path) -> None:
    rewrite(job / "plan.json", change, mend=False)
    line = refused("show", job)
    assert "was changed after it was written" in line
    assert line.endswith("repeat the command that made it")


def test_white_space_and_the_order_of_keys_change_nothing(job: Path) -> None:
    plan = Plan.load(job / "plan.json")
    record = json.loads((job / "plan.json").read_text())
    (job / "plan.json").write_text(json.dumps(dict(reversed(record.items())), indent=7))
    assert Plan.load(job / "plan.json") == plan


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["estimate"]["shapley"].pop(),
        lambda record: record["estimate"]["covariance"][0].append(0.0),
        lambda record: record["estimate"].update(shapley="many"),
        lambda record: record["bytes"].update({"2": [1]}),
        lambda record: record["bytes"].pop("4"),
        lambda record: record["bytes"].update({"two": record["bytes"]["2"]}),
        lambda record: record.update(fixed=-1),
        lambda record: record["players"][0]["linears"][0].update(shape=[0, 0]),
    ],
)
def test_an_estimation_whose_parts_do_not_fit(change: Change, job: Path) -> None:
    run = job.with_name("out-run")
    rewrite(run / "estimate.json", change, mend=True)
    with pytest.raises(RunError, match=r"is not a complete record of an estimation .*; use another run folder"):
        load_estimation(run)


def test_an_edited_estimation_and_request(job: Path) -> None:
    run = job.with_name("out-run")
    for name in ("estimate.json", "run.json"):
        whole = (run / name).read_text()
        (run / name).write_text(whole.replace('"tokens": 128', '"tokens": 192', 1))
        assert "was changed after it was written" in refused("allocate", run, "--budget", "2.5avg")
        (run / name).write_text(whole)


@pytest.mark.parametrize("known", ['{"a": [1, "x"]}', '{"a": [-1, "x"]}', '{"a": "x"}', "[" * 100_000])
def test_a_damaged_search_log(known: str, tmp_path: Path) -> None:
    (tmp_path / "searches.json").write_text(f'{{"format_version": 2, "searches": {known}}}')
    with pytest.raises(RunError, match="restore the file from a copy, or use another run folder"):
        SearchLog(tmp_path)


def test_a_search_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    SearchLog(tmp_path).begin_with_nothing("active")
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        journal.append(np.array([2, 4], dtype=np.float32), np.array([1.0]), 2)
        assert SearchLog(tmp_path).n_known("active", journal) == 0
        assert SearchLog(tmp_path).n_known("other", journal) == 1


def test_a_damaged_score(tmp_path: Path, stories: str) -> None:
    arguments: list[str | Path] = ["--budget", "3avg", "--method", "lim", "--run", tmp_path / "run", *FAST]
    assert command("quantize", stories, *arguments, "--out", tmp_path / "a")[0] == 0
    rewrite(tmp_path / "run" / "scores" / "lim.json", lambda record: record["gains"].reverse(), mend=False)
    line = refused("quantize", stories, *arguments, "--out", tmp_path / "b")
    assert "lim.json was changed after it was written" in line
    assert line.endswith("delete it, and run the same command again")


def test_a_record_keeps_a_long_version_short(tmp_path: Path) -> None:
    write_record(tmp_path / "x.json", {"a": 1}, 1)
    rewrite(tmp_path / "x.json", lambda record: record.update(format_version="9" * 5000), mend=False)
    with pytest.raises(RunError) as error:
        read_record(
            tmp_path / "x.json", dict[str, int], 1, what="record", missing="", way_out="delete it", error=RunError
        )
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", ["9" * 5000 + "avg", "1e3avg", "\u0663avg", "nanavg", "-3avg", "0x3avg", "3,5avg"])
def test_budgets_that_are_no_numbers(text: str) -> None:
    with pytest.raises(BudgetError, match="cannot be read; write average bits") as error:
        Budget.parse(text)
    assert len(str(error.value)) < 300


def test_a_byte_order_mark_is_no_text(tmp_path: Path, stories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_model(stories).tokenizer
    story = "Once upon a time there was a little dog. " * 40
    (tmp_path / "story.txt").write_text(story, encoding="utf-8")
    (tmp_path / "marked.txt").write_text(story, encoding="utf-8-sig")
    (tmp_path / "marked.jsonl").write_text(json.dumps({"text": story}) + "\n", encoding="utf-8-sig")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = {
        calibration_set(TextSpec(source=name, tokens=128, sequence_length=64), tokenizer).fingerprint
        for name in ("~/story.txt", str(tmp_path / "marked.txt"), "~/marked.jsonl")
    }
    assert len(found) == 1


@pytest.mark.parametrize("line", ['{"text": 3}', '{"text": null}', "[]", "[" * 100_000, '{"text": "\\ud800"}x', "NaN"])
def test_lines_that_are_no_documents(line: str, tmp_path: Path, stories: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match="line 2: not a JSON object with a field 'text'"):
        calibration_set(TextSpec(source=str(path), tokens=128, sequence_length=64), load_model(stories).tokenizer)


def test_gptq_wants_sequences_that_its_library_keeps() -> None:
    if importlib.util.find_spec("gptqmodel") is None:  # importing it would change this process
        pytest.skip("needs gptqmodel")
    gptq = get_backend(QuantizerSpec(backend="gptq"), (4,))
    with pytest.raises(CoopQError, match=r"at least 11 tokens, and sequence-length = 2; .* --fit-tokens"):
        gptq.check_text(TextSpec(tokens=4, sequence_length=2, fit_tokens=4))
    gptq.check_text(TextSpec(tokens=22, sequence_length=11, fit_tokens=22))


def _asked(*players: Player) -> SizedRequest:
    n_bytes: dict[Width, tuple[int, ...]] = {2: (1,) * len(players), 4: (2,) * len(players)}
    return SizedRequest(Request.from_options(model="none"), players, Sizes((4,) * len(players), n_bytes))


def test_methods_that_watch_outputs_and_experts() -> None:
    plain = Player("b.0", (LinearLayer("b.0.up", (4, 4)),), 0)
    experts = Player("b.1", (LinearLayer("b.1.experts.down", (16, 4), is_plain=False, n_experts=4),), 1)
    check_methods(["auto-quantize", "fisher", "lim"], _asked(plain))
    with pytest.raises(EstimationError, match=r"b\.1\.experts\.down holds several experts; take another method"):
        check_methods(["fisher"], _asked(plain, experts))
    check_methods(["lim", "active", "auto-quantize"], _asked(plain, experts))


def test_scores_tell_how_far_they_are(stories: str, tmp_path: Path) -> None:
    from coopq.game.prepared import prepare
    from coopq.game.session import open_session
    from coopq.plan.by_score import cached_score, sensitivities
    from coopq.plan.methods import METHODS

    told: list[tuple[str, int, int]] = []
    request = Request.from_options(model=stories, tokens=128, sequence_length=64)
    with open_session(prepare(request), tmp_path, lambda *step: told.append(step)) as session:
        cached_score(session, METHODS["auto-quantize"], sensitivities(session))
    steps = [(done, total) for stage, done, total in told if stage.startswith("scoring by auto-quantize")]
    assert len(steps) > 5
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1]


def test_evaluate_takes_the_positions_that_a_model_has(stories: str, caplog: pytest.LogCaptureFixture) -> None:
    assert window_length(stories) == 512
    code, text, err = command("evaluate", stories, "--tokens", "512", "--json")
    assert code == 0, err
    assert "windows of 512 tokens instead of 2048" in caplog.text
    assert "512 tokens" in text


def test_a_home_folder_in_every_path(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(job.parent))
    assert command("show", "~/out")[0] == 0
    assert command("show", "~/out-run")[0] == 0
    assert command("allocate", "~/out-run", "--budget=2.5avg")[0] == 0
    assert command("apply", "~/out/plan.json", "--out=~/applied")[0] == 0
    assert (job.parent / "applied" / "plan.json").is_file()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"query": "a", "choices": ["b"], "gold": 3}'], "question 1: gold = 3 is no index"),
        (['{"query": 1, "choices": ["b"], "gold": 0}'], "context and continuation must be strings"),
        (['{"context": "a", "continuation": "b"}', '{"context": "a"}'], "not all lines have the same fields"),
        (["[" * 100_000], "cannot be read as lines of JSON"),
        (['{"context": "a", "continuation": "b"}', "garbage"], "cannot be read as lines of JSON"),
    ],
)
def test_damaged_task_files(lines: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    with pytest.raises(RunError, match=message):
        _from_file(tmp_path / "task.jsonl")


@pytest.mark.parametrize("content", ["a = " + "[" * 100_000, "models = 3", "tokens = nan", 'case = "x"', "\x00"])
def test_damaged_benches(content: str, tmp_path: Path) -> None:
    (tmp_path / "bench.toml").write_text(content)
    with pytest.raises(CoopQError) as error:
        read_bench(tmp_path / "bench.toml")
    assert "bench.toml" in str(error.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda text: text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-02')),
        ("config.json", lambda text: "[" * 100_000),
        ("tokenizer.json", lambda text: text.replace('"id": 1,', '"id": 2,')),
        ("hashes.json", lambda text: text.replace('"tokenizer.json": "', '"tokenizer.json": "0')),
        ("hashes.json", None),
    ],
)
def test_a_saved_model_whose_files_were_changed_is_refused(
    name: str, change: Callable[[str], str] | None, job: Path
) -> None:
    file = job / name
    before = file.read_text(encoding="utf-8")
    file.unlink() if change is None else file.write_text(change(before), encoding="utf-8")
    assert change is None or file.read_text(encoding="utf-8") != before
    line = refused("evaluate", job, "--no-compare")
    assert name in line
    assert "save the model again" in line
