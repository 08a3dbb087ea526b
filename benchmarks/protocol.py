"""SPQE as CoopQ runs it against the paper's protocol written plainly: wall-clock, and where the difference comes from.

    python benchmarks/protocol.py                      # ten walks on 1,024 tokens; half an hour on two cores
    python benchmarks/protocol.py --permutations 3     # less to share, and less to wait for

Plainly: for every step of every walk the block is quantized anew by Quanto, in place, and the whole model computes the
loss of all tokens. Both take the same walks, tokens, threads and dtype, one after the other in one process, and must
agree on every loss. Writes docs/results/protocol.md.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.progress import Progress

from by_cpu import write_section
from coopq.quantizers import get_backend
from coopq.model.texts import calibration_set
from coopq.game.prefix_engine import model_nll
from coopq.search import SPQE
from coopq.model.load import load_model, load_skeleton
from coopq.model.players import find_players
from coopq.model.blockwise import BATCH_TOKENS
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.game.session import open_workbench
from main_job import bars_for

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "protocol.md"
LENGTH, LOW, HIGH = 256, 2, 4


class Clock(Counter[str]):
    """Seconds by what they went into."""

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Count what passes inside."""
        start = time.perf_counter()
        yield
        self[what] += time.perf_counter() - start  # type: ignore[assignment]


def plainly(config: RunConfig, spqe: SPQE, clock: Clock) -> list[float]:
    """The losses of all walks, step by step."""
    loaded = load_model(config.model)
    backend, players = get_backend("quanto", bits=(LOW, HIGH)), find_players(loaded.model)
    tokens = calibration_set(config.calibration, loaded.tokenizer).tokens
    originals = {
        linear.name: loaded.model.get_submodule(linear.name).weight.data.clone()
        for p in players
        for linear in p.linears
    }

    def requantize(player: int, bits: int) -> None:
        for linear in players[player].linears:
            packed = backend.quantize(originals[linear.name], bits)
            weight = backend.dequantize(packed, linear.shape, bits, torch.float32)
            loaded.model.get_submodule(linear.name).weight.data.copy_(weight)

    losses: list[float] = []
    with Progress() as bars:
        for order in bars.track(spqe.orders, description="plainly"):
            with clock.running("quantizing"):
                for player in range(len(players)):
                    requantize(player, HIGH)
            for player in (None, *order):
                with clock.running("quantizing"):
                    if player is not None:
                        requantize(int(player), LOW)
                with clock.running("forwards"):
                    losses.append(float(np.concatenate(list(model_nll(loaded.model, tokens))).mean()))
    return losses


def by_coopq(config: RunConfig, spqe: SPQE, clock: Clock) -> tuple[list[float], int]:
    """The same losses by the prefix tree, and its layer forwards."""
    with TemporaryDirectory() as folder, Progress() as bars:
        with clock.running("quantizing"):
            opened = open_workbench(config, Path(folder), bars_for(bars, "coopq"))
            bench = opened.__enter__()
        with clock.running("forwards"), bench.calibration_game("walks") as game:
            losses = game(spqe.points).tolist()
            spent = game.journal.layer_forwards
        opened.__exit__(None, None, None)
    return losses, spent


def teraflops(layer_forwards: int, heads: int, tokens: int) -> float:
    """Operations of the linear layers and the head, 10^12."""
    skeleton = load_skeleton("demo")
    block = sum(player.n_weights for player in find_players(skeleton) if player.block == 0)
    head = int(skeleton.get_output_embeddings().weight.numel())
    return 2e-12 * tokens * (layer_forwards * block + heads * head)


def main() -> None:
    """Run both and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--permutations", type=int, default=10, help="walks")
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    calibration = CalibrationConfig(sequences=arguments.tokens // LENGTH, length=LENGTH)
    config = RunConfig("demo", "quanto", low=LOW, high=HIGH, calibration=calibration)
    spqe = SPQE(30, low=LOW, high=HIGH, permutations=arguments.permutations, seed=0)
    plain, ours = Clock(), Clock()
    expected = plainly(config, spqe, plain)
    found, spent = by_coopq(config, spqe, ours)
    worst = float(np.abs(np.array(found) - expected).max())
    assert worst < 1e-3, worst
    unshared = len(expected) * 30
    distinct = len(np.unique(spqe.points, axis=0))
    work = teraflops(unshared, len(expected), arguments.tokens), teraflops(spent, distinct, arguments.tokens)
    rates = [1000 * done / clock["forwards"] for done, clock in zip(work, (plain, ours), strict=True)]
    head = [
        "# SPQE against the paper's protocol written plainly",
        "",
        f"Written by `python benchmarks/protocol.py`: SmolLM2-135M-Instruct, Quanto at {LOW} and {HIGH} bits,",
        f"sequences of {LENGTH} tokens, float32, batches of {BATCH_TOKENS['cpu']} tokens in both. Loading the model",
        "counts as quantizing, for CoopQ alone.",
    ]
    lines = [
        f"{arguments.permutations} walks, {arguments.tokens} tokens, {torch.get_num_threads()} threads,",
        f"torch {torch.__version__}. The losses agree to {worst:.0e} nats.",
        "",
        "| | plainly | CoopQ | ratio |",
        "| --- | --- | --- | --- |",
        *(
            f"| seconds, {what} | {plain[what]:.0f} | {ours[what]:.0f} | {plain[what] / ours[what]:.2f} |"
            for what in ("quantizing", "forwards")
        ),
        f"| seconds, all | {plain.total():.0f} | {ours.total():.0f} | **{plain.total() / ours.total():.2f}** |",
        f"| layer forwards | {unshared} | {spent} | {unshared / spent:.2f} |",
        f"| heads | {len(expected)} | {distinct} | {len(expected) / distinct:.2f} |",
        f"| TFLOP in linear layers and heads | {work[0]:.1f} | {work[1]:.1f} | {work[0] / work[1]:.2f} |",
        f"| GFLOP/s, forwards | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} |",
    ]
    write_section(RESULTS, head, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
