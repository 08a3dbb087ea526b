"""Opening a model: `open_session` loads a prepared model over a run folder.

Everything that measures, quantizes or judges a model opens the model here.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from coopq.core.errors import OutOfMemory, is_out_of_memory
from coopq.core.files import expanded
from coopq.core.goal import Limit
from coopq.core.subject import Subject
from coopq.core.types import UNTOUCHED, ProgressCallback, silent
from coopq.game.engines.prefix_engine import PrefixEngine, make_engine
from coopq.game.game import Engine, QuantizationGame, Workers
from coopq.game.journal import Journal
from coopq.game.prepared import Prepared
from coopq.game.run_folder import RunFolder
from coopq.game.weights_fingerprint import fingerprint_and_round
from coopq.model.load import LoadedModel, max_positions
from coopq.model.memory import free_memory, gib
from coopq.model.offload import OffloadedBlocks
from coopq.model.texts import TokenSet, calibration_set, fitting_set
from coopq.quantizers.backend import Backend
from coopq.quantizers.bank import WeightBank

_log = logging.getLogger(__name__)
Item = TypeVar("Item")
_CHECKED = 2
"""Calibration sequences that the model's blocks are tried on before the weights are quantized."""


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

    def check_blocks(self) -> None:
        """Check on two calibration sequences, before weights are quantized, that blocks can be measured one by one.

        Compiled blocks are checked by the first losses, because compiling for two sequences takes too long.

        Raises:
            ModelError: If the blocks cannot run one by one, or depend on more than the hidden states.
        """
        engine = self.engine(replace(self.calibration, tokens=self.calibration.tokens[:_CHECKED]))
        if not engine.blockwise.is_compiled:
            for _ in engine.evaluate(np.full((1, len(self.players)), UNTOUCHED, dtype=np.float32)):
                pass

    def journal(self, n_sequences: int | None = None) -> Path:
        """The file of losses on the first calibration sequences; None means on all of them."""
        if n_sequences is None or n_sequences >= self.request.text.n_sequences:
            return self.folder.journal
        return self.folder.screening(n_sequences)

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
        tokens = replace(self.calibration, tokens=self.calibration.tokens[:n_sequences])
        with self.game_on(tokens, self.journal(n_sequences), stage, self.request.search.loss, limit) as game:
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
            yield QuantizationGame(engine, losses, self.progress, stage, limit)

    def each(self, stage: str, items: Sequence[Item]) -> Iterator[Item]:
        """The items, with progress."""
        for done, item in enumerate(items):
            self.progress(stage, done, len(items))
            yield item
        self.progress(stage, len(items), len(items))


class ClusterConfig(Protocol):
    """Where workers are, as `coopq.game.engines.ray_cluster.RayConfig`."""

    def connected(self, device: str) -> AbstractContextManager[None]:
        """A connection to the cluster, whose workers compute on `device`, "cpu" or "cuda"."""
        ...

    def start(self, session: Session, weights: Mapping[str, Any]) -> AbstractContextManager[Workers]:
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
    folder = RunFolder(expanded(run), bank)
    with ExitStack() as stack:
        stack.enter_context(folder.opened(prepared.request))
        stack.enter_context(_out_of_memory_told())
        host_free = free_memory("cpu")
        needed, free = prepared.fit()
        _log.info("%s; %s free on the %s", needed, gib(free), prepared.device.type)
        must_offload = needed.must_offload(free)
        if ray is not None:
            if must_offload:
                raise OutOfMemory(f"{needed}, and {gib(free)} are free: workers need a GPU each that holds the model")
            stack.enter_context(ray.connected(prepared.device.type))
        loaded, offloaded = prepared.load_to_measure(must_offload, progress)
        prepared.target.check(prepared.request, loaded.model, prepared.players, progress)
        text = prepared.request.text
        calibration = calibration_set(text, loaded.tokenizer, max_positions(loaded.model))
        fitting = None
        if prepared.backend.calibrated:
            fitting = fitting_set(text, loaded.tokenizer, max_positions(loaded.model))
        weights = fingerprint_and_round(prepared, loaded, fitting)
        fingerprint = {
            **weights,
            "tokens": calibration.fingerprint,
            "bos": calibration.bos,
            "loss": prepared.request.search.loss,
        }
        # A journal of another model is refused before anything is written over.
        with Journal(folder.journal, fingerprint) as known:
            is_new = not len(known)
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
        if is_new:
            session.check_blocks()
        fit_to = None if fitting is None else fitting.tokens
        weight_bank.build(prepared.request.widths.bits, fit_to, progress, session.player_widths)
        folder.start(prepared.request)
        if ray is not None:
            session = replace(session, cluster=stack.enter_context(ray.start(session, weights)))
        yield session


@contextmanager
def _out_of_memory_told() -> Iterator[None]:
    """Turn a device's lack of memory, wherever it shows, into an error with the way out."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            "the device ran out of memory; end other programs on it, or use a shorter --sequence-length, then run "
            "again: nothing computed is lost"
        ) from error
