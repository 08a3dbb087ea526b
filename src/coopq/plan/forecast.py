"""What a run will take, from the model's configuration and two seconds of measurement on one block."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from coopq.core.errors import OutOfMemory
from coopq.core.specs import Request
from coopq.core.subject import SizedRequest
from coopq.core.types import Player
from coopq.game.engines.prefix_engine import make_engine, prefix_tree_size
from coopq.game.game import Meters
from coopq.game.prepared import Prepared, prepare
from coopq.model.blockwise import batch_size
from coopq.model.load import LoadedModel
from coopq.model.memory import Footprint, free_memory, gib
from coopq.model.players import find_blocks
from coopq.plan.by_score import cost
from coopq.plan.methods import METHODS, names
from coopq.plan.searches.by_search import make_search
from coopq.quantizers.bank import WeightBank
from coopq.search import SPQE, Search, SearchSpace, run_search
from coopq.search.prior import PRIOR_SCORE
from coopq.search.solver.local_search import random_fill
from coopq.search.strategies.active import most_points
from coopq.search.strategies.exhaustive import MOST_PLAYERS, n_assignments
from coopq.search.synthetic import SteppedGame, SyntheticGame

_SECONDS = 1.0
"""How long the block is timed, and the head."""
_ROUND_POINTS = 6
"""Points of the active search that share prefixes with each other."""
_LIMITS = (60, 150)
"""Limits of forwards to say the time of: most searches that were measured ended between the two."""


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

    def within(self, forwards: float, n_blocks: int) -> "Work":
        """What is measured of this if a limit of forwards of the whole model ends the method."""
        share = min(1.0, forwards * n_blocks / self.block_forwards)
        return Work(int(self.block_forwards * share), int(self.evaluations * share), self.is_bound)


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        n_players: Number of players.
        n_blocks: Number of blocks.
        tokens: Calibration tokens.
        footprint: Memory.
        free: Bytes of memory that are free; None if the system does not say.
        problem: Why the run does not fit here, with a way out; None if the run fits.
        untimed: Why nothing was timed; None if the block and the head were.
        block_seconds: Seconds of one block over all calibration tokens, measured; None if nothing was timed.
        head_seconds: Seconds of the head over them; as `block_seconds`.
        block_flops: Floating point operations of the linear layers of a block, over all tokens; of experts, those that
            tokens choose.
        head_flops: Floating point operations of the head, over all tokens.
        methods: What methods take for one budget halfway between the widths.
    """

    n_players: int
    n_blocks: int
    tokens: int
    footprint: Footprint
    free: int | None
    problem: str | None
    untimed: str | None
    block_seconds: float | None
    head_seconds: float | None
    block_flops: int
    head_flops: int
    methods: dict[str, Work]

    def seconds(self, work: Work) -> float | None:
        """How long the losses of a method take to measure; None if nothing was timed."""
        if self.block_seconds is None or self.head_seconds is None:
            return None
        return work.block_forwards * self.block_seconds + work.evaluations * self.head_seconds

    @property
    def memory(self) -> str:
        """What the run takes of memory and disk, and whether the run fits here."""
        if self.problem is not None:
            return f"it does not fit here: {self.problem}"
        if not self.footprint.must_offload(self.free):
            return str(self.footprint)
        on_host, on_device = gib(self.footprint.blocks), gib(self.footprint.needed_offloaded)
        return f"{self.footprint}; blocks stay on the host, {on_host}, and the device needs {on_device}"

    def flops(self, work: Work) -> float:
        """Floating point operations of the linear layers."""
        return float(work.block_forwards) * self.block_flops + float(work.evaluations) * self.head_flops


def forecast(request: Request, forwards: int | None = None) -> Forecast:
    """Time one block of the model's shape and the head, and count what methods will ask for.

    The configuration is enough: weights of the block are random, and no other block has storage. Nothing is quantized
    or written. The time to quantize and to solve programs is not in the forecast.

    Args:
        request: What to measure.
        forwards: The limit of forwards that will end the active search, if any.
    """
    prepared = prepare(request)
    players, text = prepared.players, request.text
    problem = None
    try:
        prepared.fit()
    except OutOfMemory as error:
        problem = str(error)
    footprint, free = prepared.footprint, free_memory(request.model.device)
    shape = prepared.skeleton.config.get_text_config()
    n_blocks, n_weights = players[-1].block + 1, sum(_weights_of_a_token(players, shape))
    needed = footprint.weights - footprint.blocks + 2 * footprint.largest_block + footprint.working
    untimed = None
    if free is not None and needed > free:
        untimed = f"one block with the ends of the model takes {gib(needed)} of memory, and {gib(free)} are free"
    block, head = (None, None) if untimed else _seconds(prepared)
    return Forecast(
        n_players=len(players),
        n_blocks=n_blocks,
        tokens=text.tokens,
        footprint=footprint,
        free=free,
        problem=problem,
        untimed=untimed,
        block_seconds=block,
        head_seconds=head,
        block_flops=round(2 * text.tokens * n_weights / n_blocks),
        head_flops=2 * text.tokens * shape.hidden_size * shape.vocab_size,
        methods=forecast_methods(prepared, _LIMITS if forwards is None else (forwards,)),
    )


