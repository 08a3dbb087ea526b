"""What a run will take, from a look at the model and two seconds of measurement."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from coopq.quantize import get_backend
from coopq.quantize.bank import WeightBank
from coopq.game.prefix_engine import PrefixEngine, prefix_tree_size
from coopq.search import SPQE, Search, Setting, run_search
from coopq.search.strategies.active import descent, most_points
from coopq.search.strategies.exhaustive import MOST_PLAYERS
from coopq.game.game import Meters
from coopq.model.memory import Footprint, free_memory
from coopq.plan.methods import OF_TWO_WIDTHS, SEARCHES
from coopq.model.load import load_model, pick_device
from coopq.model.players import find_players
from coopq.search.solver.quadratic_program import random_fill
from coopq.model.blockwise import batch_size
from coopq.core.config import RunConfig
from coopq.quantize.contract import SteppedGame, SyntheticGame
from coopq.core.types import Player
from coopq.game.session import check_config

_SECONDS = 1.0
"""How long the block is timed, and the head."""
_A_ROUND = 6
"""Points of the active search that share prefixes with each other."""


@dataclass(frozen=True)
class Work:
    """What a method measures.

    Attributes:
        layer_forwards: Forwards of one block over all calibration tokens.
        evaluations: Assignments, each with a forward of the head.
        is_bound: Whether this is about the most that it may take, rather than what it will.
    """

    layer_forwards: int
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
        free: Bytes of memory that are there; None if the system does not say.
        layer_forward: Seconds of one block over all calibration tokens, measured.
        head: Seconds of the head over them, measured.
        layer_flops: Floating point operations of the linear layers of a block, over all tokens.
        head_flops: The same of the head.
        methods: What methods take for one budget halfway between the widths.
    """

    n_players: int
    n_blocks: int
    tokens: int
    footprint: Footprint
    free: int | None
    layer_forward: float
    head: float
    layer_flops: int
    head_flops: int
    methods: dict[str, Work]

    def seconds(self, work: Work) -> float:
        """How long the losses of a method take to measure."""
        return work.layer_forwards * self.layer_forward + work.evaluations * self.head

    def flops(self, work: Work) -> float:
        """Floating point operations of the linear layers."""
        return float(work.layer_forwards) * self.layer_flops + float(work.evaluations) * self.head_flops


def forecast(config: RunConfig) -> Forecast:
    """Load the model, time one of its blocks and its head, and count what methods will ask for.

    Nothing is quantized or written. The time to quantize and to solve programs is not in it.

    Raises:
        OutOfMemory: If the run does not fit.
    """
    check_config(config)
    backend = get_backend(**config.quantizer, bits=config.widths)
    device, text = pick_device(config.device), config.calibration
    free = free_memory(config.device)
    loaded = load_model(config.model, dtype=config.dtype, device=config.device)
    players = find_players(loaded.model, config.granularity, config.embeddings)
    n_widths, diverges = len(config.quantized_widths), config.loss == "kl"
    footprint = Footprint.of(loaded.model, players, text, device.type, n_widths, diverges=diverges)
    footprint.check(free)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    batch = min(batch_size(device.type, text.length), text.sequences)
    ids = np.random.default_rng(0).integers(vocabulary, size=(batch, text.length))
    with TemporaryDirectory() as folder:
        engine = PrefixEngine(loaded.model, WeightBank(Path(folder), loaded, players, backend, {}), ids, config.loss)
        layer, head = engine.timed(lambda work: _median_seconds(work, device))
    tokens, n_blocks = text.sequences * text.length, players[-1].block + 1
    width = loaded.model.config.get_text_config().hidden_size
    return Forecast(
        n_players=len(players),
        n_blocks=n_blocks,
        tokens=tokens,
        footprint=footprint,
        free=free,
        layer_forward=layer * text.sequences / batch,
        head=head * text.sequences / batch,
        layer_flops=2 * tokens * sum(player.n_weights for player in players if not player.is_end) // n_blocks,
        head_flops=2 * tokens * width * vocabulary,
        methods=works(players, config),
    )


def works(players: tuple[Player, ...], config: RunConfig) -> dict[str, Work]:
    """What methods measure for one budget halfway between the widths, without measuring any of it.

    Walks are known beforehand. Searches other than the active one are played on a synthetic game of the same shape:
    what they take depends little on the losses.
    """
    n, blocks = len(players), [player.block for player in players]
    n_sequences = config.screening or config.calibration.sequences
    found: dict[str, Work] = {}
    if len(config.widths) == 2:
        walks = np.unique(SPQE(n, low=2, high=4, permutations=config.permutations, seed=config.seed).points, axis=0)
        found[f"coopq, M = {config.permutations}"] = Work(prefix_tree_size(walks, blocks), len(walks))
    halves = (-2 * np.diff(config.widths[::-1])).astype(np.int64)
    costs = np.outer([player.n_weights for player in players], halves).ravel()
    setting = Setting(config.widths, costs, (int(costs.sum()) // 2,), config.seed)
    nothing = setting.assignments(np.zeros((0, setting.n_steps), dtype=bool))
    for name, make in SEARCHES.items():
        if len(config.widths) > 2 and name in OF_TWO_WIDTHS:
            continue
        if name == "active":
            opening, points = descent(setting), most_points(setting)
            opened = Work(0, 0) if opening is None else _played(opening, setting, blocks, n_sequences)
            rng, program = np.random.default_rng(0), setting.program(setting.capacities[0])
            a_round = setting.assignments(np.array([random_fill(program, rng) for _ in range(_A_ROUND)]))
            searched = prefix_tree_size(a_round, blocks) * points // len(a_round)
            found[name] = Work(opened.layer_forwards + searched, opened.evaluations + points, is_bound=True)
        elif name != "exact" or len(config.widths) ** n <= 2**MOST_PLAYERS:
            found[name] = _played(make(setting, (nothing, np.zeros(0)), nothing), setting, blocks, n_sequences)
    return found


def _played(search: Search, setting: Setting, blocks: list[int], n_sequences: int) -> Work:
    """What a search takes on a synthetic game, those on some of the sequences by their share."""
    game = SteppedGame(SyntheticGame(setting.n_steps, "quadratic", 0), setting)
    meters = Meters(lambda _: game, n_sequences, blocks, np.zeros((0, len(blocks)), dtype=np.float32))
    run_search(search, meters)
    return Work(round(meters.layer_forwards), round(meters.evaluations))


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of repeats within about a second, after a warm-up."""

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
