"""What measures on a machine of a Ray cluster: a model with its bank, in a process of its own."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from coopq.core.errors import CoopQError, Mismatch
from coopq.core.files import as_plain, cache_folder, checksum
from coopq.core.specs import Request
from coopq.core.types import Assignment, Assignments, Player, Width
from coopq.game.engines.prefix_engine import PrefixEngine, make_engine
from coopq.game.prepared import prepare
from coopq.model.load import fingerprint_weights
from coopq.model.matrices import round_untouched
from coopq.model.memory import free_memory
from coopq.quantizers.bank import WeightBank

Measurement = tuple[Assignment, npt.NDArray[np.float64], int]
"""An assignment, the loss on each sequence, and the block forwards that the loss took."""


class Worker:
    """A model and its bank in a process of their own; Ray makes an actor of a worker.

    A worker that cannot be made says so when it is asked for losses: Ray makes pages of text of what a constructor
    raises.

    Args:
        request: What is measured.
        players: The driver's players.
        weights: What the bank's weights depend on, as the driver has it.
        bank: The driver's bank, for workers that see its disk; other workers quantize the model once for a machine.
        fitting: Tokens that weights are fitted to, shape (n_sequences, length); None for backends that fit none.
        player_widths: The widths of each player.
        n_threads: Threads that the worker computes with.
        n_sharing: Workers that share the memory of a device.
    """

    def __init__(
        self,
        request: Request,
        players: Sequence[Player],
        weights: Mapping[str, Any],
        bank: str,
        fitting: npt.NDArray[np.int64] | None,
        player_widths: Sequence[Sequence[Width]],
        n_threads: int,
        n_sharing: int = 1,
    ) -> None:
        torch.set_num_threads(n_threads)
        self._engines: dict[tuple[str, str], PrefixEngine] = {}
        self._refusal: Exception | None = None
        try:
            self.bank = _open_bank(request, players, weights, Path(bank), fitting, player_widths, n_sharing)
        except (CoopQError, torch.OutOfMemoryError) as error:
            self._refusal = error

    def evaluate(
        self, name: str, tokens: npt.NDArray[np.int64], assignments: Assignments, loss: str
    ) -> list[Measurement]:
        """Losses of assignments on the tokens called `name`."""
        if self._refusal is not None:
            raise self._refusal
        if (name, loss) not in self._engines:
            self._engines[name, loss] = make_engine(self.bank.model, self.bank, tokens, loss)
        return list(self._engines[name, loss].evaluate(assignments))

    def process(self) -> int:
        """The number of the worker's process."""
        return os.getpid()


def _open_bank(
    request: Request,
    players: Sequence[Player],
    weights: Mapping[str, Any],
    shared: Path,
    fitting: npt.NDArray[np.int64] | None,
    player_widths: Sequence[Sequence[Width]],
    n_sharing: int,
) -> WeightBank:
    """Load a worker's model, and open its bank; the arguments are those of `Worker`.

    Raises:
        Mismatch: If the model is not the driver's.
    """
    # The target's base file and the calibration text may lie on the driver's disk alone; a worker needs neither.
    prepared = prepare(request.replace(target=None, base=None, calibration="c4"))
    free = free_memory(request.model.device)
    room = prepared.footprint.room(None if free is None else free // n_sharing)
    loaded = prepared.load()
    if (found := fingerprint_weights(loaded.model)) != weights["weights"]:
        raise Mismatch(
            f"a worker found another model under {request.model.source!r}",
            {"weights": weights["weights"]},
            {"weights": found},
            "give workers the driver's files and versions",
        )
    round_untouched(loaded, players, request.widths.bits)
    if (shared / "bank.json").is_file():
        return WeightBank(shared, loaded, players, prepared.backend, weights, room=room)
    folder = cache_folder() / f"bank-{checksum(as_plain(weights))}"
    with FileLock(folder.with_suffix(".lock")):  # the machine's other workers wait, and find the weights
        bank = WeightBank(folder, loaded, players, prepared.backend, weights, room=room)
        bank.build(request.widths.bits, fitting, player_widths=player_widths)
    return bank
