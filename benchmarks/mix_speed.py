"""How fast llama.cpp computes with mixed files: CoopQ's, llama.cpp's mixes, and files of one type for all layers.

    python benchmarks/mix_speed.py          # half an hour on one core; nothing else should run; resumes

llama.cpp's mixes of the reference Llama are those of benchmarks/llama_mixes.py llama, which must be there; CoopQ's
files have their sizes. That Llama is too small to tell anything about speed, so the rows and their number are four
times as large when speed is measured, with random weights: only shape and types matter. All files are measured in
turn, several times. Writes docs/results/mix_speed.md.
"""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median

import gguf
import torch
from torch import Tensor

from _common import RESULTS, WORK, command_line, processor, table, write_report
from _models import saved_model, session_on, source_of
from _speed_models import N_PROMPT, N_WRITTEN, ROUNDS, Shape, in_turn, one_type, write_model
from coopq.core.goal import Limit
from coopq.core.recipes import RECIPES
from coopq.core.sizes import Budget
from coopq.core.specs import DEFAULT_SOLVER, Request
from coopq.core.types import UNTOUCHED
from coopq.export.formats import export_model
from coopq.game.prepared import usable_bits
from coopq.model.load import load_model
from coopq.model.texts import HeldOut
from coopq.plan.methods import make_plans
from ggml_types import log_probabilities

MIXES_FOLDER, FOLDER = WORK / "llama_mixes" / "llama", WORK / "mix_speed"
SHAPE = Shape(n_blocks=12, width=1024, inner=3072, n_heads=16, n_kv_heads=8)
"""Four times the reference Llama's width."""
MIXES = ("Q2_K", "Q3_K_M", "Q4_K_S")
TYPES = ("IQ2_XXS", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
FORWARDS = 60
LENGTH, HELD_OUT = 512, 32 * 512


NAMES = {"llama.cpp": "CoopQ", "speed": "CoopQ, speed"}
"""Names of CoopQ's files by recipe."""


def search_files(recipe: str, base: Path) -> dict[tuple[str, str], Path]:
    """CoopQ's file of the size of each mix, by a recipe."""
    settings = {key: setting.value for key, setting in RECIPES[recipe].settings.items()}
    settings["bits"] = tuple(width for width in settings["bits"] if width != UNTOUCHED)  # the base is in full precision
    request = Request.from_options(
        model=source_of("llama"), **settings, sequence_length=512, target="gguf", base=str(base)
    )
    request = request.replace(bits=usable_bits(request))
    budgets = [Budget.parse(f"{(MIXES_FOLDER / f'{mix}.gguf').stat().st_size}B") for mix in MIXES]
    files = {}
    with session_on(request, FOLDER / recipe) as session:
        plans = make_plans(session, "active", budgets, DEFAULT_SOLVER, Limit(forwards=FORWARDS))
        for mix, plan in zip(MIXES, plans, strict=True):
            file = files[NAMES[recipe], mix] = FOLDER / f"{recipe}-{mix}.gguf"
            saved = saved_model(session, plan, FOLDER / f"{recipe}-{mix}")
            export_model(saved.folder, "gguf", file)
    return files


@torch.no_grad()
def divergences(files: Mapping[tuple[str, str], Path], base: Path) -> dict[tuple[str, str], float]:
    """Divergence from the original on WikiText-2, nats per token."""
    original = load_model(str(base), dtype="float32", device="cpu")
    windows = HeldOut(LENGTH, HELD_OUT).windows(original.tokenizer).tokens
    full = log_probabilities(original.model, windows)

    def divergence(predicted: Tensor) -> float:
        return float((full.exp() * (full - predicted)).sum(dim=-1).mean())

    models = {key: load_model(str(file), dtype="float32", device="cpu").model for key, file in files.items()}
    return {key: divergence(log_probabilities(model, windows)) for key, model in models.items()}


def enlarged(files: Mapping[tuple[str, str], Path], base: Path) -> dict[tuple[str, str], tuple[Path, float]]:
    """Large files with the types of small ones, and with one type each: their paths and their bits per weight."""
    types: dict[tuple[str, str], Mapping[str, str]] = {("one type", name): one_type(name, name) for name in TYPES}
    for key, file in files.items():
        types[key] = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    reader, written = gguf.GGUFReader(base), {}
    for key, kinds in types.items():
        file = FOLDER / f"large-{'-'.join(key)}.gguf"
        written[key] = file, 8 * write_model(file, reader, SHAPE, kinds) / SHAPE.n_weights
    return written


def measure() -> list[str]:
    """The report."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    base = MIXES_FOLDER / "base.gguf"
    files = {("llama.cpp's mix", mix): MIXES_FOLDER / f"{mix}.gguf" for mix in MIXES}
    for recipe in NAMES:
        files |= search_files(recipe, base)
    diverges, large = divergences(files, base), enlarged(files, base)
    found, rows = in_turn({key: file for key, (file, _) in large.items()}), []
    for key, (file, bits) in large.items():
        divergence = f"{diverges[key]:.4f}" if key in diverges else ""
        prompt, written = found[key].prompt, found[key].written
        spread = f"{median(written):.1f} ({written[0]:.1f} to {written[-1]:.1f})"
        rows.append([*key, f"{bits:.2f}", f"{file.stat().st_size:,}", divergence, f"{median(prompt):.0f}", spread])
        file.unlink()
    columns = ["types by", "size of", "bits per weight", "bytes", "divergence", "prompt, tokens/s"]
    n_weights = f"{SHAPE.n_weights / 1e6:.0f} million"
    return [
        f"Written by `python benchmarks/mix_speed.py`: {processor()}, one thread, xllamacpp {version('xllamacpp')}.",
        f"A Llama of {SHAPE.n_blocks} blocks, with {n_weights} random weights in its layers. Each layer and the",
        "embedding have the type of the same tensor in a file of the reference Llama. Bits per weight are those of the",
        "layers.",
        f"Divergence is that of the reference Llama's file, on {HELD_OUT // LENGTH} x {LENGTH} tokens of WikiText-2.",
        f"CoopQ: the recipe of llama.cpp, and `--recipe speed`, by {FORWARDS} forwards.",
        f"Prompts of {N_PROMPT} tokens, {N_WRITTEN} tokens written, medians of {ROUNDS} rounds over all files.",
        "",
        *table([*columns, "generation, tokens/s"], rows),
    ]


if __name__ == "__main__":
    command_line(__doc__).parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    write_report(RESULTS / "mix_speed.md", measure())
