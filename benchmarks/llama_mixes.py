"""Our GGUF files against llama.cpp's own mixes of the same size, judged by llama.cpp.

    python benchmarks/llama_mixes.py demo                          # hours on two cores; everything resumes
    python benchmarks/llama_mixes.py llama                         # a reference model of benchmarks/data
    python benchmarks/llama_mixes.py llama --granularity block
    python benchmarks/llama_mixes.py llama --backend ggml-iq       # rounded by ggml, as the mixes are
    python benchmarks/llama_mixes.py llama --backend ggml          # K-quants alone, as most mixes

llama.cpp makes its mixes itself (pip install llama-cpp-python, which is compiled, or reads a library that is compiled
already from LLAMA_CPP_LIB_PATH; the fork that has a wheel has other types and mixes), with an importance matrix of the
same calibration tokens as ours. Our files are searched under the size of each mix, with the embedding as a player. The
strongest rival is what somebody finds who tries llama.cpp's mixes with several types of the embedding: of all these
files of at most the size, the one that diverges least on the windows that judge. llama.cpp judges all on the same
windows of WikiText-2, and of Wikipedia and C4 as they are written; no search sees these windows. 16 bits are the
tensors of the model's own file. Where a mix is larger than that file, our file is the model's own.

Reference models are calibrated on articles of Wikipedia: half of the articles as they are written, half in the form of
WikiText-2, which is another text to a model, with spaces around punctuation and `@-@` within words. Writes
docs/results/llama_mixes-MODEL-GRANULARITY.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from _common import DATA, RESULTS, WORK, command_line, write_documents, write_report
from _llama_cpp import judge_files, make_mix, tensor_importance
from _mixes_report import describe, describe_strongest
from _models import measured_plans, saved_model, sequence_losses, session_on
from _wikipedia import held_out_articles, in_form_of_wikitext
from convert import convert
from coopq.core.sizes import Budget
from coopq.core.specs import Request, TextSpec
from coopq.core.types import Width
from coopq.export.formats import export_model
from coopq.judge.engines.llama_cpp import llama_cpp_nll, llama_cpp_package
from coopq.model.load import gguf_file, load_model
from coopq.model.players import GRANULARITIES
from coopq.model.texts import HeldOut, calibration_set, fitting_set
from coopq.plan.searches.by_search import begin_with_nothing

FOLDER, WINDOW = WORK / "llama_mixes", 512
TO_CALIBRATE, TO_JUDGE = FOLDER / "wikipedia-two-forms.jsonl", FOLDER / "wikipedia-to-judge.jsonl"
"""Halves of the held-out articles, written by `divide_wikipedia`."""
ENGINE_TOLERANCE = 0.05
"""Most nats per token between the losses of the model's own file by llama.cpp and by transformers."""


@dataclass(frozen=True)
class Subject:
    """A model, and how it is measured.

    Attributes:
        bits: Widths by backend, for rows of the model's length; the first backend is the default.
        mixes: llama.cpp's mixes.
        embeddings: Types of the embedding that each mix is also made with, for the strongest rival.
        rivals: More mixes for the strongest rival; no file of ours is searched for their sizes.
        text: What is searched on. Weights of both sides are fitted to further tokens of this text.
        n_windows: Windows of each text that judges.
    """

    bits: Mapping[str, tuple[Width, ...]]
    mixes: tuple[str, ...]
    embeddings: tuple[str, ...]
    text: TextSpec
    n_windows: int
    rivals: tuple[str, ...] = ()


