"""Zero-shot accuracy of a model, measured by lm-eval."""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from coopq.core.errors import EstimationError, RunError
from coopq.core.files import expanded
from coopq.core.types import ProgressCallback, silent
from coopq.export.checkpoint import SavedModel, load
from coopq.judge.results import Accuracy
from coopq.model.kernels.cpu import onednn_forwards
from coopq.model.kernels.forward import override_forward
from coopq.model.load import load_model
from coopq.model.sources.folder import read_tokenizer

_FORMS: dict[frozenset[str], dict[str, str]] = {
    frozenset({"query", "choices", "gold"}): {
        "output_type": "multiple_choice",
        # Questions end as in the tasks of lm-eval itself.
        "doc_to_text": "{{query.strip()}}{% if query.startswith('Question:') %}\nAnswer:{% endif %}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    },
    frozenset({"context_options", "continuation", "gold"}): {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
    },
    frozenset({"context", "continuation"}): {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + continuation}}",
    },
}
"""Fields of a line of a task file, and how lm-eval reads the line. Source of the forms: MosaicML's llm-foundry."""


def check_tasks(tasks: Sequence[str], limit: int | None = None) -> None:
    """Check that tasks can be read, before a model is loaded.

    Raises:
        RunError: If the limit leaves no question, lm-eval is missing, a file is not in a known form, or lm-eval has no
            task of a name.
    """
    if limit is not None and limit < 1:
        raise RunError(f"task-limit = {limit} asks no question; give 1 or more, or leave it out to ask all")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RunError("zero-shot tasks need the package lm-eval; run: pip install 'coopq[tasks]'") from error
    known: set[str] | None = None
    for task in tasks:
        if task.endswith(".jsonl"):
            _from_file(Path(task))
        else:
            known = set(TaskManager().all_subtasks) if known is None else known
            if task not in known:
                raise RunError(f"lm-eval has no task {task!r}; name one of `lm-eval ls tasks`, or a .jsonl file")


def evaluate_tasks(
    source: str,
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    device: str = "auto",
    progress: ProgressCallback = silent,
) -> list[Accuracy]:
    """Zero-shot accuracy of a folder saved by coopq, or of any model as in `coopq.model.load.load_model`.

    Args:
        source: The model.
        tasks: Tasks, as in `zero_shot`.
        limit: Only the first questions of each task; None asks all.
        device: Where to compute.
        progress: Told of every task.
    """
    check_tasks(tasks, limit)
    folder = expanded(source)
    if SavedModel(folder).exists:
        model = load(folder, device=device)
        tokenizer = read_tokenizer(folder, getattr(model.get_input_embeddings(), "num_embeddings", None))
        return zero_shot(model, tokenizer, tasks, limit, progress)
    loaded = load_model(source, device=device)
    return zero_shot(loaded.model, loaded.tokenizer, tasks, limit, progress)


def zero_shot(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None = None, progress: ProgressCallback = silent
) -> list[Accuracy]:
    """Accuracy without examples in the prompt.

    Args:
        model: A model of transformers.
        tokenizer: The model's tokenizer.
        tasks: Names of lm-eval's tasks, whose data comes from the hub, or `.jsonl` files, which need no network. A line
            of a file has `query`, `choices` and `gold` (index of the correct choice), or `context_options`,
            `continuation` and `gold` (as Winogrande), or `context` and `continuation` (as LAMBADA).
        limit: Only the first questions of each task; None asks all.
        progress: Told of every task.
    Raises:
        EstimationError: If lm-eval gives no accuracy for a task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(model, tokenizer=tokenizer, batch_size=16)
    fast = onednn_forwards(model) if model.device.type == "cpu" else {}
    found = []
    for done, task in enumerate(tasks):
        progress("zero-shot tasks", done, len(tasks))
        asked = _from_file(Path(task)) if task.endswith(".jsonl") else task
        with torch.no_grad(), override_forward(fast):
            results = simple_evaluate(lm, tasks=[asked], num_fewshot=0, limit=limit, log_samples=False)
        assert results is not None  # None is for processes of a rank other than 0
        ((name, metrics),) = results["results"].items()
        if "acc,none" not in metrics:
            raise EstimationError(f"lm-eval measures no accuracy at {name!r}; use a task with choices")
        normalized = _with_stderr(metrics, "acc_norm") if "acc_norm,none" in metrics else None
        questions = results["n-samples"][name]["effective"]
        found.append(Accuracy(name, *_with_stderr(metrics, "acc"), normalized, questions))
    progress("zero-shot tasks", len(tasks), len(tasks))
    return found


def _with_stderr(metrics: dict[str, Any], name: str) -> tuple[float, float | None]:
    """A metric and its standard error, for which lm-eval writes "N/A" where there is one question."""
    stderr = metrics[f"{name}_stderr,none"]
    return metrics[f"{name},none"], stderr if isinstance(stderr, float) else None


def _from_file(path: Path) -> dict[str, Any]:
    """Configuration of a task file for lm-eval.

    Raises:
        RunError: If a line is damaged, or of no known form.
    """
    path = expanded(path)
    try:
        lines = [line for line in path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]
        questions = [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as lines of JSON: {error}") from error
    kinds = {frozenset(question) for question in questions}
    names = sorted(next(iter(kinds))) if len(kinds) == 1 else []
    form = _FORMS.get(frozenset(names))
    if len(kinds) > 1:
        raise RunError(f"{path}: not all lines have the same fields; make them equal")
    if form is None:
        forms = "; ".join(", ".join(sorted(form)) for form in _FORMS)
        raise RunError(f"{path}: lines with {', '.join(names) or 'no names'} are of no known form; write {forms}")
    for number, question in enumerate(questions, start=1):
        if (wrong := _wrong_in(question)) is not None:
            raise RunError(f"{path}, question {number}: {wrong}; correct it")
    metrics = ["acc", "acc_norm"] if "query" in names else ["acc"]
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        **form,
    }


def _wrong_in(question: dict[str, Any]) -> str | None:
    """What is wrong with the values of a question; None if nothing is."""
    listed, gold = question.get("choices", question.get("context_options")), question.get("gold")
    texts = [value for name, value in question.items() if name in ("query", "context", "continuation")]
    texts += listed if isinstance(listed, list) else []
    if not all(isinstance(text, str) for text in texts):
        return "query, choices, context_options, context and continuation must be strings"
    if "gold" in question and not (isinstance(listed, list) and isinstance(gold, int) and 0 <= gold < len(listed)):
        return f"gold = {gold!r} is no index of its choices"
    return None
