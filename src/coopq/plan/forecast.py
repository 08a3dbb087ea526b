"""What a run will take, from a look at the model and two seconds of measurement."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from coopq.core.specs import Request
from coopq.core.subject import SizedRequest
from coopq.game.engines.prefix_engine import make_engine, prefix_tree_size
from coopq.game.game import Meters
from coopq.game.session import prepare
from coopq.model.blockwise import batch_size
from coopq.model.memory import Footprint
from coopq.plan.methods import METHODS, names
from coopq.plan.scores.prior import SCORE
from coopq.plan.searches.by_search import make_search
from coopq.quantizers.bank import WeightBank
from coopq.search import SPQE, Search, SearchSpace, run_search
from coopq.search.solver.local_search import random_fill
from coopq.search.strategies.active import most_points
from coopq.search.strategies.exhaustive import MOST_PLAYERS, n_assignments
from coopq.search.synthetic import SteppedGame, SyntheticGame

_SECONDS = 1.0
"""How long the block is timed, and the head."""
_ROUND_POINTS = 6
"""Points of the active search that share prefixes with each other."""


@dataclass(frozen=True)
class Work:
    """What a method measures.

    Attributes:
        block_forwards: Forwards of one block over all calibration tokens.
        evaluations: Assignments, each with a forward of the head.
        is_bound: Whether this is an upper bound rather than a forecast.
    """

    block_forwards: int
    evaluations: int
    is_bound: bool = False


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        n_players: Number of players.
        n_blocks: Number of blocks.
        tokens: Calibration tokens.
        footprint: Memory.
        free: Bytes of memory that are free; None if the system does not say.
        block_seconds: Seconds of one block over all calibration tokens, measured.
        head_seconds: Seconds of the head over them, measured.
        block_flops: Floating point operations of the linear layers of a block, over all tokens.
        head_flops: Floating point operations of the head, over all tokens.
        methods: What methods take for one budget halfway between the widths.
    """

    n_players: int
    n_blocks: int
    tokens: int
    footprint: Footprint
    free: int | None
    block_seconds: float
    head_seconds: float
    block_flops: int
    head_flops: int
    methods: dict[str, Work]

    def seconds(self, work: Work) -> float:
        """How long the losses of a method take to measure."""
        return work.block_forwards * self.block_seconds + work.evaluations * self.head_seconds

    def flops(self, work: Work) -> float:
        """Floating point operations of the linear layers."""
        return float(work.block_forwards) * self.block_flops + float(work.evaluations) * self.head_flops


def forecast(request: Request) -> Forecast:
    """Load the model, time one of its blocks and its head, and count what methods will ask for.

    Nothing is quantized or written. The time to quantize and to solve programs is not in the forecast.

    Raises:
        OutOfMemory: If the run does not fit, before the model is loaded.
    """
    prepared = prepare(request)
    loaded, offloaded, footprint, free = prepared.load_to_measure()
    players, text, device = prepared.players, request.text, prepared.device
    config = loaded.model.config.get_text_config()
    batch = min(batch_size(device.type, text.sequence_length), text.n_sequences)
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(batch, text.sequence_length))
    with TemporaryDirectory() as folder:
        bank = WeightBank(Path(folder), loaded, players, prepared.backend, {})
        engine = make_engine(loaded.model, bank, ids, request.search.loss, offloaded)
        block, head = engine.timed(lambda work: _median_seconds(work, device))
    n_blocks, n_weights = players[-1].block + 1, sum(player.n_weights for player in players if not player.is_end)
    return Forecast(
        n_players=len(players),
        n_blocks=n_blocks,
        tokens=text.tokens,
        footprint=footprint,
        free=free,
        block_seconds=block * text.n_sequences / batch,
        head_seconds=head * text.n_sequences / batch,
        block_flops=2 * text.tokens * n_weights // n_blocks,
        head_flops=2 * text.tokens * config.hidden_size * config.vocab_size,
        methods=forecast_methods(prepared),
    )


def forecast_methods(asked: SizedRequest) -> dict[str, Work]:
    """What methods measure for one budget halfway between the widths, without measuring any of it.

    Walks are known beforehand. Searches other than the active one are played on a synthetic game of the same shape:
    what a search takes depends little on the losses.
    """
    widths, walks, blocks = asked.request.widths.bits, asked.request.search, asked.blocks
    found, step_bytes = dict[str, Work](), asked.sizes.step_bytes(widths)
    has_two_widths = len(widths) == 2 and len(step_bytes) == len(blocks)
    if has_two_widths:
        spqe = SPQE(len(blocks), low=2, high=4, permutations=walks.permutations, seed=walks.seed)
        points = np.unique(spqe.points, axis=0)
        found[f"coopq, M = {walks.permutations}"] = Work(prefix_tree_size(points, blocks), len(points))
    space = SearchSpace(asked.player_widths, step_bytes, (int(step_bytes.sum()) // 2,), walks.seed)
    nothing = space.assignments(np.zeros((0, space.n_steps), dtype=bool))
    for name in names(kind="search"):
        method = METHODS[name]
        if method.most_widths is not None and not has_two_widths:
            continue
        if name == "active":
            found[name] = _active(space, blocks)
        elif name != "exact" or n_assignments(asked.player_widths) <= 2**MOST_PLAYERS:
            search = make_search(method, space, (nothing, np.zeros(0)))
            found[name] = _play(search, space, blocks, asked.request.text.n_screen_sequences)
    return found


def _active(space: SearchSpace, blocks: list[int]) -> Work:
    """At most what the active search takes: its score, then rounds of points that fill the budget."""
    points, scoring = most_points(space), (METHODS[SCORE].cost or 0) * len(set(blocks))
    rng, program = np.random.default_rng(0), space.constraint(space.capacities[0])
    drawn = space.assignments(np.array([random_fill(program, rng) for _ in range(_ROUND_POINTS)]))
    searched = prefix_tree_size(drawn, blocks) * points // len(drawn)
    return Work(scoring + searched, points, is_bound=True)


def _play(search: Search, space: SearchSpace, blocks: list[int], n_sequences: int) -> Work:
    """What a search takes on a synthetic game; forwards on some of the sequences count by their share."""
    game = SteppedGame(SyntheticGame(space.n_steps, "quadratic", 0), space)
    meters = Meters(lambda _: game, n_sequences, blocks, np.zeros((0, len(blocks)), dtype=np.float32))
    run_search(search, meters)
    return Work(round(meters.block_forwards), round(meters.evaluations))


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of repeats within about a second, after a warm-up."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times: list[float] = []
    while sum(times) < _SECONDS or len(times) < 3:
        times.append(once())
    return float(np.median(times))
