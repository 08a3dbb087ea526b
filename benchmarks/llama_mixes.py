"""Our GGUF files against llama.cpp's own mixes of the same size, perplexity by llama.cpp.

    python benchmarks/llama_mixes.py demo                          # hours on two cores; all of it resumes
    python benchmarks/llama_mixes.py demo --granularity fused      # two hours
    python benchmarks/llama_mixes.py llama --granularity fused     # a reference model of benchmarks/data
    python benchmarks/llama_mixes.py llama --granularity fused --backend ggml-iq     # rounded by ggml, as theirs are
    python benchmarks/llama_mixes.py llama --granularity fused --backend ggml        # and K-quants alone, as most are

llama.cpp's mixes are made by llama.cpp itself (pip install llama-cpp-python, which is compiled; the fork whose wheel is
at hand has types and mixes of its own), with an importance matrix of the same calibration tokens that ours is made
from. Ours are searched under the size of each of their files, with the embedding as a player, exported, and measured by
the same engine on the same windows of WikiText-2, and of Wikipedia and C4 as they are written, windows that nobody has
searched on. 16 bits are the tensors of the model's own file, and where a mix is larger than that, ours is that file.
Reference models are calibrated on articles of Wikipedia, half of them as they are written and half in the
form of WikiText-2, which is another text to a model: spaces around punctuation, `@-@` within words. Writes
docs/results/llama_mixes-MODEL-GRANULARITY.md.
"""

import argparse
import ctypes
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress

import llama_cpp
from convert import DATA, convert
from coopq.quantizers.input_statistics import column_importance
from coopq.model.texts import calibration_set, fitting_set, wikitext2
from coopq.export.checkpoint import is_saved_model, saved_plan
from coopq.game.prefix_engine import model_nll
from coopq.export.formats import export_model
from coopq.judge.llama_cpp import llama_cpp_log_probabilities, llama_cpp_nll, llama_cpp_package, nll_of
from coopq.core.files import read_json, write_json
from coopq.plan.methods import begin_with_nothing, measure, plans_on
from coopq.model.load import gguf_file, load_model
from coopq.model.players import GRANULARITIES, find_players
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.sizes import Budget
from coopq.core.types import Width
from coopq.game.session import open_workbench
from main_job import bars_for
from quantizers import above

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "build" / "llama_mixes", ROOT / "docs" / "results"
WINDOW = 512
TO_CALIBRATE, TO_JUDGE = WORK / "wikipedia-two-forms.jsonl", WORK / "wikipedia-to-judge.jsonl"
"""Halves of the articles of benchmarks/data that no model learnt from, written by `divide_wikipedia`."""


@dataclass(frozen=True)
class Subject:
    """A model, and how it is measured.

    Attributes:
        widths: Those that backends of ggml's types have for its rows, the first backend being the one to take.
        mixes: llama.cpp's.
        calibration: What is searched on, and what importance is measured on, theirs and ours.
        n_windows: The first ones of WikiText-2, and as many of other texts.
    """

    widths: Mapping[str, tuple[Width, ...]]
    mixes: tuple[str, ...]
    calibration: CalibrationConfig
    n_windows: int


