"""What a run holds in memory, known before its model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coopq.core.errors import OutOfMemory
from coopq.model.load import SHARDED, load_skeleton, pick_device
from coopq.model.players import find_blocks
from coopq.model.blockwise import batch_size, logit_bytes, whole_size
from coopq.core.config import CalibrationConfig
from coopq.core.types import Player

_LOGIT_COPIES = 4
"""In float32, where the model is checked on a CPU: logits, their log-softmax; and as much that allocators keep."""
_STATE_COPIES = 12
"""Arrays of the width of the states that a block holds for one batch: norms, residuals, queries, keys, values, ..."""
_INNER_COPIES = 3
"""Arrays of the width of its widest linear layer."""
_SCRATCH = 2**25
"""What the libraries keep whatever the model: compiled kernels, their scratchpads, arenas of their threads."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a run holds at its peak, beside the interpreter and the libraries.

    Attributes:
        weights: The full-precision model.
        blocks: Those of its blocks, all of them.
        largest_block: Those of the largest.
        bank: Dequantised weights of every player at every width.
        one_width: Those of one width.
        states: Hidden states over all calibration tokens: of the embedding at each of its widths, after each block, and
            two that come and go; and what the full-precision model predicts of each token, if that is kept.
        working: What one batch takes in a block and in the head; of scores, with gradients.
        device: Type of the device that computes.
        per_sequence: Bytes of the states of one sequence.
        length: Tokens of a sequence.
    """

    weights: int
    blocks: int
    largest_block: int
    bank: int
    one_width: int
    states: int
    working: int
    device: str
    per_sequence: int
    length: int

    @classmethod
    def of(
        cls,
        model: Any,
        players: Sequence[Player],
        calibration: CalibrationConfig,
        device: str,
        n_widths: int = 2,
        diverges: bool = False,
    ) -> "Footprint":
        """Of a model, or of its skeleton without storage, that computes in its dtype.

        Args:
            model: The model.
            players: Its players.
            calibration: The calibration text.
            device: Type of the device.
            n_widths: Widths that weights are quantized to.
            diverges: Whether the loss is the divergence from full precision, whose distributions are kept.
        """
        text, itemsize = model.config.get_text_config(), model.dtype.itemsize
        n_blocks = players[-1].block + 1
        embedded = n_widths if any(player.is_end for player in players) else 1
        per_sequence = (n_blocks + 2 + embedded) * text.hidden_size * itemsize * calibration.length
        per_sequence += 4 * text.vocab_size * calibration.length if diverges else 0
        batch = min(batch_size(device, calibration.length), calibration.sequences) * calibration.length
        widest = max(max(linear.shape) for player in players if not player.is_end for linear in player.linears)
        inside = batch * itemsize * (_STATE_COPIES * text.hidden_size + _INNER_COPIES * widest)
        whole = min(whole_size(device, calibration.length, text.vocab_size), calibration.sequences)
        positions = batch if diverges else whole * calibration.length
        n_logits = text.vocab_size * min(batch, max(positions, logit_bytes(device) // (4 * text.vocab_size)))
        if device == "cpu":
            working = inside + 4 * _LOGIT_COPIES * n_logits
        else:
            # Its allocator returns what a block held before the head wants it: as they are, in float32, and softmax.
            working = max(inside, (itemsize + 4 + 4) * n_logits)
        of_width = sum(player.n_weights for player in players) * itemsize
        of_blocks = [sum(tensor.nbytes for tensor in block.parameters()) for block in find_blocks(model)[1]]
        return cls(
            blocks=sum(of_blocks),
            largest_block=max(of_blocks),
            weights=sum(tensor.nbytes for tensor in model.parameters()),
            bank=n_widths * of_width,
            one_width=of_width,
            states=per_sequence * calibration.sequences,
            working=working + _SCRATCH,
            device=device,
            per_sequence=per_sequence,
            length=calibration.length,
        )

    @property
    def total(self) -> int:
        """With all of the bank."""
        return self.weights + self.bank + self.states + self.working

    @property
    def needed(self) -> int:
        """Without the bank, as far as it need not be there.

        On a CPU it is mapped from disk. On a GPU it can stay on the host, but every player has weights of one width
        beside its own.
        """
        return self.total - self.bank + (0 if self.device == "cpu" else self.one_width)

    @property
    def hosted(self) -> int:
        """What is needed on a GPU whose blocks stay on the host: room for one, and for what gradients or moves take."""
        return self.total - self.bank - self.blocks + 2 * self.largest_block

    def is_hosted(self, free: int | None) -> bool:
        """Whether the blocks have to stay on the host."""
        return self.device != "cpu" and free is not None and free < self.needed

    def holds_bank(self, free: int | None) -> bool:
        """Whether the bank has room where the model computes."""
        return free is None or self.total <= free

    def check(self, free: int | None) -> None:
        """Refuse what cannot fit.

        Args:
            free: Bytes that are there; None if that is not known.
        Raises:
            OutOfMemory: With the setting that would fit.
        """
        least = self.needed if self.device == "cpu" else min(self.needed, self.hosted)
        if free is None or least <= free:
            return
        fitting = max(0, free - (least - self.states)) // self.per_sequence * self.length
        way_out = (
            f"take --tokens {fitting} at most"
            if fitting
            else "compute in --dtype bfloat16 if that is not the dtype already, or take a device with more memory"
        )
        raise OutOfMemory(f"{self}, and {gib(free)} are free on the {self.device}; {way_out}")

    def __str__(self) -> str:
        bank = f" (and {gib(self.bank)} of bank)"
        return (
            f"the run needs {gib(self.needed)} of memory: weights {gib(self.weights)}, hidden states "
            f"{gib(self.states)}, one batch {gib(self.working)}{bank}"
        )


def free_memory(name: str) -> int | None:
    """Bytes that can be had on a device, by its name as in `pick_device`; None if the system does not say."""
    device = pick_device(name)
    if name == SHARDED:
        return sum(int(torch.cuda.mem_get_info(gpu)[0]) for gpu in range(torch.cuda.device_count()))
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    return min([available, *_left_to_group()])


def weights_fit(source: str, *, dtype: str = "auto", device: str = "auto") -> bool:
    """Whether the weights of a model have room on a GPU; on a CPU nobody can say how much the system would swap."""
    free = free_memory(device)
    if pick_device(device).type == "cpu" or free is None:
        return True
    return sum(tensor.nbytes for tensor in load_skeleton(source, dtype=dtype, device=device).parameters()) <= free


def _left_to_group() -> list[int]:
    """Bytes that the control group of a container leaves, if it has a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        cached = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()
            if line.startswith("file ")
        )
    except (OSError, StopIteration, ValueError):
        return []
    return [most - used + cached]


def gib(n_bytes: int | None) -> str:
    """Bytes for people."""
    return "an unknown amount" if n_bytes is None else f"{n_bytes / 2**30:.2f} GiB"
