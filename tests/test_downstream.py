"""Zero-shot accuracy by lm-eval, against log-likelihoods taken from the model by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coopq.core.errors import RunError
from coopq.judge.zero_shot import evaluate_tasks
from coopq.model.load import LoadedModel, load_model
from tests.command_line import command, refused
from tests.conftest import STORIES

Lines = list[dict[str, Any]]
CHOICES: Lines = [
    {"query": "Lily wanted to play with her", "choices": ["the", "toys.", "computer science"], "gold": 1},
    {"query": "Once upon a", "choices": ["time", "kite", "banana split"], "gold": 0},
    {"query": "Question: What do birds do?\n", "choices": ["fly", "very big"], "gold": 0},
    {"query": "The dog was", "choices": ["quantum", "happy"], "gold": 1},
    {"query": "Tom and Sam went to the", "choices": ["of", "park and played"], "gold": 1},
]
OPTIONS: Lines = [
    {"context_options": ["Tom ate it so Tom", "Tom ate it so Sue"], "continuation": "was full.", "gold": 0},
    {"context_options": ["Sue ran and the cat", "Sue ran and the sun"], "continuation": "was hot.", "gold": 1},
    {"context_options": ["The boy", "The box"], "continuation": "said, I love you.", "gold": 0},
]
LAST_WORDS: Lines = [
    {"context": "Once upon a", "continuation": "time"},
    {"context": "One day, a little girl named", "continuation": "Lily"},
    {"context": "They were very", "continuation": "analytical"},
]


def write(path: Path, lines: Lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(STORIES))


@torch.no_grad()
def log_likelihood(loaded: LoadedModel, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation after a space, and whether the model would have written it."""
    whole = loaded.tokenizer(f"{context} {continuation}", return_tensors="pt", add_special_tokens=False).input_ids
    before = len(loaded.tokenizer(context, add_special_tokens=False).input_ids)
    scores = loaded.model(whole).logits[0, before - 1 : -1].log_softmax(-1)
    asked = whole[0, before:]
    return float(scores.gather(1, asked[:, None]).sum()), bool((scores.argmax(-1) == asked).all())


def test_choices(loaded: LoadedModel, tmp_path: Path) -> None:
    (result,) = evaluate_tasks(str(STORIES), [str(write(tmp_path / "choices.jsonl", CHOICES))])
    right, normalized = [], []
    for line in CHOICES:
        text = line["query"].strip() + ("\nAnswer:" if "Question" in line["query"] else "")
        scores = np.array([log_likelihood(loaded, text, choice)[0] for choice in line["choices"]])
        right.append(scores.argmax() == line["gold"])
        normalized.append((scores / [len(choice) for choice in line["choices"]]).argmax() == line["gold"])
    assert result.task == "choices"
    assert result.questions == 5
    assert result.accuracy == np.mean(right)
    assert result.stderr == pytest.approx(np.std(right, ddof=1) / np.sqrt(5))
    assert result.normalized is not None
    assert result.normalized[0] == np.mean(normalized)
    assert 0 < result.accuracy < 1


@pytest.mark.slow
def test_contexts(loaded: LoadedModel, tmp_path: Path) -> None:
    (result,) = evaluate_tasks(str(STORIES), [str(write(tmp_path / "options.jsonl", OPTIONS))])
    right = [
        np.argmax([log_likelihood(loaded, context, line["continuation"])[0] for context in line["context_options"]])
        == line["gold"]
        for line in OPTIONS
    ]
    assert result.accuracy == np.mean(right)
    assert result.normalized is None


@pytest.mark.slow
def test_last_words(loaded: LoadedModel, tmp_path: Path) -> None:
    (result,) = evaluate_tasks(str(STORIES), [str(write(tmp_path / "words.jsonl", LAST_WORDS))])
    assert result.accuracy == np.mean([log_likelihood(loaded, *line.values())[1] for line in LAST_WORDS])
    assert 0 < result.accuracy < 1


def test_command(tmp_path: Path) -> None:
    file = write(tmp_path / "choices.jsonl", CHOICES)
    code, out, _ = command("evaluate", STORIES, "--task", file, "--task-limit", "2", "--json")
    assert code == 0
    (accuracy,) = json.loads(out)
    assert accuracy["task"] == "choices"
    assert accuracy["questions"] == 2
    code, out, _ = command("evaluate", STORIES, "--task", file, "--task-limit", "1")
    assert code == 0
    assert "±" not in out, "one question has no standard error"
    for limit in ("0", "-1"):
        line = refused("evaluate", STORIES, "--task", file, "--task-limit", limit)
        assert f"task-limit = {limit} asks no question" in line


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no-such-task", "lm-eval has no task 'no-such-task'"),
        ("missing.jsonl", "missing.jsonl cannot be read"),
        ("odd.jsonl", "lines with answer are of no known form"),
        ("number.jsonl", "number.jsonl cannot be read as lines of JSON"),
        ("empty.jsonl", "lines with no names are of no known form"),
    ],
)
def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("odd.jsonl"), [{"answer": 1}])
    Path("number.jsonl").write_text("5")
    Path("empty.jsonl").write_text("\n")
    with pytest.raises(RunError, match=message):
        evaluate_tasks("a model that is not there", [task])
    assert message in refused("evaluate", STORIES, "--task", task)
