"""An 8B model on one GPU: the time of a block forward, its share of the GPU's peak, and the time of whole searches.

    python benchmarks/gpu.py                   # minutes on one GPU of 80 GB
    python benchmarks/gpu.py --run             # also measures all of SPQE, M = 25, and of an active search
    python benchmarks/gpu.py --tokens 4096 --layers 4      # seconds: a few blocks; the rest is predicted

The shape of Llama-3.1-8B with random weights in bfloat16, made on the device: shapes decide speed. Weights at both
widths are rounded by `rtn` on the device and stay there. The time of searches is predicted for all 32 blocks and 16,384
tokens. Writes docs/results/gpu.md. Without a GPU nothing is measured.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from coopq.cli.terminal import progress_bars
from coopq.core.specs import QuantizerSpec, Request
from coopq.core.types import Assignment, Assignments, Game, Player, ProgressCallback
from coopq.game.game import Meters, QuantizationGame
from coopq.game.journal import Journal
from coopq.game.prefix_engine import PrefixEngine, make_engine, prefix_tree_size
from coopq.model.blockwise import Blockwise, batch_size
from coopq.model.load import LoadedModel
from coopq.model.memory import Footprint
from coopq.model.players import find_players
from coopq.plan.forecast import forecast_methods
from coopq.quantizers import get_backend
from coopq.quantizers.bank import WeightBank
from coopq.search import SPQE, ActiveSearch, SearchSpace, run_search
from coopq.search.synthetic import SteppedGame, SyntheticGame

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "gpu.md"
LENGTH, WALKS = 2048, 25
BLOCKS, TOKENS = 32, 16384
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 128256


def clock(work: Callable[[], object]) -> float:
    """Seconds of one repeat, the median of five after a warm-up."""
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def product(n: int, into: int, out: int) -> Callable[[], object]:
    """A product of a linear layer's shape in bfloat16."""
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((n, into), (into, out)))
    return lambda: torch.mm(a, b)


