"""SPQE as CoopQ runs it against the paper's protocol written plainly: wall-clock, and where the difference comes from.

    python benchmarks/protocol.py                      # ten walks on 1,024 tokens; half an hour on two cores
    python benchmarks/protocol.py --permutations 3     # fewer walks share less, and take less time

The plain protocol quantizes the block anew by Quanto, in place, at every step of every walk, and the whole model
computes the loss of all tokens. Both ways have the same walks, tokens, threads and dtype, run one after the other in
one process, and must agree on every loss. Writes docs/results/protocol.md.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.progress import track

from _common import command_and_page, command_line, table, write_section
from _models import sequence_losses, session_on
from coopq.core.specs import Request
from coopq.model.blockwise import BATCH_TOKENS
from coopq.model.load import load_model, load_skeleton
from coopq.model.players import find_players
from coopq.model.texts import calibration_set
from coopq.quantizers import get_backend
from coopq.quantizers.backend import WeightQuantizer
from coopq.search import SPQE

LENGTH, LOW, HIGH = 256, 2, 4


class Clock(Counter[str]):
    """Seconds by kind of work."""

    @contextmanager
    def running(self, kind: str) -> Iterator[None]:
        """Count the time inside the `with` block."""
        start = time.perf_counter()
        yield
        self[kind] += time.perf_counter() - start  # type: ignore[assignment]


def run_plainly(request: Request, spqe: SPQE, clock: Clock) -> list[float]:
    """The losses of all walks, step by step."""
    loaded = load_model(request.model.source)
    backend, players = get_backend(request.quantizer, request.widths.bits), find_players(loaded.model)
    assert isinstance(backend, WeightQuantizer)
    tokens = calibration_set(request.text, loaded.tokenizer).tokens
    originals = {
        linear.name: loaded.model.get_submodule(linear.name).weight.data.clone()
        for player in players
        for linear in player.linears
    }

    def requantize(player: int, bits: int) -> None:
        for linear in players[player].linears:
            packed = backend.quantize(originals[linear.name], bits)
            weight = backend.dequantize(packed, linear.shape, bits, torch.float32)
            loaded.model.get_submodule(linear.name).weight.data.copy_(weight)

    losses: list[float] = []
    for order in track(spqe.orders, description="plainly"):
        with clock.running("quantizing"):
            for player in range(len(players)):
                requantize(player, HIGH)
        for lowered in (None, *order):
            with clock.running("quantizing"):
                if lowered is not None:
                    requantize(int(lowered), LOW)
            with clock.running("forwards"):
                losses.append(float(sequence_losses(loaded.model, tokens).mean()))
    return losses


def run_by_coopq(request: Request, spqe: SPQE, clock: Clock) -> tuple[list[float], int]:
    """The same losses by the prefix tree, and the block forwards of the prefix tree."""
    with TemporaryDirectory() as folder:
        opening = session_on(request, Path(folder))
        with clock.running("quantizing"):
            session = opening.__enter__()
        with clock.running("forwards"), session.game("walks") as game:
            losses = game(spqe.points).tolist()
            block_forwards = game.journal.block_forwards
        opening.__exit__(None, None, None)
    return losses, block_forwards


def teraflop(block_forwards: int, heads: int, tokens: int) -> float:
    """Operations of the linear layers and the head, 10^12."""
    skeleton = load_skeleton("demo")
    block = sum(player.n_weights for player in find_players(skeleton) if player.block == 0)
    head = int(skeleton.get_output_embeddings().weight.numel())
    return 2e-12 * tokens * (block_forwards * block + heads * head)


def main() -> None:
    """Run both ways, and write the section of this processor."""
    parser = command_line(__doc__)
    parser.add_argument("--permutations", type=int, default=10, help="walks")
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens")
    arguments = parser.parse_args()
    command, page = command_and_page(parser, arguments, "protocol")
    request = Request.from_options(
        model="demo", backend="quanto", bits=(LOW, HIGH), tokens=arguments.tokens, sequence_length=LENGTH
    )
    spqe = SPQE(30, low=LOW, high=HIGH, permutations=arguments.permutations, seed=0)
    plain, ours = Clock(), Clock()
    expected = run_plainly(request, spqe, plain)
    found, shared = run_by_coopq(request, spqe, ours)
    worst = float(np.abs(np.array(found) - expected).max())
    assert worst < 1e-3, worst
    unshared, distinct = len(expected) * 30, len(np.unique(spqe.points, axis=0))
    work = teraflop(unshared, len(expected), arguments.tokens), teraflop(shared, distinct, arguments.tokens)
    rates = [1000 * done / clock["forwards"] for done, clock in zip(work, (plain, ours), strict=True)]
    head = [
        f"Written by `{command}`: SmolLM2-135M-Instruct, Quanto at {LOW} and {HIGH} bits,",
        f"sequences of {LENGTH} tokens, float32, batches of {BATCH_TOKENS['cpu']} tokens in both. Loading the model",
        "counts as quantizing, for CoopQ alone.",
    ]
    seconds = [
        (f"seconds, {kind}", f"{plain[kind]:.0f}", f"{ours[kind]:.0f}", f"{plain[kind] / ours[kind]:.2f}")
        for kind in ("quantizing", "forwards")
    ]
    total = plain.total(), ours.total()
    rows = [
        *seconds,
        ("seconds, all", f"{total[0]:.0f}", f"{total[1]:.0f}", f"**{total[0] / total[1]:.2f}**"),
        ("block forwards", unshared, shared, f"{unshared / shared:.2f}"),
        ("heads", len(expected), distinct, f"{len(expected) / distinct:.2f}"),
        ("TFLOP in linear layers and heads", f"{work[0]:.1f}", f"{work[1]:.1f}", f"{work[0] / work[1]:.2f}"),
        ("GFLOP/s, forwards", f"{rates[0]:.0f}", f"{rates[1]:.0f}", f"{rates[1] / rates[0]:.2f}"),
    ]
    lines = [
        f"{arguments.permutations} walks, {arguments.tokens} tokens, {torch.get_num_threads()} threads,",
        f"torch {torch.__version__}. The losses agree to {worst:.0e} nats.",
        "",
        *table(["", "plainly", "CoopQ", "ratio"], rows),
    ]
    write_section(page, head, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
