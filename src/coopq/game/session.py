"""Opening a model: `prepare` checks a request without weights, `open_session` loads the model over a run folder.

Everything that measures, quantizes or judges a model opens the model here.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from coopq.core.errors import OutOfMemory
from coopq.core.goal import Limit
from coopq.core.sizes import Budget
from coopq.core.specs import Request
from coopq.core.subject import SizedRequest, Subject
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width, silent
from coopq.game.engines.prefix_engine import PrefixEngine, make_engine
from coopq.game.game import Engine, QuantizationGame, Workers
from coopq.game.journal import Journal
from coopq.game.run_folder import RunFolder
from coopq.game.weights_fingerprint import weights_fingerprint
from coopq.model.load import LoadedModel, load_model, load_skeleton, max_positions, pick_device
from coopq.model.memory import Footprint, free_memory, gib
from coopq.model.offload import OffloadedBlocks
from coopq.model.players import find_players, warn_of_weights_outside
from coopq.model.texts import TokenSet, calibration_set, check_length, check_text, fitting_set
from coopq.quantizers import get_backend
from coopq.quantizers.backend import Backend
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.sizes import OUR_FILE, Target, packed_bytes

_log = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Prepared(SizedRequest):
    """A request that passed every check that needs no weights.

    Attributes:
        skeleton: The model without storage, in the dtype that it will compute in.
        backend: What quantizes.
        device: Where the model computes.
        target: The file that plans are made for.
    """

    skeleton: Any
    backend: Backend
    device: torch.device
    target: Target

    def check_budgets(self, budgets: Sequence[Budget]) -> None:
        """Check that budgets are feasible.

        Raises:
            InfeasibleBudget: With the smallest and the largest feasible budget.
        """
        for budget in budgets:
            self.sizes.limit(budget, self.request.widths.bits)

    @property
    def footprint(self) -> Footprint:
        """What measuring this request takes."""
        text, widths, diverges = self.request.text, self.request.widths.quantized, self.request.search.loss == "kl"
        own = zip(self.players, self.player_widths, strict=True)
        bank = sum(
            packed_bytes(self.backend, player, width) for player, each in own for width in each if width in widths
        )
        return Footprint.estimate(self.skeleton, self.players, text, self.device.type, len(widths), bank, diverges)

    def fit(self) -> tuple[Footprint, int | None]:
        """What measuring this request takes and what is free, in bytes, once the run is known to fit.

        Raises:
            OutOfMemory: If the run does not fit, with the setting that would fit.
        """
        needed, free = self.footprint, free_memory(self.request.model.device)
        needed.check(free)
        if needed.must_offload(free) and self.request.widths.embeddings:
            raise OutOfMemory(
                f"{needed}, and {gib(free)} are free: blocks must stay on the host, and then the embedding is no "
                "player; leave --embeddings out"
            )
        return needed, free

    def load(self, progress: ProgressCallback = silent, *, on_host: bool = False) -> LoadedModel:
        """Load the weights; `on_host` leaves the weights in the host's memory."""
        progress("loading the model", 0, 1)
        spec = self.request.model
        loaded = load_model(spec.source, dtype=spec.dtype, device=spec.device, on_host=on_host)
        progress("loading the model", 1, 1)
        return loaded

    def load_to_measure(
        self, progress: ProgressCallback = silent
    ) -> tuple[LoadedModel, OffloadedBlocks | None, Footprint, int | None]:
        """Load the weights where they fit; blocks that do not fit on the device stay on the host.

        Returns:
            The model, its offloaded blocks if there are any, what the run takes, and what was free before.
        Raises:
            OutOfMemory: As `fit`.
        """
        needed, free = self.fit()
        _log.info("%s; %s free on the %s", needed, gib(free), self.device.type)
        must_offload = needed.must_offload(free)
        loaded = self.load(progress, on_host=must_offload)
        return loaded, OffloadedBlocks(loaded.model, self.device) if must_offload else None, needed, free


def prepare(request: Request, *, target: Target = OUR_FILE, judge_length: int = 0) -> Prepared:
    """Check a request and look at the model without its weights.

    Args:
        request: What is asked for.
        target: The file that plans are made for.
        judge_length: Tokens of the windows that assignments will be judged on, if they will be.
    Raises:
        CoopQError: Naming what is wrong.
    """
    check_text(request.text)
    backend, skeleton, found = _look(request)
    backend.check_text(request.text)
    check_length(max(request.text.sequence_length, judge_length), max_positions(skeleton))
    players, sizes = target.fit(request, skeleton, found, backend)
    warn_of_weights_outside(skeleton, players)
    sizes.player_widths(request.widths.bits)  # refuses widths that no player has
    return Prepared(request, tuple(players), sizes, skeleton, backend, pick_device(request.model.device), target)


def _look(request: Request) -> tuple[Backend, Any, Sequence[Player]]:
    """The backend, the model without storage, and all its players."""
    spec, widths = request.model, request.widths
    backend = get_backend(request.quantizer, widths.bits)
    skeleton = load_skeleton(spec.source, dtype=spec.dtype, device=spec.device)
    return backend, skeleton, find_players(skeleton, widths.granularity, widths.embeddings, widths.routers)


def usable_bits(request: Request, target: Target = OUR_FILE) -> tuple[Width, ...]:
    """The widths of a request that are of use to some player: recipes name more than every model can take.

    Args:
        request: The request.
        target: The file that plans are made for.
    """
    backend, skeleton, players = _look(request)
    had = {width for player in players for linear in player.linears for width in backend.widths_of(linear.shape)}
    bits = tuple(width for width in request.widths.bits if width == UNTOUCHED or width in had)
    _, sizes = target.fit(request.replace(bits=bits), skeleton, players, backend)
    return sizes.usable_widths(bits)


