"""An 8B model on one GPU: the time of a block forward, its share of the GPU's peak, and the time of whole searches.

    python benchmarks/gpu.py --run             # minutes on one GPU of 80 GB; writes docs/results/gpu.md
    python benchmarks/gpu.py                   # without whole runs of SPQE, M = 25, and of an active search
    python benchmarks/gpu.py --tokens 4096 --layers 4      # seconds: a few blocks; the rest is predicted

The shape of Llama-3.1-8B with random weights in bfloat16, made on the device: shapes decide speed. Weights at both
widths are rounded by `rtn` on the device and stay there. The time of searches is predicted for all 32 blocks and 16,384
tokens. A run with other options than `--run` alone writes build/gpu-trial.md. Without a GPU nothing is measured.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from _common import command_and_page, command_line, median_seconds, row, table, write_report
from coopq.cli.terminal import progress_bars
from coopq.core.specs import QuantizerSpec, Request
from coopq.core.subject import SizedRequest
from coopq.core.types import Assignment, Assignments, Game, Player, ProgressCallback
from coopq.game.engines.prefix_engine import PrefixEngine, make_engine, prefix_tree_size
from coopq.game.game import Meters, QuantizationGame
from coopq.game.journal import Journal
from coopq.model.blockwise import Blockwise, batch_size
from coopq.model.load import LoadedModel
from coopq.model.memory import Footprint
from coopq.model.players import find_players
from coopq.plan.forecast import forecast_methods
from coopq.quantizers import get_backend
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.sizes import packed_sizes
from coopq.search import SPQE, ActiveSearch, SearchSpace, run_search
from coopq.search.synthetic import SteppedGame, SyntheticGame

LENGTH, WALKS = 2048, 25
BLOCKS, TOKENS = 32, 16384
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 128256
COLUMNS = ("", "block forwards", "losses", "minutes")


def clock(work: Callable[[], object]) -> float:
    """The median time of five repeats, seconds."""
    return median_seconds(work, 5, torch.cuda.synchronize)


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
        game = QuantizationGame(paid, journal, progress, "active")
        meters = Meters(lambda _: game, 1, [player.block for player in players], nothing)
        run_search(ActiveSearch(space), meters)
    return meters


def main() -> None:
    """Measure, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="calibration tokens (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=BLOCKS, help="blocks (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="folder of the bank, 6 GB")
    parser.add_argument("--run", action="store_true", help="measure whole searches too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing was measured")
    with TemporaryDirectory(dir=arguments.folder) as folder, torch.no_grad(), progress_bars() as progress:
        measure(parser, arguments, Path(folder), progress)


@dataclass(frozen=True)
class Opened:
    """The model on the GPU, with its weights at both widths.

    Attributes:
        model: The model.
        players: The players: the blocks.
        engine: What measures losses.
        ids: Random tokens, shape (n_sequences, LENGTH).
        opening: Time of the first two losses, seconds: compiling, checks, reading the bank.
    """

    model: Any
    players: tuple[Player, ...]
    engine: PrefixEngine
    ids: npt.NDArray[np.int64]
    opening: float


def measure(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, folder: Path, progress: ProgressCallback
) -> None:
    """Measure everything with the bank in a folder; the report is written as soon as something is known."""
    request = Request.from_options(
        model="random", bits=(2, 4), permutations=WALKS, tokens=arguments.tokens, sequence_length=LENGTH
    )
    opened = open_model(request, arguments.layers, folder, progress)
    lines, block, head = describe_forwards(opened, request)
    command, page = command_and_page(parser, arguments, "gpu", run=True)
    title = f"Written by `{command}`: {arguments.layers} blocks of"
    lines = [title, *lines, "", *describe_forecast(request, block, head)]
    write_report(page, lines)
    if arguments.run:
        lines += ["", "Measured, the active search on the synthetic game of the forecast:", "", *table(COLUMNS, [])]
        for cells in measure_searches(opened, folder, progress):
            lines.append(row(cells))
            write_report(page, lines)


def open_model(request: Request, n_blocks: int, folder: Path, progress: ProgressCallback) -> Opened:
    """Make the model with random weights, quantize the weights, and measure two losses."""
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(shape_of(n_blocks), dtype=torch.bfloat16).eval()
    players = find_players(model)
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(request.text.n_sequences, LENGTH))
    bank = WeightBank(folder, LoadedModel(model, None, torch.bfloat16), players, get_backend(QuantizerSpec("rtn")), {})
    bank.build((2, 4), progress=progress)
    torch.cuda.reset_peak_memory_stats()
    engine = make_engine(model, bank, ids)
    start = time.perf_counter()
    losses_of(engine, np.array([[2] * len(players), [4] * len(players)], dtype=np.float32))
    return Opened(model, players, engine, ids, time.perf_counter() - start)


