"""What a folder of a quantized model holds beside weights: the source's own files, hashes, and a model card."""

import hashlib
import importlib.metadata
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from coopq.core.errors import ModelError
from coopq.core.files import as_plain, read_record, write_record
from coopq.core.sizes import Budget
from coopq.core.spec import spelled
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED
from coopq.plan.plan import Plan

SOURCE_CARD = "SOURCE_README.md"
"""Name of the source's README.md in the folder of a quantized model."""
_COPIED = (
    "LICEN[CS]E*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
    "*processor_config.json",
    "processor.json",
    "image_processor*.json",
    "feature_extractor*.json",
    "chat_template*",
    "additional_chat_templates/*",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer*",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "tekken.json",
    "sentencepiece*",
    "spiece*",
    "vocab*",
    "merges.txt",
    "generation_config.json",
)
"""Files of the source that are no weights and no code, by pattern."""
_HASHED = (
    "config.json",
    "quantize_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
)
"""Files that the loss depends on, by pattern; weights and the plan have checksums of their own."""
_HASHES = "hashes.json"
_FORMAT_VERSION = 1
_SUFFIXES = ("", ".md", ".txt", ".json", ".jsonl", ".jinja", ".model", ".tiktoken", ".spm", ".bpe", ".pdf", ".rst")
"""Kinds of these files. Code and pickles are never copied."""


def copy_source_files(source: Path, out: Path) -> None:
    """Copy the licence, notices, README and the files of tokenizer and processors; existing files stay as they are.

    Args:
        source: The folder that the model was read from; an empty path for a model that was read from none.
        out: The folder of the quantized model.
    """
    if source == Path():
        return
    for pattern in _COPIED:
        for file in sorted(source.glob(pattern)):
            target = out / file.relative_to(source)
            if file.is_file() and file.suffix.lower() in _SUFFIXES and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)  # the hub's cache holds links
    if (source / "README.md").is_file():
        shutil.copyfile(source / "README.md", out / SOURCE_CARD)


class _Hashes(msgspec.Struct):
    """What hashes.json holds: a hash of each file, by its name."""

    files: dict[str, str]


def write_hashes(folder: Path) -> None:
    """Write hashes.json: a hash of each file that the loss of a saved model depends on."""
    write_record(folder / _HASHES, _Hashes(_hashes(folder)), _FORMAT_VERSION)


def require_unchanged(folder: Path) -> None:
    """Compare the configuration and the tokenizer of a saved model with hashes.json, before they are parsed.

    Raises:
        ModelError: If a file was changed, added or removed.
    """
    way_out = "save the model again"
    written = read_record(
        folder / _HASHES,
        _Hashes,
        _FORMAT_VERSION,
        what="list of hashes",
        missing=f"{folder} lacks {_HASHES}, so nothing tells whether its files are whole; {way_out}",
        way_out=way_out,
        error=ModelError,
    ).files
    found = _hashes(folder)
    if changed := sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name)):
        raise ModelError(f"{folder / changed[0]} was changed after the model was saved; {way_out}")


def _hashes(folder: Path) -> dict[str, str]:
    files = {path for pattern in _HASHED for path in folder.glob(pattern) if path.is_file()}
    return {path.name: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in sorted(files)}


def write_model_card(plan: Plan, out: Path, library: str, n_bytes: int) -> None:
    """Write README.md, with the front matter that the hub reads.

    Args:
        plan: The plan of the model.
        out: The folder of the model; the source's card lies there, if there is one.
        library: Name of what loads the folder.
        n_bytes: Bytes of the file that holds the weights.
    """
    source, request = plan.request.model.source, plan.request
    base = _hub_name(source)
    source_card = (out / SOURCE_CARD).read_text(encoding="utf-8") if (out / SOURCE_CARD).is_file() else ""
    front = [f"base_model: {base}"] if base else []
    front += [f"library_name: {library}", *_license(source_card)]
    front += ["tags:", *(f"- {tag}" for tag in ("quantized", "mixed-precision", "coopq"))]
    name = base or Path(source).name or source
    counts = Counter(bits for player in plan.players for bits in [player.bits] for _ in player.modules)
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {name}, quantized by coopq",
        "",
        f"The layers of this model have widths of their own, chosen by method `{plan.method}` of coopq "
        f"{importlib.metadata.version('coopq')}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| budget | {plan.budget if plan.max_loss is None else f'loss of at most {plan.max_loss} nats per token'} |",
        f"| file of weights | {n_bytes:,} bytes |",
        f"| quantized layers | {plan.bytes:,} bytes, {plan.average_bits:.3f} bits on average, "
        f"{plan.bits_per_weight:.3f} with scales |",
        f"| backend | {plan.quantizer.backend} |",
        *_losses(plan),
        "",
        "| width | layers |",
        "| --- | --- |",
        *(f"| {_width(bits)} | {counts[bits]} |" for bits in sorted(counts)),
        "",
        "Made by:",
        "",
        "```",
        _command(plan, request, name),
        "```",
        "",
    ]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _losses(plan: Plan) -> list[str]:
    """Rows of the card: the losses that the plan holds, each with its name and its tokens."""
    text = plan.request.text
    calibration = text.source if text.source == "c4" or text.source.startswith("hub:") else Path(text.source).name
    tokens = f"nats per token on {text.tokens} calibration tokens of {calibration}"
    name = "divergence from the original (KL)" if plan.request.search.loss == "kl" else "loss (NLL)"
    rows = []
    if plan.measured_loss is not None:
        rows.append(f"| measured {name} | {plan.measured_loss:.5f} {tokens} |")
    if plan.saved_loss is not None:
        rows.append(f"| loss (NLL) of the saved weights | {plan.saved_loss:.5f} {tokens} |")
    return rows


def _command(plan: Plan, request: Request, name: str) -> str:
    """The command that makes the plan, without the folders of this machine."""
    usual = Request.from_options(model=request.model.source).options()
    words = ["coopq", "quantize", name]
    for option, value in as_plain(msgspec.to_builtins(request.options())).items():
        if option in ("model", "device", "base") or value is None or value == as_plain(usual.get(option)):
            continue
        words += _words(option, value)
    words += ["--max-loss", str(plan.max_loss)] if plan.max_loss is not None else ["--budget", _budget(plan)]
    return " ".join([*words, "--method", plan.method, "--out", "OUT"])


def _words(option: str, value: Any) -> list[str]:
    flag = f"--{spelled(option)}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{spelled(option)}"]
    if isinstance(value, list):
        return [flag, ",".join(map(str, value))]
    if option == "calibration" and not str(value).startswith("hub:"):
        return [flag, Path(str(value)).name]
    return [flag, str(value)]


def _budget(plan: Plan) -> str:
    return Budget.parse(plan.budget).text


def _hub_name(source: str) -> str:
    """The source's name on the hub; empty if the source is a file or a folder."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    return source if is_name and not source.startswith(".") and not Path(source).expanduser().exists() else ""


def _license(card: str) -> list[str]:
    """The lines of a card's front matter that name the licence."""
    found = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    lines = found.group(1).splitlines() if found else []
    return [line for line in lines if re.match(r"license(_name|_link)?:\s*\S", line)]


def _width(bits: float) -> str:
    return "untouched (16)" if bits == UNTOUCHED else f"{bits:g}"
