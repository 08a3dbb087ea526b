"""What a folder of a quantized model holds beside weights: the source's own files, hashes, and a model card."""

import hashlib
import importlib.metadata
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from coopq.core.errors import ModelError
from coopq.core.files import expanded, read_record, write_record
from coopq.core.recipes import OWN, RECIPES
from coopq.core.specs import request_words
from coopq.core.types import UNTOUCHED
from coopq.plan.plan import Plan

SOURCE_CARD = "SOURCE_README.md"
"""Name of the source's README.md in the folder of a quantized model."""
_COPIED = (
    SOURCE_CARD,
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
    "emoji.json",
    "generation_config.json",
)
"""Files beside the weights that are copied, by pattern."""
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
"""File name endings that are copied. Code and pickles are never copied."""


def copy_source_files(source: Path, out: Path) -> None:
    """Copy the licence, notices, README and the files of tokenizer and processors; existing files stay as they are.

    Args:
        source: The folder that the model was read from; an empty path for a model that was read from none.
        out: The folder of the quantized model.
    """
    if source == Path():
        return
    copy_files_beside_weights(source, out)
    if (source / "README.md").is_file():
        shutil.copyfile(source / "README.md", out / SOURCE_CARD)


def copy_files_beside_weights(folder: Path, out: Path) -> None:
    """Copy the licence, notices and the files of tokenizer and processors; existing files stay as they are."""
    for pattern in _COPIED:
        for file in sorted(folder.glob(pattern)):
            target = out / file.relative_to(folder)
            if file.is_file() and file.suffix.lower() in _SUFFIXES and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)  # the hub's cache holds links, and files that nobody may write to


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


def write_model_card(plan: Plan, out: Path, library: str, n_bytes: int, form: str | None = None) -> None:
    """Write README.md, with the front matter that the hub reads.

    Args:
        plan: The plan of the model.
        out: The folder of the model; the source's card lies there, if there is one.
        library: Name of what loads the folder.
        n_bytes: Bytes of the file that holds the weights.
        form: Form of the folder, a name of `coopq.export.formats.FORMS`; None for what coopq itself saves.
    """
    source, card = plan.request.model.source, out / SOURCE_CARD
    base = _hub_name(source)
    source_card = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = [f"base_model: {base}"] if base else []
    front += [f"library_name: {library}", *_license(source_card)]
    front += ["tags:", *(f"- {tag}" for tag in ("quantized", "mixed-precision", "coopq"))]
    name = base or Path(source).name or source
    counts = Counter(plan.modules.values())
    recipe = next(recipe for recipe in RECIPES.values() if recipe.form == form)
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {name}, quantized by coopq",
        "",
        f"Each layer has its own bit width, chosen by CoopQ {importlib.metadata.version('coopq')} with the method "
        f"`{plan.method}`.",
        "",
        "| | |",
        "| --- | --- |",
        f"| budget | {plan.asked} |",
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
        "Run it:",
        "",
        "```",
        recipe.command("FOLDER"),
        "```",
        "",
        "Made by:",
        "",
        "```",
        *map(shlex.join, _commands(plan, name, form)),
        "```",
        "",
    ]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _losses(plan: Plan) -> list[str]:
    """Rows of the card: the losses that the plan holds, each with its name and its tokens."""
    text = plan.request.text
    tokens = f"nats per token on {text.tokens} calibration tokens of {_without_folder(text.source)}"
    name = "divergence from the original (KL)" if plan.request.search.loss == "kl" else "loss (NLL)"
    rows = []
    if plan.measured_loss is not None:
        rows.append(f"| measured {name} | {plan.measured_loss:.5f} {tokens} |")
    if plan.saved_loss is not None:
        rows.append(f"| loss (NLL) of the saved weights | {plan.saved_loss:.5f} {tokens} |")
    return rows


def _commands(plan: Plan, model: str, form: str | None) -> Iterator[list[str]]:
    """The words of the commands that make a folder, without the folders of this machine."""
    given = plan.request
    request = given.replace(
        model=model,
        device="auto",
        base=None,
        calibration=_without_folder(given.text.source),
        imatrix=given.quantizer.imatrix and Path(given.quantizer.imatrix).name,
    )
    saved = "MEASURED" if plan.deployment is not None else "SAVED"
    yield ["coopq", "quantize", *request_words(request, RECIPES[OWN].settings), *plan.goal_words, "--out", saved]
    if plan.deployment is not None:
        spec = plan.deployment
        size = [] if spec.group_size is None else ["--group-size", str(spec.group_size)]
        yield ["coopq", "apply", f"{saved}/plan.json", "--backend", spec.backend, *size, "--out", "SAVED"]
    if form is not None:
        yield ["coopq", "export", "SAVED", "--to", form, "--out", "FOLDER"]


def _without_folder(text: str) -> str:
    """The name of a calibration text; the folder of a file is left out."""
    return text if text.startswith("hub:") else Path(text).name


def _hub_name(source: str) -> str:
    """The source's name on the hub; empty if the source is a file or a folder."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    return source if is_name and not source.startswith(".") and not expanded(source).exists() else ""


def _license(card: str) -> list[str]:
    """The lines of a card's front matter that name the licence."""
    found = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    lines = found.group(1).splitlines() if found else []
    return [line for line in lines if re.match(r"license(_name|_link)?:\s*\S", line)]


def _width(bits: float) -> str:
    return "untouched (16)" if bits == UNTOUCHED else f"{bits:g}"
