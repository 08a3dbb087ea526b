"""Which architectures can be exported as GGUF files: tiny random models, their files' values, and llama.cpp's loss.

    python benchmarks/gguf_architectures.py                # all types that have no result yet; half an hour on one core
    python benchmarks/gguf_architectures.py --again        # the types whose result is not EXPORTS too
    python benchmarks/gguf_architectures.py llama gpt2     # these types, again
    python benchmarks/gguf_architectures.py --report       # only write the report

Each model is converted by llama.cpp's own converter, in that package. The exported file is read by the package gguf:
every row that differs from the base is the dequantized row that belongs there. Then llama.cpp (xllamacpp) computes the
loss of the exported file. The result of each type is a file in build/gguf_architectures. Writes
docs/results/gguf_architectures.md. Needs the packages of the extra llama.cpp.
"""

import importlib.util
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import coopq
import coopq.export.gguf.form
import coopq.pipeline
from _common import table
from _each_type import Result, reason, shown, sweep
from _gguf_engine import TOLERANCE, compare_losses
from _tiny_models import BROKEN, NotBuiltError, build, described, kinds
from _tiny_sizes import HEAD_DIM, LAYERS, POSITIONS, VOCABULARY
from coopq.core.errors import CoopQError
from coopq.model.matrices import matrix_of

OUTCOMES = ("EXPORTS", "REFUSES", "FAILS", "NOT CONVERTED", "NOT BUILT")


def examine(kind: str, folder: Path, text: Path) -> Result:
    """What becomes of one type.

    Args:
        kind: The type.
        folder: An empty folder to work in.
        text: A small text to calibrate on.
    """
    torch.set_num_threads(1)
    source, base = folder / "model", folder / "base.gguf"
    try:
        model = build(kind)
    except NotBuiltError as error:
        return {"outcome": "NOT BUILT", "reason": str(error)}
    try:
        model.save_pretrained(source)
    except BROKEN as error:
        return {"outcome": "NOT BUILT", "reason": f"cannot be saved: {described(error)}"}
    save_tokenizer(source, text)
    try:
        convert(source, base)
    except (NotImplementedError, *BROKEN) as error:
        return {"outcome": "NOT CONVERTED", "reason": described(error)}
    found = {"class": type(model).__name__, "architecture": str(gguf.GGUFReader(base).fields[_NAME].contents())}
    return found | _export(source, base, folder / "out", text)


_NAME = "general.architecture"


def convert(folder: Path, out: Path) -> None:
    """Write a model folder of transformers as a GGUF file of 32 bits.

    The converter knows a tokenizer by the tokens of one text, and each of its classes writes a kind of tokenizer. The
    tiny models share one byte-level tokenizer, so every class is told to write such a one. The converter reads some
    entries of a configuration by names that transformers has given up.
    """
    conversion = _converter()
    settings = conversion.ModelBase.load_hparams(folder, False)
    kind = conversion.get_model_class(conversion.get_model_architecture(settings, conversion.ModelType.TEXT))
    conversion.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    kind.set_vocab = conversion.TextModel._set_vocab_gpt2
    read = conversion.ModelBase.load_hparams
    rope = settings.get("rope_parameters") or {}
    rotated = rope.get("partial_rotary_factor", 1.0)
    old = {
        "n_ctx": POSITIONS,
        "num_hidden_layers": LAYERS,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rotary_pct": rotated,
    }
    head_dim, by_layer = settings.get("head_dim") or HEAD_DIM, settings.get("per_layer_config") or {}
    old |= {"rotary_dim": int(rotated * head_dim), "swa_head_dim": head_dim}
    old["global_head_dim"] = max((layer.get("head_dim", head_dim) for layer in by_layer.values()), default=head_dim)
    conversion.ModelBase.load_hparams = staticmethod(lambda *given, **named: old | read(*given, **named))
    with torch.inference_mode():
        kind(folder, gguf.LlamaFileType.ALL_F32, out, model_name=folder.name).write()


def _converter() -> Any:
    """llama.cpp's converter. Architectures and tensors that the package gguf does not know yet are None there."""
    conversion: Any = importlib.import_module("conversion")
    for file in Path(conversion.__file__).parent.glob("*.py"):
        for names, name in re.findall(r"gguf\.(MODEL_ARCH|MODEL_TENSOR)\.(\w+)", file.read_text(encoding="utf-8")):
            if not hasattr(getattr(gguf, names), name):
                setattr(getattr(gguf, names), name, None)
    return conversion