def describe_forwards(opened: Opened, request: Request) -> tuple[list[str], float, float]:
    """Times of a block forward and of the head, compiled and not, and how exact the compiled model is.

    Returns:
        Lines of the report; the time of a block forward and of the head with the loss, seconds.
    """
    engine, blockwise, text = opened.engine, opened.engine.blockwise, request.text
    block, head = engine.timed(clock)
    held = torch.cuda.max_memory_allocated()
    with blockwise.fast(0):
        states = [batch.clone() for batch in blockwise.forward_block(0, blockwise.embedded)]
    points = walk_points(opened.players)
    some = points[:: max(1, len(points) // 8)]
    losses = losses_of(engine, some)
    with torch.compiler.set_stance("force_eager"):
        plain_block, plain_head = engine.timed(clock)
        plain_states = blockwise.forward_block(0, blockwise.embedded)
        plain_losses = losses_of(engine, some)
    exact = in_float32(opened.model, opened.ids)
    torch.cuda.empty_cache()

    batch = min(batch_size("cuda", LENGTH), text.n_sequences) * LENGTH
    peak = 2 * 8192**3 / clock(product(8192, 8192, 8192))
    shapes = [linear.shape for linear in opened.players[0].linears]
    products = sum(clock(partial(product(batch, into, out))) for out, into in shapes) * text.tokens / batch
    block_flop = 2 * text.tokens * opened.players[0].n_weights
    head_flop = 2 * text.tokens * SHAPE["hidden_size"] * VOCABULARY
    rows = [
        [
            name,
            f"{taken * 1e3:.1f}",
            f"{flop / taken / 1e12:.0f}",
            f"{flop / taken / peak:.0%}",
            f"{plain * 1e3:.1f} ({flop / plain / peak:.0%})",
        ]
        for name, flop, taken, plain in (
            ("block forward", block_flop, block, plain_block),
            ("head with the loss", head_flop, head, plain_head),
        )
    ]
    predicted = Footprint.estimate(opened.model, opened.players, text, "cuda").total
    lines = [
        f"Llama-3.1-8B's shape, random weights, bfloat16, {text.tokens:,} tokens in sequences of {LENGTH:,},",
        f"batches of {batch:,}; {torch.cuda.get_device_name()}, torch {torch.__version__},",
        f"transformers {transformers.__version__}. Medians of five.",
        "",
        f"* Peak, a product of 8192 x 8192 matrices: {peak / 1e12:.0f} TFLOP/s. The products of a block alone take",
        f"  {products * 1e3:.1f} ms.",
        "",
        *table(["", "ms", "TFLOP/s in its products", "share of the peak", "by torch's own operations, ms"], rows),
        "",
        f"* States after the first block, off those in float32 by {off(states, exact):.1e} of their norm; by torch's",
        f"  own operations by {off(plain_states, exact):.1e}.",
        f"* Losses of {len(losses)} assignments: {np.abs(losses - plain_losses).mean():.1e} nats from those by torch's",
        f"  own operations, in the mean, of {losses.mean():.2f}; they differ among themselves by {losses.std():.1e}.",
        f"* Compiling, the check and reading the bank, with the first two losses: {opened.opening:.0f} s.",
        f"* Memory: {held / 2**30:.1f} GiB at the peak,",
        f"  {predicted / 2**30:.1f} GiB predicted.",
    ]
    return lines, block, head


def describe_forecast(request: Request, block: float, head: float) -> list[str]:
    """The time of whole searches on all blocks, from the times of a block forward and of the head, seconds."""
    with torch.device("meta"):
        whole = find_players(AutoModelForCausalLM.from_config(shape_of(BLOCKS)))
    sizes = packed_sizes(whole, get_backend(request.quantizer), request.widths.bits)
    asked = SizedRequest(request, tuple(whole), sizes)
    scale = TOKENS / request.text.tokens
    rows = [
        [
            name,
            f"{'up to ' * work.is_bound}{work.block_forwards:,}",
            f"{work.evaluations:,}",
            f"{scale * (work.block_forwards * block + work.evaluations * head) / 60:.1f}",
        ]
        for name, work in forecast_methods(asked).items()
        if name == "active" or name.startswith("coopq")
    ]
    return [f"Predicted for {BLOCKS} blocks and {TOKENS:,} tokens:", "", *table(COLUMNS, rows)]


def measure_searches(opened: Opened, folder: Path, progress: ProgressCallback) -> Iterator[list[str]]:
    """Run the walks of SPQE and an active search; yields a row of the report for each."""
    points, blocks = walk_points(opened.players), [player.block for player in opened.players]
    start, n_points = time.perf_counter(), len(np.unique(points, axis=0))
    for done, _ in enumerate(opened.engine.evaluate(points), start=1):
        progress("SPQE", done, n_points)
    minutes = (time.perf_counter() - start) / 60
    yield [f"coopq, M = {WALKS}", f"{prefix_tree_size(points, blocks):,}", f"{n_points:,}", f"{minutes:.1f}"]
    start = time.perf_counter()
    meters = active(opened.engine, opened.players, folder, progress)
    minutes = (time.perf_counter() - start) / 60
    yield ["active", f"{meters.block_forwards:,.0f}", f"{meters.evaluations:,.0f}", f"{minutes:.1f}"]


def walk_points(players: tuple[Player, ...]) -> Assignments:
    """The assignments of the walks of SPQE."""
    return SPQE(len(players), low=2, high=4, permutations=WALKS, seed=0).points


def shape_of(n_blocks: int) -> LlamaConfig:
    """The configuration of the model."""
    return LlamaConfig(num_hidden_layers=n_blocks, vocab_size=VOCABULARY, **SHAPE)


if __name__ == "__main__":
    main()
