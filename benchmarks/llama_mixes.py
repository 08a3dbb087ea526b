"""Our GGUF files against llama.cpp's own mixes of the same size, perplexity by llama.cpp.

    python benchmarks/llama_mixes.py demo              # hours on two cores; resumes
    python benchmarks/llama_mixes.py demo --method first-last --budgets 2      # the whole way in minutes, for a look

llama.cpp's mixes are made by its own llama-quantize, with an importance matrix of the same calibration tokens that ours
is made from. Ours are searched under the size of each of their files, with the embedding as a player, exported, and
measured by the same engine on the same windows of WikiText-2. Writes docs/results/llama_mixes.md.
"""

import argparse
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import gguf
import ik_llama_cpp
import numpy as np
import torch
from rich.progress import Progress

from by_cpu import write_section
from coopq.backends.ggml import column_importance
from coopq.calibration import calibration_set, wikitext2
from coopq.checkpoint import is_saved_model, save_model
from coopq.export import export_model
from coopq.export.llama_cpp import llama_cpp_nll
from coopq.methods import measure, plans_on
from coopq.models import gguf_file, load_model
from coopq.players import find_players
from coopq.run import CalibrationConfig, RunConfig
from coopq.storage import Budget
from coopq.workbench import open_workbench
from main_job import bars_for

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "build" / "llama_mixes", ROOT / "docs" / "results" / "llama_mixes.md"
CALIBRATION = CalibrationConfig(sequences=8, length=256)
WINDOW, JUDGE_TOKENS = 512, 8 * 512
WIDTHS, MIXES = {"demo": (4, 5, 8)}, {"demo": ("Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S")}


def write_importance(file: Path, source: str, base: Path) -> None:
    """The importance matrix of our calibration tokens in llama.cpp's form."""
    loaded = load_model(source, device="cpu")
    names = [linear.name for player in find_players(loaded.model) for linear in player.linears]
    tokens = calibration_set(CALIBRATION, loaded.tokenizer).tokens
    of_file = gguf.GGUFReader(base)
    architecture = str(of_file.fields["general.architecture"].contents())
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    there = gguf.get_tensor_name_map(kinds[architecture], int(of_file.fields[f"{architecture}.block_count"].contents()))
    importance = column_importance(loaded.model, names, tokens)
    with file.open("wb") as handle:
        handle.write(struct.pack("<i", len(importance)))
        for name, values in importance.items():
            tensor = f"{there.get_name(name)}.weight".encode()
            handle.write(struct.pack("<i", len(tensor)) + tensor + struct.pack("<ii", 1, len(values)))
            handle.write(values.numpy().astype("<f4").tobytes())


def mix(base: Path, kind: str, importance: Path, out: Path) -> None:
    """One of llama.cpp's own mixes."""
    program = ik_llama_cpp.find_quantize_bin()
    assert program is not None
    command = [program, "--allow-requantize", "--imatrix", importance, base, out, kind]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def run(name: str, method: str, n_budgets: int | None) -> list[str]:
    """The table of a model."""
    source, work = name, WORK / name
    work.mkdir(parents=True, exist_ok=True)
    base = gguf_file(source)
    assert base is not None
    importance = work / "importance.dat"
    if not importance.exists():
        write_importance(importance, source, base)
    tokens = wikitext2(load_model(source, device="cpu").tokenizer, WINDOW, JUDGE_TOKENS).tokens
    theirs = {kind: work / f"{kind}.gguf" for kind in MIXES[name][:n_budgets]}
    for kind, file in theirs.items():
        if not file.exists():
            mix(base, kind, importance, file)
    low, *between, high = WIDTHS[name]
    config = RunConfig(
        source,
        "ggml",
        low=low,
        high=high,
        between=tuple(between),
        calibration=CALIBRATION,
        granularity="fused",
        embeddings=method != "first-last",
        target="gguf",
    )
    budgets = [Budget.parse(f"{file.stat().st_size}B") for file in theirs.values()]
    rows = []
    with Progress() as bars, open_workbench(config, work / "run", bars_for(bars, name)) as bench:
        plans = [measure(bench, plan) for plan in plans_on(bench, method, budgets)]
        for (kind, file), plan in zip(theirs.items(), plans, strict=True):
            saved, ours = work / f"{kind}-ours", work / f"{kind}-ours.gguf"
            if not is_saved_model(saved):
                save_model(bench.loaded, plan, bench.backend, bench.calibration.tokens, saved)
            export_model(saved, "gguf", ours)
            losses = [llama_cpp_nll(of, tokens, torch.get_num_threads()).mean(axis=1) for of in (file, ours)]
            rows.append((kind, file.stat().st_size, ours.stat().st_size, *losses))
    lines = [
        f"{replace(config, target=None).widths_text} bits by {config.granularity}, method {method}, "
        f"{CALIBRATION.sequences} x {CALIBRATION.length} tokens of C4.",
        "",
        "| llama.cpp's mix | its bytes | ours | its perplexity | ours | difference of losses, paired 95 % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, size, our_size, their_losses, our_losses in rows:
        difference = our_losses - their_losses
        drawn = difference[np.random.default_rng(0).integers(0, len(difference), size=(10_000, len(difference)))]
        least, most = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
        lines.append(
            f"| {kind} | {size:,} | {our_size:,} | {np.exp(their_losses.mean()):.2f} | {np.exp(our_losses.mean()):.2f} "
            f"| {difference.mean():+.4f} ({least:+.4f} to {most:+.4f}) |"
        )
    return lines


def main() -> None:
    """One model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MIXES)
    parser.add_argument("--method", default="active")
    parser.add_argument("--budgets", type=int, help="only the first mixes")
    arguments = parser.parse_args()
    lines = run(arguments.model, arguments.method, arguments.budgets)
    print("\n".join(lines))
    head = [
        "# Our GGUF files against llama.cpp's mixes",
        "",
        f"Written by `python benchmarks/llama_mixes.py`; {WINDOW}",
    ]
    if arguments.method == "active":
        head[-1] += (
            f"-token windows, {JUDGE_TOKENS} tokens of WikiText-2, all perplexities by llama.cpp (ik_llama.cpp)."
        )
        write_section(RESULTS, head, lines)


if __name__ == "__main__":
    main()