REFERENCE = Subject(
    {
        "ggml-gptq": (2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 8),
        "ggml-iq": (2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 8),
        "ggml": (2, 3, 4, 5, 6, 8),
    },
    ("IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "Q4_K_S"),
    ("Q3_K", "Q4_K", "Q5_K", "Q8_0"),
    TextSpec(source=str(TO_CALIBRATE), tokens=16 * WINDOW, sequence_length=WINDOW),
    32,
    ("IQ2_XS", "IQ2_S", "IQ3_XS", "IQ3_S", "IQ3_M", "Q3_K_L", "IQ4_XS", "IQ4_NL"),
)
"""Reference models learnt from Wikipedia alone, so Wikipedia calibrates. llama.cpp knows Gemma-2 only at the depths
that Google published, so `gemma` is not here."""
SUBJECTS = {
    "demo": Subject(
        {"ggml-gptq": (2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 16), "ggml": (2, 3, 4, 5, 16)},
        ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S"),
        ("Q4_0", "IQ4_NL", "Q5_0", "Q5_1"),
        TextSpec(tokens=2048, sequence_length=WINDOW),
        16,
        ("IQ3_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_K_M"),
    ),
    "llama": REFERENCE,
    "qwen": REFERENCE,
}


@dataclass(frozen=True)
class Run:
    """One report.

    Attributes:
        name: Name of the model in `SUBJECTS`.
        granularity: What the players are.
        backend: What quantizes our files.
    """

    name: str
    granularity: str
    backend: str

    @property
    def subject(self) -> Subject:
        """The model and its texts."""
        return SUBJECTS[self.name]

    @property
    def folder(self) -> Path:
        """Folder of the work on the model."""
        return FOLDER / self.name

    @property
    def is_default_backend(self) -> bool:
        """Whether the backend is the first of the model."""
        return self.backend == next(iter(self.subject.bits))

    @property
    def command(self) -> str:
        """The command that makes the report."""
        options = "" if self.granularity == "linear" else f" --granularity {self.granularity}"
        options += "" if self.is_default_backend else f" --backend {self.backend}"
        return f"python benchmarks/llama_mixes.py {self.name}{options}"

    @property
    def label(self) -> str:
        """The part of file names that tells runs of a model apart."""
        return self.granularity if self.is_default_backend else f"{self.granularity}-{self.backend}"


def divide_wikipedia() -> None:
    """Divide the held-out articles: of four, one calibrates as it is, one in the form of WikiText-2, and two judge."""
    articles = held_out_articles()
    to_calibrate = [text if k % 2 else in_form_of_wikitext(text) for k, text in enumerate(articles[::2])]
    write_documents(TO_CALIBRATE, to_calibrate)
    write_documents(TO_JUDGE, articles[1::2])


def find_files(name: str, folder: Path) -> tuple[str, Path]:
    """What names a model, and its GGUF file in full precision."""
    own = gguf_file(name)
    if own is not None:
        return name, own
    source, file = DATA / name, folder / "base.gguf"
    if not file.exists():
        convert(source, file)
    return str(source), file


def unseen_windows(subject: Subject, source: str, tokenizer: Any) -> npt.NDArray[np.int64]:
    """Windows of a text without any sequence that was searched on or fitted to, shape (n_windows, WINDOW)."""
    seen = np.concatenate([draw(subject.text, tokenizer).tokens for draw in (calibration_set, fitting_set)])
    n_drawn = subject.n_windows + len(seen)
    drawn = calibration_set(TextSpec(source, n_drawn * WINDOW, WINDOW), tokenizer).tokens
    parts = np.lib.stride_tricks.sliding_window_view(drawn, seen.shape[1], axis=1)
    holds = [(parts == sequence).all(axis=2).any(axis=1) for sequence in seen]
    kept: npt.NDArray[np.int64] = drawn[~np.any(holds, axis=0)]
    return kept[: subject.n_windows]


def check_engine(model: Any, base: Path, tokens: npt.NDArray[np.int64], n_threads: int) -> None:
    """Stop if llama.cpp computes some types of the model's own file wrongly: its losses would be worth nothing."""
    own, by_engine = float(sequence_losses(model, tokens)[0]), llama_cpp_nll(base, tokens, n_threads).mean()
    if abs(own - by_engine) > ENGINE_TOLERANCE:
        raise SystemExit(
            f"error: of {base} {llama_cpp_package()} computes a loss of {by_engine:.3f}, transformers of {own:.3f}"
        )


def make_mixes(run: Run, source: str, base: Path) -> dict[tuple[str, str], Path]:
    """The files of llama.cpp's mixes, by mix and type of the embedding ("": the mix's own)."""
    kinds = [*product(run.subject.mixes, ("", *run.subject.embeddings)), *((mix, "") for mix in run.subject.rivals)]
    files = {(mix, kind): run.folder / f"{'-'.join(filter(None, (mix, kind)))}.gguf" for mix, kind in kinds}
    missing = {kinds: file for kinds, file in files.items() if not file.exists()}
    importance = tensor_importance(source, base, run.subject.text) if missing else {}
    for (mix, kind), file in missing.items():
        partial = file.with_suffix(".partial")
        make_mix(base, mix, importance, partial, kind)
        partial.replace(file)
    return files


def search_files(run: Run, request: Request, base: Path, mixes: Mapping[str, Path]) -> dict[str, Path]:
    """Our file of the size of each mix; the model's own file where a mix is larger than that."""
    ours = {mix: base for mix, file in mixes.items() if file.stat().st_size >= base.stat().st_size}
    searched = [mix for mix in mixes if mix not in ours]
    budgets = [f"{mixes[mix].stat().st_size}B" for mix in searched]
    with session_on(request, run.folder / run.label) as session:
        # As in a new folder, whatever was searched in this folder before.
        begin_with_nothing(session, ["active"], [Budget.parse(budget) for budget in budgets])
        for mix, plan in zip(searched, measured_plans(session, "active", budgets), strict=True):
            saved = saved_model(session, plan, run.folder / f"{run.label}-{mix}")
            ours[mix] = run.folder / f"{run.label}-{mix}.gguf"
            export_model(saved.folder, "gguf", ours[mix])
    return ours


def measure(run: Run) -> list[str]:
    """Make, search and judge all files of a model; returns the report."""
    run.folder.mkdir(parents=True, exist_ok=True)
    divide_wikipedia()
    subject, n_threads = run.subject, torch.get_num_threads()
    source, base = find_files(run.name, run.folder)
    loaded = load_model(source, device="cpu")
    tokens = HeldOut(WINDOW, subject.n_windows * WINDOW).windows(loaded.tokenizer).tokens
    check_engine(loaded.model, base, tokens[:1], n_threads)
    request = Request.from_options(
        model=source,
        backend=run.backend,
        bits=subject.bits[run.backend],
        granularity=run.granularity,
        embeddings=True,
        calibration=subject.text.source,
        tokens=subject.text.tokens,
        sequence_length=subject.text.sequence_length,
        loss="kl",
        target="gguf",
        base=None if gguf_file(run.name) else str(base),
    )
    made = make_mixes(run, source, base)
    mixes = {mix: made[mix, ""] for mix in subject.mixes}
    ours = search_files(run, request, base, mixes)
    texts = [tokens, *(unseen_windows(subject, text, loaded.tokenizer) for text in (str(TO_JUDGE), "c4"))]
    pairs = {mix: (file, ours[mix]) for mix, file in mixes.items()}
    files = list(dict.fromkeys([base, *(file for pair in pairs.values() for file in reversed(pair))]))
    judged = [judge_files(files, text, n_threads, run.folder) for text in texts]
    of_rivals = judge_files([base, *made.values(), *ours.values()], tokens, n_threads, run.folder)
    strongest = describe_strongest(made, ours, of_rivals.divergence)
    report = describe(run.command, request, base, pairs, judged, in_two_forms=subject is REFERENCE)
    return [*report, "", *strongest]


def main() -> None:
    """Measure one model, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("model", choices=SUBJECTS)
    parser.add_argument("--granularity", default="linear", choices=GRANULARITIES, help="what the players are")
    parser.add_argument("--backend", choices=REFERENCE.bits, help="what quantizes our files (default: ggml-gptq)")
    arguments = parser.parse_args()
    backend = arguments.backend or next(iter(SUBJECTS[arguments.model].bits))
    run = Run(arguments.model, arguments.granularity, backend)
    write_report(RESULTS / f"llama_mixes-{run.name}-{run.label}.md", measure(run))


if __name__ == "__main__":
    main()