def save_tokenizer(folder: Path, text: Path) -> None:
    """Save a byte-level tokenizer with fewer tokens than the tiny models have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),  # Gemma's converter counts them twice
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def _export(source: Path, base: Path, out: Path, text: Path) -> Result:
    """Quantize and export one model, and judge the file."""
    request = coopq.Request.from_options(
        model=str(source),
        bits=(4, 8),
        backend="ggml",
        calibration=str(text),
        tokens=256,
        sequence_length=64,
        fit_tokens=256,
        target="gguf",
        base=str(base),
    )
    run, file = out.with_name("run"), out.with_name("out.gguf")
    try:
        plan = coopq.quantize(request, coopq.Goal(budget="6avg", method="one-shot-high"), out, run=run)
        coopq.export_model(out, "gguf", file, base=base, model=str(source))
    except CoopQError as error:
        early = not list((run / "bank").glob("*.safetensors")) and "\n" not in str(error)
        late = "" if early else "after the work: "
        return {"outcome": "REFUSES" if early else "FAILS", "reason": f"{late}{type(error).__name__}: {error}"}
    except BROKEN as error:
        return {"outcome": "FAILS", "reason": described(error)}
    found = {"covered": plan.covered, "players": len(plan.players)}
    if problem := _wrong_values(source, base, out, file):
        return {"outcome": "FAILS", "reason": problem, **found}
    return {"outcome": "EXPORTS", **found, "engine": compare_losses(source, base, out, file)}


def _wrong_values(source: Path, base: Path, saved: Path, file: Path) -> str:
    """What is wrong with an exported file; empty if it holds the weights of the saved model, and the base's others."""
    quantized = dict(coopq.dequantized(saved))
    model = coopq.load_model(str(source), device="cpu").model
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(base).tensors}
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    if there.keys() != written.keys():
        return f"other tensors: {', '.join(sorted(there.keys() ^ written.keys()))}"
    changed = [name for name in there if there[name].tensor_type != written[name].tensor_type]
    for name in there.keys() - set(changed):
        if not np.array_equal(there[name].data, written[name].data):
            return f"{name} is not the base's"
    expected: dict[bytes, npt.NDArray[np.float32]] = {}
    for name, weight in quantized.items():
        matrix = matrix_of(model, name.removesuffix(".weight"))
        keys = matrix.rows().detach().float().numpy()
        values = matrix.rows(weight).float().numpy()
        expected.update(zip((key.tobytes() for key in keys), values, strict=True))
    n_rows = 0
    for name in changed:
        n_columns = int(there[name].shape[0])
        values = gguf.quants.dequantize(written[name].data, written[name].tensor_type).reshape(-1, n_columns)
        for row, ours in zip(there[name].data.reshape(-1, n_columns), values, strict=True):
            if (wanted := expected.get(row.tobytes())) is None:
                return f"{name} has a row that is no row of a quantized weight"
            if not np.allclose(wanted, ours, rtol=1e-5, atol=1e-7):
                return f"{name} has a row that was quantized otherwise in the saved model"
            n_rows += 1
    n_weights = sum(weight.numel() for weight in quantized.values())
    n_written = sum(there[name].n_elements for name in changed)
    if n_weights != n_written:
        return f"{n_weights:,} weights are quantized, and {n_written:,} are written"
    return ""


def report_lines(found: dict[str, Result]) -> list[str]:
    """The report on all results."""
    lines = [
        "A tiny random model of each architecture is converted by llama.cpp's converter, quantized to 4 and 8 bits",
        "(ggml) for that base, and exported. EXPORTS: each row of the file is the dequantized row that belongs there,",
        "and the other tensors are the base's. REFUSES: one line says why, before any work. FAILS: anything else.",
        "NOT CONVERTED: llama.cpp's converter has no such architecture, or does not take the tiny model. The engine is",
        f"llama.cpp by xllamacpp: equal means that a token's loss differs by less than {TOLERANCE} nats on average.",
        "",
        "`python benchmarks/gguf_architectures.py`, "
        + ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "gguf", "xllamacpp"))
        + ".",
        "",
    ]
    by_outcome = {outcome: [kind for kind in found if found[kind]["outcome"] == outcome] for outcome in OUTCOMES}
    exported = by_outcome["EXPORTS"]
    equal = [kind for kind in exported if re.search("(^|in 32 bits: )equal", found[kind]["engine"])]
    families = {found[kind]["architecture"] for kind in equal}
    lines += [*table(OUTCOMES, [[len(by_outcome[outcome]) for outcome in OUTCOMES]]), ""]
    lines += [f"llama.cpp computes an equal loss for {len(equal)} types of {len(families)} of its architectures.", ""]
    lines += ["## EXPORTS", ""]
    rows: list[list[object]] = [
        [shown(kind), each["architecture"], f"{each['covered']:.0%}", each["engine"].replace("|", "\\|")]
        for kind in exported
        for each in [found[kind]]
    ]
    lines += [*table(["type", "llama.cpp's architecture", "covered", "llama.cpp's loss"], rows), ""]
    for outcome in OUTCOMES[1:4]:
        rows = [[shown(kind), reason(found[kind])] for kind in by_outcome[outcome]]
        lines += [f"## {outcome}", "", *table(["type", "why"], rows), ""] if rows else []
    return lines


def main() -> None:
    """Examine types, and write the report."""
    if "--report" not in sys.argv and importlib.util.find_spec("conversion") is None:
        raise SystemExit("error: the converter is missing; run: pip install 'coopq[llama-cpp]'")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sweep(__doc__, "gguf_architectures", "EXPORTS", kinds(), examine, report_lines)


if __name__ == "__main__":
    main()