def _weights_of_a_token(players: Sequence[Player], config: Any) -> Iterator[float]:
    """Weights of the blocks that each token is multiplied by, layer by layer: those of the experts that it chooses."""
    for linear in (linear for player in players if not player.is_end for linear in player.linears):
        chosen = getattr(config, "num_experts_per_tok", linear.n_experts)
        yield linear.n_weights * chosen / linear.n_experts if linear.n_experts else linear.n_weights


def _seconds(prepared: Prepared) -> tuple[float, float]:
    """Seconds of the first block, and of the head with the loss, over all calibration tokens."""
    text, device = prepared.request.text, prepared.device
    model = _one_block(prepared.skeleton, device)
    batch = min(batch_size(device.type, text.sequence_length), text.n_sequences)
    vocabulary = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(vocabulary, size=(batch, text.sequence_length))
    players = [player for player in prepared.players if player.block == 0 and not player.is_end]
    with TemporaryDirectory() as folder:
        bank = WeightBank(Path(folder), LoadedModel(model, None, model.dtype), players, prepared.backend, {})
        engine = make_engine(model, bank, ids, prepared.request.search.loss)
        block, head = engine.timed(lambda work: _median_seconds(work, device))
    return block * text.n_sequences / batch, head * text.n_sequences / batch


@torch.no_grad()
def _one_block(skeleton: Any, device: torch.device) -> Any:
    """The model of a skeleton with its first block alone, with random weights."""
    model = copy.deepcopy(skeleton)
    del find_blocks(model)[1][1:]
    model.config.get_text_config().num_hidden_layers = 1
    model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.uniform_(-0.02, 0.02)
        else:
            tensor.zero_()
    return model.eval()


def forecast_methods(asked: SizedRequest, limits: Sequence[int] = ()) -> dict[str, Work]:
    """What methods measure for one budget halfway between the widths, without measuring any of it.

    Walks are known beforehand. Searches other than the active one are played on a synthetic game of the same shape:
    what a search takes depends little on the losses.

    Args:
        asked: What to measure, with the sizes of the model.
        limits: Limits of forwards; the active search has a row for each limit that may end it.
    """
    walks, blocks, space, found = asked.request.search, asked.blocks, _space(asked), dict[str, Work]()
    has_two_widths = len(asked.request.widths.bits) == 2 and space.n_steps == len(blocks)
    if has_two_widths:
        spqe = SPQE(len(blocks), low=2, high=4, permutations=walks.permutations, seed=walks.seed)
        points = np.unique(spqe.points, axis=0)
        found[f"coopq, M = {walks.permutations}"] = Work(prefix_tree_size(points, blocks), len(points))
    nothing = space.assignments(np.zeros((0, space.n_steps), dtype=bool))
    for name in names(kind="search"):
        method = METHODS[name]
        if method.most_widths is not None and not has_two_widths:
            continue
        if name == "active":
            whole, n_blocks = forecast_active(asked), len(set(blocks))
            under = {f"{name}, --forwards {limit}": whole.within(limit, n_blocks) for limit in limits}
            found |= {label: work for label, work in under.items() if work != whole}
            found[name] = whole
        elif name != "exact" or n_assignments(asked.player_widths) <= 2**MOST_PLAYERS:
            search = make_search(method, space, (nothing, np.zeros(0)))
            found[name] = _play(search, space, blocks, asked.request.text.n_screen_sequences)
    return found


def _space(asked: SizedRequest) -> SearchSpace:
    """The assignments of players, under a budget halfway between the widths."""
    step_bytes = asked.sizes.step_bytes(asked.request.widths.bits)
    return SearchSpace(asked.player_widths, step_bytes, (int(step_bytes.sum()) // 2,), asked.request.search.seed)


def forecast_active(asked: SizedRequest) -> Work:
    """At most what the active search takes: its score, then rounds of points that fill the budget."""
    space, blocks = _space(asked), asked.blocks
    points, has_experts = most_points(space), any(linear.n_experts for p in asked.players for linear in p.linears)
    # A score of experts takes one more forward, for the mean squares of their inputs.
    scoring = (cost(METHODS[PRIOR_SCORE], len(asked.request.widths.bits)) + has_experts) * len(set(blocks))
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
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        return time.perf_counter() - start

    once()
    times: list[float] = []
    while sum(times) < _SECONDS or len(times) < 3:
        times.append(once())
    return float(np.median(times))