def off(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm of a difference as a share of the norm."""
    ours, exact = (torch.cat(states).float() for states in (found, expected))
    return float((ours - exact).norm() / exact.norm())


def in_float32(model: Any, ids: npt.NDArray[np.int64]) -> list[torch.Tensor]:
    """States after the first block, computed in 32 bits from the same weights."""
    with torch.device("cuda"):
        first = AutoModelForCausalLM.from_config(shape_of(1), dtype=torch.float32).eval()
    first.load_state_dict(model.state_dict(), strict=False)
    blockwise = Blockwise(first, ids)
    blockwise.record()
    return blockwise.forward_block(0, blockwise.embedded)


def losses_of(engine: PrefixEngine, points: Assignments) -> npt.NDArray[np.float64]:
    """Mean losses of distinct assignments, nats per token, in lexicographic order."""
    return np.array([losses.mean() for _, losses, _ in engine.evaluate(points)])


class Paid:
    """Measures every assignment, but returns the loss of a synthetic game: random weights make no game."""

    def __init__(self, engine: PrefixEngine, game: Game) -> None:
        self._engine = engine
        self._game = game

    def evaluate(self, assignments: Assignments) -> Iterator[tuple[Assignment, npt.NDArray[np.float64], int]]:
        """See `coopq.game.game.Engine`."""
        for assignment, _, spent in self._engine.evaluate(assignments):
            yield assignment, self._game(assignment[None]), spent


def active(engine: PrefixEngine, players: tuple[Player, ...], folder: Path, progress: ProgressCallback) -> Meters:
    """An active search for one budget halfway between the widths, with a journal; returns what the search took."""
    step_bytes = np.array([2 * player.n_weights for player in players])
    space = SearchSpace.uniform((2, 4), step_bytes, (int(step_bytes.sum()) // 2,))
    paid = Paid(engine, SteppedGame(SyntheticGame(len(players), "quadratic", 0), space))
    nothing = np.zeros((0, len(players)), dtype=np.float32)
    with Journal(folder / "journal.jsonl", {}) as journal:
        game = QuantizationGame(paid, journal, len(players), progress, "active")
        meters = Meters(lambda _: game, 1, [player.block for player in players], nothing)
        run_search(ActiveSearch(space, None, nothing), meters)
    return meters


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--layers", type=int, default=BLOCKS)
    parser.add_argument("--folder", type=Path, help="for the bank, 28 GB of it; memory-backed is faster")
    parser.add_argument("--run", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing was measured")
    with TemporaryDirectory(dir=arguments.folder) as folder, torch.no_grad(), progress_bars() as progress:
        measure(arguments, Path(folder), progress)


def measure(arguments: argparse.Namespace, folder: Path, progress: ProgressCallback) -> None:
    """Measure all with the bank in a folder; results are written as soon as they are known."""
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(shape_of(arguments.layers), dtype=torch.bfloat16).eval()
    players = find_players(model)
    request = Request.from_options(
        model="random", bits=(2, 4), permutations=WALKS, tokens=arguments.tokens, sequence_length=LENGTH
    )
    text = request.text
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(text.n_sequences, LENGTH))
    points = SPQE(len(players), low=2, high=4, permutations=WALKS, seed=0).points
    ends = np.array([[2] * len(players), [4] * len(players)], dtype=np.float32)
    bank = WeightBank(folder, LoadedModel(model, None, torch.bfloat16), players, get_backend(QuantizerSpec("rtn")), {})
    bank.build((2, 4), progress=progress)

    torch.cuda.reset_peak_memory_stats()
    engine = make_engine(model, bank, ids)
    blockwise = engine.blockwise
    start = time.perf_counter()
    losses_of(engine, ends)  # compiles, checks, reads the bank
    opening = time.perf_counter() - start
    layer, head = engine.timed(clock)
    held = torch.cuda.max_memory_allocated()
    with blockwise.fast(0):
        states = [batch.clone() for batch in blockwise.forward_block(0, blockwise.embedded)]
    some = points[:: max(1, len(points) // 8)]
    losses = losses_of(engine, some)
    with torch.compiler.set_stance("force_eager"):
        plain_layer, plain_head = engine.timed(clock)
        plain_states = blockwise.forward_block(0, blockwise.embedded)
        plain_losses = losses_of(engine, some)
    exact = in_float32(model, ids)
    torch.cuda.empty_cache()

    batch = min(batch_size("cuda", LENGTH), text.n_sequences) * LENGTH
    peak = 2 * 8192**3 / clock(product(8192, 8192, 8192))
    shapes = [linear.shape for linear in players[0].linears]
    products = sum(clock(partial(product(batch, into, out))) for out, into in shapes) * arguments.tokens / batch
    flops = 2 * arguments.tokens * players[0].n_weights
    head_flops = 2 * arguments.tokens * SHAPE["hidden_size"] * VOCABULARY
    with torch.device("meta"):
        whole = find_players(AutoModelForCausalLM.from_config(shape_of(BLOCKS)))
    predicted, scale = forecast_methods(whole, request), TOKENS / arguments.tokens
    lines = [
        "# An 8B model on one GPU",
        "",
        "Written by `python benchmarks/gpu.py"
        + ("" if arguments.layers == BLOCKS else f" --layers {arguments.layers}")
        + ("" if arguments.tokens == TOKENS else f" --tokens {arguments.tokens}")
        + (" --run" if arguments.run else "")
        + f"`: {arguments.layers} blocks of",
        f"Llama-3.1-8B's shape, random weights, bfloat16, {arguments.tokens:,} tokens in sequences of {LENGTH:,},",
        f"batches of {batch:,}; {torch.cuda.get_device_name()}, torch {torch.__version__},",
        f"transformers {transformers.__version__}. Medians of five.",
        "",
        f"* Peak, a product of 8192 x 8192 matrices: {peak / 1e12:.0f} TFLOP/s. The products of a block alone take",
        f"  {products * 1e3:.1f} ms.",
        "",
        "| | ms | TFLOP/s in its products | share of the peak | by torch's own operations, ms |",
        "| --- | --- | --- | --- | --- |",
        f"| block forward | {layer * 1e3:.1f} | {flops / layer / 1e12:.0f} | {flops / layer / peak:.0%} "
        f"| {plain_layer * 1e3:.1f} ({flops / plain_layer / peak:.0%}) |",
        f"| head with the loss | {head * 1e3:.1f} | {head_flops / head / 1e12:.0f} | {head_flops / head / peak:.0%} "
        f"| {plain_head * 1e3:.1f} ({head_flops / plain_head / peak:.0%}) |",
        "",
        f"* States after the first block, off those in float32 by {off(states, exact):.1e} of their norm; by torch's",
        f"  own operations by {off(plain_states, exact):.1e}.",
        f"* Losses of {len(losses)} assignments: {np.abs(losses - plain_losses).mean():.1e} nats from those by torch's",
        f"  own operations, in the mean, of {losses.mean():.2f}; they differ among themselves by {losses.std():.1e}.",
        f"* Compiling, the check and reading the bank, with the first two losses: {opening:.0f} s.",
        f"* Memory: {held / 2**30:.1f} GiB at the peak,",
        f"  {Footprint.estimate(model, players, text, 'cuda').total / 2**30:.1f} GiB predicted.",
        "",
        f"Predicted for {BLOCKS} blocks and {TOKENS:,} tokens:",
        "",
        "| | block forwards | losses | minutes |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {'up to ' * work.is_bound}{work.block_forwards:,} | {work.evaluations:,} "
            f"| {scale * (work.block_forwards * layer + work.evaluations * head) / 60:.1f} |"
            for name, work in predicted.items()
            if name == "active" or name.startswith("coopq")
        ),
    ]
    report(lines)
    if arguments.run:
        lines += [
            "",
            "Measured, the active search on the synthetic game of the forecast:",
            "",
            "| | block forwards | losses | minutes |",
            "| --- | --- | --- | --- |",
        ]
        start, blocks = time.perf_counter(), [player.block for player in players]
        for done, _ in enumerate(engine.evaluate(points)):
            progress("SPQE", done + 1, len(np.unique(points, axis=0)))
        minutes = (time.perf_counter() - start) / 60
        lines.append(f"| coopq, M = {WALKS} | {prefix_tree_size(points, blocks):,} | {done + 1:,} | {minutes:.1f} |")
        report(lines)
        start = time.perf_counter()
        meters = active(engine, players, folder, progress)
        minutes = (time.perf_counter() - start) / 60
        report([*lines, f"| active | {meters.block_forwards:,.0f} | {meters.evaluations:,.0f} | {minutes:.1f} |"])


def shape_of(n_blocks: int) -> LlamaConfig:
    """The configuration of the model."""
    return LlamaConfig(num_hidden_layers=n_blocks, vocab_size=VOCABULARY, **SHAPE)


def report(lines: list[str]) -> None:
    """Write and print the results so far."""
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
