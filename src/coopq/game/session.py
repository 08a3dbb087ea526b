"""A loaded model with everything that measures it, held open over a locked run folder."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from coopq.quantize import Backend, get_backend
from coopq.quantize.bank import WeightBank, round_untouched
from coopq.model.texts import TokenSet, calibration_set, check_calibration, check_length, fitting_set
from coopq.export.checkpoint import save_model
from coopq.game.ray_cluster import Cluster, ClusterEngine, RayConfig
from coopq.game.prefix_engine import PrefixEngine
from coopq.core.errors import BackendError, CalibrationError, EstimationError, OutOfMemory, hint
from coopq.export.formats import storage_for
from coopq.core.files import locked, require_writable
from coopq.game.game import Engine, QuantizationGame
from coopq.model.offload import HostedBlocks
from coopq.game.journal import Journal
from coopq.game.losses import LOSSES
from coopq.model.memory import Footprint, free_memory, gib
from coopq.model.load import LoadedModel, fingerprint_weights, load_model, load_skeleton, max_positions, pick_device
from coopq.plan.plan import Plan
from coopq.model.players import check_granularity, find_players
from coopq.core.config import RunConfig, RunFolder, Subject
from coopq.core.sizes import Budget
from coopq.game.layer_major_engine import LayerMajorEngine
from coopq.core.types import Player, ProgressCallback, silent

_log = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Workbench(Subject):
    """A loaded model with everything that measures it, held open over a locked run folder."""

    folder: RunFolder
    loaded: LoadedModel
    backend: Backend
    bank: WeightBank
    calibration: TokenSet
    fitting: TokenSet | None
    progress: ProgressCallback
    hosted: HostedBlocks | None = None
    cluster: Cluster | None = None

    def engine(self, tokens: TokenSet, loss: str = "nll") -> PrefixEngine:
        """What measures a loss on `tokens` in this process."""
        if self.hosted is not None:
            return LayerMajorEngine(self.loaded.model, self.bank, tokens.tokens, self.hosted, loss)
        return PrefixEngine(self.loaded.model, self.bank, tokens.tokens, loss)

    @contextmanager
    def game(self, tokens: TokenSet, journal: Path, stage: str, loss: str = "nll") -> Iterator[QuantizationGame]:
        """The game on `tokens`, with its values in `journal`."""
        fingerprint = {**self.fingerprint, "tokens": tokens.fingerprint, "bos": tokens.bos, "loss": loss}
        with Journal(journal, fingerprint) as values:
            if self.cluster is None:
                engine: Engine = self.engine(tokens, loss)
            else:
                engine = ClusterEngine(self.cluster, tokens.fingerprint, tokens.tokens, loss)
                stage = f"{stage}, {self.cluster.n_workers} workers"
            yield QuantizationGame(engine, values, len(self.players), self.progress, stage)

    @contextmanager
    def calibration_game(self, stage: str) -> Iterator[QuantizationGame]:
        """The game that searches play."""
        with self.game(self.calibration, self.folder.journal, stage, self.config.loss) as game:
            yield game

    def save(self, plan: Plan, out: Path) -> Plan:
        """Quantize the model by a plan and save it in `out`; see `save_model`."""
        fitting = None if self.fitting is None else self.fitting.tokens
        packed = None if self.backend.whole_model else self.bank.packed(plan.quantized)
        seen = self.calibration.tokens
        return save_model(self.loaded, plan, self.backend, fitting, out, self.progress, calibration=seen, packed=packed)

    def each(self, stage: str, items: Sequence[Item]) -> Iterator[Item]:
        """The items, with progress."""
        for done, item in enumerate(items):
            self.progress(stage, done, len(items))
            yield item
        self.progress(stage, len(items), len(items))

    @property
    def n_screening(self) -> int:
        """Number of sequences that searches look at, the first ones; all where there is no screening."""
        return self.config.screening or self.config.calibration.sequences

    @property
    def screening_share(self) -> float:
        """The same as a share of the calibration sequences."""
        return self.n_screening / self.config.calibration.sequences

    @contextmanager
    def screening_game(self, stage: str) -> Iterator[QuantizationGame]:
        """The game on the sequences that searches look at."""
        with self.first_sequences(self.n_screening, stage) as game:
            yield game

    @contextmanager
    def first_sequences(self, n: int, stage: str) -> Iterator[QuantizationGame]:
        """The game on the first n calibration sequences, with a journal of its own unless these are all."""
        if n == self.config.calibration.sequences:
            with self.calibration_game(stage) as game:
                yield game
            return
        tokens = replace(self.calibration, tokens=self.calibration.tokens[:n])
        with self.game(tokens, self.folder.path / f"screening-{n}.jsonl", stage, self.config.loss) as game:
            yield game


@contextmanager
def open_workbench(
    config: RunConfig,
    run: Path,
    progress: ProgressCallback = silent,
    *budgets: Budget,
    check: Callable[[Sequence[Player]], None] = lambda _: None,
    ray: RayConfig | None = None,
    bank: Path | None = None,
    judge_length: int = 0,
) -> Iterator[Workbench]:
    """Check the request, load the model and lock the run folder; cheap checks come first.

    Args:
        config: What to measure.
        run: The run folder; it is made when missing.
        progress: Told of every step.
        budgets: Checked for feasibility before anything expensive.
        check: Raises if the players are not what the caller can do with.
        ray: Where workers are that measure; None measures here.
        bank: Folder of the weight bank, which several runs may share; None keeps it in the run folder.
        judge_length: Tokens of the windows that assignments will be judged on, if they will be.
    """
    check_config(config)
    backend = get_backend(**config.quantizer, bits=config.widths)
    if config.calibration.fitting is not None and not backend.calibrated:
        raise BackendError(f"backend {config.backend!r} fits its weights to no text; leave --fit-tokens out")
    require_writable(run)
    folder = RunFolder(run, bank)
    with locked(run):
        folder.check(config)
        progress("loading the model", 0, 1)
        skeleton = load_skeleton(config.model, dtype=config.dtype, device=config.device)
        check_length(max(config.calibration.length, judge_length), max_positions(skeleton))
        players = find_players(skeleton, config.granularity, config.embeddings)
        check(players)
        storage = storage_for(config, skeleton, players, backend)
        levels = storage.levels(*config.widths)
        for budget in budgets:
            storage.limit(budget, config.low, config.high)
        device = pick_device(config.device)
        footprint = Footprint.of(
            skeleton,
            players,
            config.calibration,
            device.type,
            len(config.quantized_widths),
            diverges=config.loss == "kl",
        )
        free = free_memory(config.device)
        footprint.check(free)
        _log.info("%s; %s free on the %s", footprint, gib(free), device.type)
        is_hosted = footprint.is_hosted(free)
        if is_hosted and config.embeddings:
            raise OutOfMemory(
                f"{footprint}, and {gib(free)} are free: blocks must stay on the host, and then the embedding is no "
                "player; leave --embeddings out"
            )
        if is_hosted and ray is not None:
            raise OutOfMemory(f"{footprint}, and {gib(free)} are free: workers need a GPU each that holds the model")
        loaded = load_model(config.model, dtype=config.dtype, device=config.device, on_host=is_hosted)
        progress("loading the model", 1, 1)
        calibration = calibration_set(config.calibration, loaded.tokenizer, max_positions(loaded.model))
        weights = {
            "weights": fingerprint_weights(loaded.model),
            "players": config.granularity + (" and embeddings" if config.embeddings else ""),
            "backend": backend.fingerprint(),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": device.type,
        }
        fitting = None
        if backend.calibrated:
            fitting = fitting_set(config.calibration, loaded.tokenizer, max_positions(loaded.model))
            weights["fitted to"] = fitting.fingerprint
        if round_untouched(loaded, players, config.widths):
            weights["rounded to"] = "float16"
        fingerprint = {**weights, "tokens": calibration.fingerprint, "bos": calibration.bos, "loss": config.loss}
        # What belongs to another model refuses before anything is written over.
        with Journal(folder.journal, fingerprint):
            pass
        # In the host's memory what is kept is mapped: the system drops what it has no room for.
        resident = device.type == "cpu" or is_hosted or footprint.holds_bank(free)
        weight_bank = WeightBank(folder.bank, loaded, players, backend, weights, resident=resident)
        folder.start(config)
        weight_bank.build(config.widths, None if fitting is None else fitting.tokens, progress, levels)
        hosted = HostedBlocks(loaded.model, device) if is_hosted else None
        with ExitStack() as stack:
            cluster = None
            if ray is not None:
                cluster = Cluster(ray, config, weights, folder.bank, calibration.tokens, levels)
                stack.callback(cluster.close)
            yield Workbench(
                config,
                players,
                storage,
                fingerprint,
                folder,
                loaded,
                backend,
                weight_bank,
                calibration,
                fitting,
                progress,
                hosted,
                cluster,
            )


def check_config(config: RunConfig) -> None:
    """Check everything that needs no model.

    Raises:
        CoopQError: Naming what is wrong.
    """
    if list(config.widths) != sorted(set(config.widths)):
        raise EstimationError(f"bits {config.widths_text} must be different widths, the lower ones first")
    if config.permutations < 2:
        raise EstimationError(f"permutations = {config.permutations}, but a covariance needs at least 2")
    if config.seed < 0 or config.calibration.seed < 0:
        raise EstimationError(f"seeds {config.seed} and {config.calibration.seed} must not be negative")
    sequences = config.calibration.sequences
    if config.screening is not None and not 1 <= config.screening <= sequences:
        raise CalibrationError(
            f"{config.screening} screening sequences are not 1 to {sequences}, the number of calibration sequences"
        )
    if config.loss not in LOSSES:
        raise EstimationError(f"loss {config.loss!r} is unknown; {hint(config.loss, LOSSES)}")
    check_granularity(config.granularity)
    check_calibration(config.calibration)
