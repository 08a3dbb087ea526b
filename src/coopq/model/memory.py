"""Bytes that a run holds in memory, predicted before its model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from coopq.core.errors import OutOfMemory
from coopq.core.specs import TextSpec
from coopq.core.types import Player
from coopq.core.weight_cache import bytes_at_once
from coopq.model.blockwise import batch_size, logit_bytes, whole_size
from coopq.model.load import SHARDED, load_skeleton, pick_device
from coopq.model.players import blocks_share_weights, find_blocks

# benchmarks/memory.py set these: peaks of runs on SmolLM2-135M-Instruct are 0.99 to 1.12 times the predicted bytes
# (docs/results/memory.md, on a CPU), and a run on an H100 takes 45.7 of 47.8 GiB (docs/results/gpu.md).
_LOGIT_COPIES = 4
"""Copies of the logits in float32 when a CPU checks the model: logits, log-softmax, as much kept by allocators."""
_STATE_COPIES = 12
"""Arrays as wide as the hidden states that a block holds for one batch: norms, residuals, queries, keys, values, ..."""
_INNER_COPIES = 3
"""Arrays as wide as the widest linear layer that a block holds for one batch."""
_MARGIN = 1.15
"""How much more than was forecast a run may take before dequantized weights get the rest."""
_GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "file", "shmem"),
    "memory": (
        "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem",
    ),
}  # fmt: skip
"""Control groups of version 2 and of version 1, by their controller in /proc/self/cgroup: folder, files of the limit
and of the usage, entries of memory.stat for cached files and for shared memory. Source: Linux, cgroup-v2.rst and
cgroup-v1/memory.rst."""
_SCRATCH = 2**25
"""Bytes that libraries keep whatever the model: compiled kernels, their scratchpads, arenas of their threads."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a run holds at its peak, besides the interpreter and the libraries.

    Attributes:
        weights: The full-precision model.
        blocks: All blocks of the model.
        largest_block: The largest block of the model.
        bank: Packed weights of every player at every width, as they are on disk.
        dequantized: Dequantized weights of every player at every width.
        at_once: Dequantized weights that compute at the same time, see `bytes_at_once`.
        states: Hidden states over all calibration tokens (after the embedding at each of its widths, after each block,
            and two temporary ones) and, for the KL divergence, the full-precision model's distributions.
        working: One batch in a block and in the head; for scores with gradients.
        device_type: Type of the device that computes.
        bytes_per_sequence: Bytes of `states` for one sequence.
        sequence_length: Tokens of a sequence.
    """

    weights: int
    blocks: int
    largest_block: int
    bank: int
    dequantized: int
    at_once: int
    states: int
    working: int
    device_type: str
    bytes_per_sequence: int
    sequence_length: int

    @classmethod
    def estimate(
        cls,
        model: Any,
        players: Sequence[Player],
        text: TextSpec,
        device_type: str,
        n_widths: int = 2,
        bank: int = 0,
        diverges: bool = False,
    ) -> "Footprint":
        """The footprint of a model, or of its skeleton without storage, that computes in its own dtype.

        Args:
            model: The model.
            players: The model's players.
            text: The calibration text.
            device_type: Type of the device that computes.
            n_widths: Number of widths that weights are quantized to.
            bank: Bytes of the packed weights.
            diverges: Whether the loss is the KL divergence from full precision.
        """
        shape, itemsize = model.config.get_text_config(), model.dtype.itemsize
        n_weights = sum(player.n_weights for player in players)
        block_bytes = [sum(tensor.nbytes for tensor in block.parameters()) for block in find_blocks(model)[1]]
        n_embedded = n_widths if any(player.is_end for player in players) else 1
        token_bytes = (len(block_bytes) + 2 + n_embedded) * _width(model) * itemsize
        token_bytes += 4 * shape.vocab_size if diverges else 0
        return cls(
            weights=sum(tensor.nbytes for tensor in model.parameters()),
            blocks=sum(block_bytes),
            largest_block=max(block_bytes),
            bank=bank,
            dequantized=n_widths * n_weights * itemsize,
            at_once=bytes_at_once(players, itemsize, blocks_share_weights(model)),
            states=token_bytes * text.n_sequences * text.sequence_length,
            working=_working_bytes(model, players, text, device_type, diverges) + _SCRATCH,
            device_type=device_type,
            bytes_per_sequence=token_bytes * text.sequence_length,
            sequence_length=text.sequence_length,
        )

    @property
    def total(self) -> int:
        """Bytes with all weights dequantized: then packed weights are read once each."""
        return self.weights + self.dequantized + self.states + self.working

    @property
    def needed(self) -> int:
        """Bytes with as few dequantized weights as compute at the same time.

        A GPU can leave packed weights on the host.
        """
        packed = self.bank if self.device_type == "cpu" else 0
        return self.weights + packed + min(self.at_once, self.dequantized) + self.states + self.working

    @property
    def needed_offloaded(self) -> int:
        """Bytes on a GPU with offloaded blocks: room for the largest block and its gradients."""
        return self.weights - self.blocks + 2 * self.largest_block + self.states + self.working

    def must_offload(self, free: int | None) -> bool:
        """Whether the blocks have to stay in the host's memory, by the free bytes of the device."""
        return self.device_type != "cpu" and free is not None and free < self.needed

    def room(self, free: int | None, *, offloaded: bool = False) -> int | None:
        """Bytes that dequantized weights may take; None if all of them have room.

        Args:
            free: Free bytes, before the model is loaded, where the blocks stay.
            offloaded: Whether the blocks stay on the host while a GPU has everything else.
        """
        others = self.blocks if offloaded else self.total - self.dequantized
        if free is None or (left := free - round(_MARGIN * others)) >= self.dequantized:
            return None
        return max(self.at_once, left - self.bank)

    def check(self, free: int | None) -> None:
        """Check that the run can fit.

        Args:
            free: Free bytes of the device; None if the system does not say.
        Raises:
            OutOfMemory: If the run cannot fit, with the setting that would fit.
        """
        least, needs = self.needed, str(self)
        if self.device_type != "cpu" and self.needed_offloaded < least:
            least = self.needed_offloaded
            needs = (
                f"the run needs at least {gib(least)} of memory with its blocks on the host: hidden states "
                f"{gib(self.states)}, one batch {gib(self.working)}, the rest for weights"
            )
        if free is None or least <= free:
            return
        n_tokens = max(0, free - (least - self.states)) // self.bytes_per_sequence * self.sequence_length
        way_out = (
            f"use --tokens {n_tokens} or fewer"
            if n_tokens
            else "compute in --dtype bfloat16 if that is not the dtype already, or use a device with more memory"
        )
        raise OutOfMemory(f"{needs}, and {gib(free)} are free on the {self.device_type}; {way_out}")

    def __str__(self) -> str:
        return (
            f"the run needs {gib(self.needed)} of memory: weights {gib(self.weights)}, hidden states "
            f"{gib(self.states)}, one batch {gib(self.working)}, the rest for quantized weights; it is fastest with "
            f"{gib(self.total)}, and the weight bank takes {gib(self.bank)} of disk"
        )