REFERENCE = Subject(
    {
        "ggml-gptq": (2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 8),
        "ggml-iq": (2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 8),
        "ggml": (2, 3, 4, 5, 6, 8),
    },
    ("IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "Q4_K_S"),
    CalibrationConfig(str(TO_CALIBRATE), sequences=16, length=WINDOW),
    64,
)
"""Calibrated in their own domain: they learnt from Wikipedia alone. No `gemma`: the engine knows Gemma-2 only at the
depths that Google published."""
SUBJECTS = {
    "demo": Subject(
        {"ggml-gptq": (4, 5, 16), "ggml": (4, 5, 16)},
        ("Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S"),
        CalibrationConfig(sequences=4, length=256),
        16,
    ),
    "llama": REFERENCE,
    "qwen": REFERENCE,
}


def in_form_of_wikitext(text: str) -> str:
    """A text with the spaces that WikiText-2 has around punctuation."""
    text = re.sub(r"(\d)([,.])(?=\d)", r"\1 @\2@ ", text)
    text = re.sub(r"(\w)-(?=\w)", r"\1 @-@ ", text)
    return re.sub(" +", " ", re.sub(r"([^\w\s@-])", r" \1 ", text))


def divide_wikipedia() -> None:
    """Of four articles one to calibrate on as it is, one in the form of WikiText-2, and two to judge."""
    rows = (DATA / "wikipedia-held-out.jsonl").read_text(encoding="utf-8").splitlines()
    articles = [json.loads(row)["text"] for row in rows]
    forms = [text if k % 2 else in_form_of_wikitext(text) for k, text in enumerate(articles[::2])]
    for path, texts in ((TO_CALIBRATE, forms), (TO_JUDGE, articles[1::2])):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def source_of(name: str, work: Path) -> tuple[str, Path]:
    """What names a model, and its GGUF file in full precision."""
    own = gguf_file(name)
    if own is not None:
        return name, own
    folder, file = DATA / name, work / "base.gguf"
    if not file.exists():
        convert(folder, file)
    return str(folder), file


def tensor_importance(source: str, base: Path, calibration: CalibrationConfig) -> dict[str, npt.NDArray[np.float32]]:
    """The importance matrix of the tokens that our weights are fitted to, by the names of the base's tensors."""
    loaded = load_model(source, device="cpu")
    names = [linear.name for player in find_players(loaded.model, embeddings=True) for linear in player.linears]
    tokens = fitting_set(calibration, loaded.tokenizer).tokens
    of_file = gguf.GGUFReader(base)
    architecture = str(of_file.fields["general.architecture"].contents())
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    there = gguf.get_tensor_name_map(kinds[architecture], int(of_file.fields[f"{architecture}.block_count"].contents()))
    importance = column_importance(loaded.model, names, tokens)
    return {f"{there.get_name(name)}.weight": values.numpy() for name, values in importance.items()}


def mix(base: Path, kind: str, importance: Mapping[str, npt.NDArray[np.float32]], out: Path) -> None:
    """One of llama.cpp's own mixes."""
    data = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last one, empty, ends it
    pointer = ctypes.POINTER(ctypes.c_float)
    for entry, (name, values) in zip(data, importance.items(), strict=False):
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data_as(pointer), len(values)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize, params.imatrix = True, data
    failed = llama_cpp.llama_model_quantize(str(base).encode(), str(out).encode(), ctypes.byref(params))
    assert not failed, kind


def unseen(subject: Subject, source: str, tokenizer: Any) -> npt.NDArray[np.int64]:
    """Windows of a text with no sequence that was searched on or fitted to, shape (n_windows, WINDOW)."""
    seen = np.concatenate([of(subject.calibration, tokenizer).tokens for of in (calibration_set, fitting_set)])
    drawn = calibration_set(CalibrationConfig(source, subject.n_windows + len(seen), WINDOW), tokenizer).tokens
    parts = np.lib.stride_tricks.sliding_window_view(drawn, seen.shape[1], axis=1)
    holds = [(parts == sequence).all(axis=2).any(axis=1) for sequence in seen]
    kept: npt.NDArray[np.int64] = drawn[~np.any(holds, axis=0)]
    return kept[: subject.n_windows]


@dataclass(frozen=True)
class Judged:
    """Files on a text, each a mean of every window, shape (n_windows,), nats per token.

    Attributes:
        nll: Loss.
        divergence: From the first file to this one, of what is expected after each token.
    """

    nll: dict[Path, npt.NDArray[np.float64]]
    divergence: dict[Path, npt.NDArray[np.float64]]


def measured(files: Sequence[Path], tokens: npt.NDArray[np.int64], threads: int, kept: Path) -> Judged:
    """What llama.cpp computes of files, the first of which is the model's own; what is known of a file is kept."""
    record = kept / f"judged-{hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()}.json"
    known: dict[str, list[list[float]]] = read_json(record) if record.exists() else {}
    base, *others = files
    engine_and_base = f"{llama_cpp_package()} {fingerprint(base)}"  # divergences are from it
    keys = {file: f"{engine_and_base} {fingerprint(file)}" for file in files}
    fresh = [base, *(file for file in others if keys[file] not in known)]
    if len(fresh) > 1 or keys[base] not in known:
        means: list[list[tuple[float, float]]] = []
        every = (llama_cpp_log_probabilities(of, tokens, threads) for of in fresh)
        for sequence, own, *of_others in zip(tokens, *every, strict=True):
            chances = np.exp(own)
            means.append(
                [
                    (float(nll_of(scores, sequence).mean()), float((chances * (own - scores)).sum(axis=1).mean()))
                    for scores in (own, *of_others)
                ]
            )
        known |= {keys[file]: of.tolist() for file, of in zip(fresh, np.array(means).transpose(1, 2, 0), strict=True)}
        write_json(record, known)
    nll, divergence = ({file: np.array(known[keys[file]][row]) for file in files} for row in (0, 1))
    return Judged(nll, divergence)


def fingerprint(file: Path) -> str:
    """A hash of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def types_of(file: Path) -> str:
    """Types of the weights of a GGUF file, the most frequent first."""
    types = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1)
    return ", ".join(f"{n} of {kind}" for kind, n in types.most_common())


def run(name: str, granularity: str, backend: str | None) -> list[str]:
    """The report of a model; writes it."""
    work = WORK / name
    work.mkdir(parents=True, exist_ok=True)
    divide_wikipedia()
    subject, (source, base) = SUBJECTS[name], source_of(name, work)
    first, *_ = subject.widths
    backend = backend or first
    search = granularity if backend == first else f"{granularity}-{backend}"
    threads, loaded = torch.get_num_threads(), load_model(source, device="cpu")
    tokens = wikitext2(loaded.tokenizer, WINDOW, subject.n_windows * WINDOW).tokens
    # Where the engine computes some types wrongly, numbers would be worth nothing.
    own, theirs_own = (
        float(next(model_nll(loaded.model, tokens[:1]))[0]),
        llama_cpp_nll(base, tokens[:1], threads).mean(),
    )
    if abs(own - theirs_own) > 0.05:
        raise SystemExit(
            f"error: of {base} {llama_cpp_package()} computes a loss of {theirs_own:.3f}, transformers of {own:.3f}"
        )
    theirs = {kind: work / f"{kind}.gguf" for kind in subject.mixes}
    if not all(file.exists() for file in theirs.values()):
        importance = tensor_importance(source, base, subject.calibration)
        for kind, file in theirs.items():
            mix(base, kind, importance, file)
    low, *between, high = subject.widths[backend]
    config = RunConfig(
        source,
        backend,
        low=low,
        high=high,
        between=tuple(between),
        calibration=subject.calibration,
        granularity=granularity,
        embeddings=True,
        target="gguf",
        loss="kl",
        base=None if gguf_file(name) else str(base),
    )
    ours = {kind: base for kind, file in theirs.items() if file.stat().st_size >= base.stat().st_size}
    searched = [kind for kind in theirs if kind not in ours]
    budgets = [Budget.parse(f"{theirs[kind].stat().st_size}B") for kind in searched]
    with Progress() as bars, open_workbench(config, work / search, bars_for(bars, name)) as bench:
        begin_with_nothing(bench, ["active"], budgets)  # as in a new folder, whatever was searched in this one
        plans = [measure(bench, plan) for plan in plans_on(bench, "active", budgets)]
        for kind, plan in zip(searched, plans, strict=True):
            saved = work / f"{search}-{kind}"
            if is_saved_model(saved) and saved_plan(saved).assignment != plan.assignment:
                shutil.rmtree(saved)
            if not is_saved_model(saved):
                bench.save(plan, saved)
            ours[kind] = work / f"{search}-{kind}.gguf"
            export_model(saved, "gguf", ours[kind])
    texts = [tokens, *(unseen(subject, text, loaded.tokenizer) for text in (str(TO_JUDGE), "c4"))]
    pairs = [(ours[kind], file) for kind, file in theirs.items()]
    files = list(dict.fromkeys([base, *(file for pair in pairs for file in pair)]))
    judged = [measured(files, text, threads, work) for text in texts]
    lines = [
        f"# {name}: our GGUF files against llama.cpp's mixes",
        "",
        f"Written by `python benchmarks/llama_mixes.py {name} --granularity {granularity}"
        f"{'' if backend == first else f' --backend {backend}'}`: {backend},",
        f"{config.widths_text} bits,",
        f"active search by divergence on {subject.calibration.sequences} x {subject.calibration.length} tokens of",
        f"{Path(subject.calibration.source).name}, for all sizes together. Perplexities by llama.cpp",
        f"({llama_cpp_package()}) on {len(tokens)} windows of {WINDOW} tokens of",
        f"WikiText-2; that of the model's own file, {base.stat().st_size:,} bytes, {types_of(base)}, is",
        f"{np.exp(judged[0].nll[base].mean()):.2f}; where a mix is larger, ours is that file.",
        "Beside them our loss above theirs, nats per",
        "token, paired 95 %: there, and on as many windows of Wikipedia and of C4, none of them searched on.",
        "WikiText-2 sets spaces around punctuation, which these texts do not"
        + (", and half of what is searched on does." if subject is REFERENCE else "."),
        "",
        "| llama.cpp's mix | its bytes | our bytes | its perplexity | ours | our loss above | on Wikipedia | on C4 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, pair in zip(theirs, pairs, strict=True):
        sizes = [f"{of.stat().st_size:,}" for of in reversed(pair)]
        perplexities = [f"{np.exp(judged[0].nll[of].mean()):.2f}" for of in reversed(pair)]
        losses = [above(*(text.nll[of] for of in pair)) for text in judged]
        lines.append(f"| {' | '.join([kind, *sizes, *perplexities, *losses])} |")
    lines += [
        "",
        "Divergence from the model's own file of what llama.cpp expects after each token, nats per token. On a text of",
        "the model's own kind that is what quantization loses; on another kind some of its damage may lower the loss.",
        "",
        "| llama.cpp's mix | WikiText-2: its divergence | ours | Wikipedia: its | ours | C4: its | ours |",
        "| --- |" + " --- |" * 6,
    ]
    for kind, pair in zip(theirs, pairs, strict=True):
        apart = [f"{text.divergence[of].mean():.4f}" for text in judged for of in reversed(pair)]
        lines.append(f"| {' | '.join([kind, *apart])} |")
    (RESULTS / f"llama_mixes-{name}-{search}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def main() -> None:
    """One model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SUBJECTS)
    parser.add_argument("--granularity", default="block", choices=GRANULARITIES)
    parser.add_argument("--backend", choices=REFERENCE.widths)
    arguments = parser.parse_args()
    print("\n".join(run(arguments.model, arguments.granularity, arguments.backend)))


if __name__ == "__main__":
    main()