@dataclass(frozen=True)
class Session(Subject):
    """A loaded model with everything that measures the model, held open over a locked run folder.

    Attributes:
        folder: The run folder.
        loaded: The model in full precision.
        backend: What quantizes.
        bank: Weights of every player at every width.
        calibration: The tokens that searches see.
        fitting: The tokens that weights are fitted to; None for backends that fit none.
        progress: Told of every step.
        offloaded: The blocks that stay on the host; None where the whole model is on the device.
        cluster: Workers that measure; None where this process does.
    """

    folder: RunFolder
    loaded: LoadedModel
    backend: Backend
    bank: WeightBank
    calibration: TokenSet
    fitting: TokenSet | None
    progress: ProgressCallback
    offloaded: OffloadedBlocks | None = None
    cluster: Workers | None = None

    def engine(self, tokens: TokenSet, loss: str = "nll") -> PrefixEngine:
        """What measures a loss on tokens in this process."""
        return make_engine(self.loaded.model, self.bank, tokens.tokens, loss, self.offloaded)

    @contextmanager
    def game(
        self, stage: str, n_sequences: int | None = None, limit: Limit | None = None
    ) -> Iterator[QuantizationGame]:
        """The game that searches play.

        Args:
            stage: Name of the work, for progress.
            n_sequences: Only the first calibration sequences, with a journal of their own; None takes all.
            limit: When to end early.
        """
        tokens, journal = self.calibration, self.folder.journal
        if n_sequences is not None and n_sequences < self.request.text.n_sequences:
            tokens = replace(tokens, tokens=tokens.tokens[:n_sequences])
            journal = self.folder.screening(n_sequences)
        with self.game_on(tokens, journal, stage, self.request.search.loss, limit) as game:
            yield game

    @contextmanager
    def game_on(
        self, tokens: TokenSet, journal: Path, stage: str, loss: str = "nll", limit: Limit | None = None
    ) -> Iterator[QuantizationGame]:
        """The game on other tokens, with its losses in `journal`."""
        fingerprint = {**self.fingerprint, "tokens": tokens.fingerprint, "bos": tokens.bos, "loss": loss}
        with Journal(journal, fingerprint) as losses:
            if self.cluster is None:
                engine: Engine = self.engine(tokens, loss)
            else:
                engine = self.cluster.engine(tokens.fingerprint, tokens.tokens, loss)
                stage = f"{stage}, {self.cluster.n_workers} workers"
            yield QuantizationGame(engine, losses, len(self.players), self.progress, stage, limit)

    def each(self, stage: str, items: Sequence[Item]) -> Iterator[Item]:
        """The items, with progress."""
        for done, item in enumerate(items):
            self.progress(stage, done, len(items))
            yield item
        self.progress(stage, len(items), len(items))


class ClusterConfig(Protocol):
    """Where workers are, as `coopq.game.engines.ray_cluster.RayConfig`."""

    def connect(self, session: Session, weights: Mapping[str, Any]) -> AbstractContextManager[Workers]:
        """The workers of a session; `weights` is what the bank's weights depend on."""
        ...


@contextmanager
def open_session(
    prepared: Prepared,
    run: Path,
    progress: ProgressCallback = silent,
    *,
    bank: Path | None = None,
    ray: "ClusterConfig | None" = None,
) -> Iterator[Session]:
    """Load a prepared model over a locked run folder, and quantize every player at every width.

    Args:
        prepared: The request, checked.
        run: The run folder; it is made if it is missing.
        progress: Told of every step.
        bank: Folder of the weight bank, which several runs may share; None keeps the bank in the run folder.
        ray: Where the workers are that measure; None measures in this process.
    Raises:
        Mismatch: If the run folder belongs to another request, model or text.
        OutOfMemory: If the run does not fit.
    """
    folder = RunFolder(run.expanduser(), bank)
    with folder.opened(prepared.request):
        host_free = free_memory("cpu")
        loaded, offloaded, needed, free = prepared.load_to_measure(progress)
        prepared.target.check(prepared.request, loaded.model, prepared.players, progress)
        if offloaded is not None and ray is not None:
            raise OutOfMemory(f"{needed}, and {gib(free)} are free: workers need a GPU each that holds the model")
        text = prepared.request.text
        calibration = calibration_set(text, loaded.tokenizer, max_positions(loaded.model))
        fitting = None
        if prepared.backend.calibrated:
            fitting = fitting_set(text, loaded.tokenizer, max_positions(loaded.model))
        weights = weights_fingerprint(prepared, loaded, fitting)
        fingerprint = {
            **weights,
            "tokens": calibration.fingerprint,
            "bos": calibration.bos,
            "loss": prepared.request.search.loss,
        }
        # A journal of another model is refused before anything is written over.
        with Journal(folder.journal, fingerprint):
            pass
        room = needed.room(free) if offloaded is None else needed.room(host_free, offloaded=True)
        weight_bank = WeightBank(folder.bank, loaded, prepared.players, prepared.backend, weights, room=room)
        session = Session(
            request=prepared.request,
            players=prepared.players,
            sizes=prepared.sizes,
            fingerprint=fingerprint,
            folder=folder,
            loaded=loaded,
            backend=prepared.backend,
            bank=weight_bank,
            calibration=calibration,
            fitting=fitting,
            progress=progress,
            offloaded=offloaded,
        )
        fit_to = None if fitting is None else fitting.tokens
        weight_bank.build(prepared.request.widths.bits, fit_to, progress, session.player_widths)
        folder.start(prepared.request)
        with ExitStack() as stack:
            if ray is not None:
                session = replace(session, cluster=stack.enter_context(ray.connect(session, weights)))
            yield session