def _working_bytes(model: Any, players: Sequence[Player], text: TextSpec, device_type: str, diverges: bool) -> int:
    """Bytes of one batch in a block and in the head."""
    shape, itemsize, length = model.config.get_text_config(), model.dtype.itemsize, text.sequence_length
    batch_tokens = min(batch_size(device_type, length), text.n_sequences) * length
    whole_tokens = min(whole_size(device_type, length, shape.vocab_size), text.n_sequences) * length
    widest = max(max(linear.shape) for player in players if not player.is_end for linear in player.linears)
    in_block = batch_tokens * itemsize * (_STATE_COPIES * _width(model) + _INNER_COPIES * widest)
    positions = batch_tokens if diverges else whole_tokens
    positions = min(batch_tokens, max(positions, logit_bytes(device_type) // (4 * shape.vocab_size)))
    n_logits = shape.vocab_size * positions
    if device_type == "cpu":
        return in_block + 4 * _LOGIT_COPIES * n_logits
    # The allocator of a GPU reuses the block's memory for the head: logits in the dtype, in float32, and softmax.
    return max(in_block, (itemsize + 4 + 4) * n_logits)


def _width(model: Any) -> int:
    """Width of the hidden states."""
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    return int(width or model.get_input_embeddings().weight.shape[-1])


def free_memory(name: str, root: Path = Path("/")) -> int | None:
    """Free bytes of a device; None if the system does not say.

    Args:
        name: The device's name, as in `pick_device`.
        root: The folder that holds proc/ and sys/.
    """
    device = pick_device(name)
    if name == SHARDED:
        return sum(int(torch.cuda.mem_get_info(gpu)[0]) for gpu in range(torch.cuda.device_count()))
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if device.type != "cpu":
        return None
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    return min([available, *_left_to_groups(root)])


def weights_fit(source: str, *, dtype: str = "auto", device: str = "auto") -> bool:
    """Whether the weights of a model have room on a GPU; True on a CPU, where the system may swap."""
    free = free_memory(device)
    if pick_device(device).type == "cpu" or free is None:
        return True
    return sum(tensor.nbytes for tensor in load_skeleton(source, dtype=dtype, device=device).parameters()) <= free


def _left_to_groups(root: Path) -> list[int]:
    """Bytes that the memory limits of this process's control groups leave; empty without a limit.

    A limit can be that of the group (a Slurm job, a systemd unit) or that of any group around it. In a container the
    group's path may be the host's, and the limit lies in the top folder.
    """
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in groups:
        for version in (each for each in controllers.split(",") if each in _GROUPS):
            top, *names = _GROUPS[version]
            inner = PurePosixPath(path.lstrip("/"))
            found += [_left_to_group(root / top / place, *names) for place in (inner, *inner.parents)]
    return [left for left in found if left is not None]


def _left_to_group(group: Path, limit: str, usage: str, cached: str, shared: str) -> int | None:
    """Bytes that the memory limit of a control group leaves; None without a limit.

    Cached files leave when memory is wanted, but shared memory, which is counted with them, stays.
    """
    try:
        most, used = (int((group / name).read_text("ascii")) for name in (limit, usage))
        lines = (line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
        stat = {name: int(value) for name, value in lines}
        return most - used + stat[cached] - stat[shared]
    except (OSError, KeyError, ValueError):
        return None


def gib(n_bytes: int | None) -> str:
    """Bytes as text in GiB."""
    return "an unknown amount" if n_bytes is None else f"{n_bytes / 2**30:.2f} GiB"
