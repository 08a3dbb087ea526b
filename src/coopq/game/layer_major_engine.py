"""Losses of many assignments block by block: what a model needs whose blocks do not all fit on the accelerator."""

from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from coopq.quantize.bank import WeightBank
from coopq.game.prefix_engine import PrefixEngine
from coopq.model.offload import HostedBlocks
from coopq.core.types import Assignment, Assignments


class LayerMajorEngine(PrefixEngine):
    """The same losses as `PrefixEngine`, in another order: a chunk of assignments goes through a block together.

    For each way in which the chunk sets a block, the block visits the device once, and takes every distinct prefix
    before it. A chunk has half as many assignments as the model has blocks, and holds as many hidden states as a walk
    in depth: those before a block and those after it.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        bank: Its players' weights, on the host.
        tokens: Shape (n_sequences, length).
        hosted: Brings blocks to the device.
        loss: As for `PrefixEngine`.
    """

    def __init__(
        self, model: Any, bank: WeightBank, tokens: npt.NDArray[np.int64], hosted: HostedBlocks, loss: str = "nll"
    ) -> None:
        super().__init__(model, bank, tokens, loss)
        self._hosted = hosted

    def placed(self, d: int) -> AbstractContextManager[None]:
        """Let block d be on the device."""
        return self._hosted.placed(d)

    def _walk(
        self, unique: Assignments, left_out: npt.NDArray[np.bool_]
    ) -> Generator[tuple[Assignment, list[Tensor], int], None, None]:
        at_once = max(1, len(self.members) // 2)
        for start in range(0, len(unique), at_once):
            chunk, without = unique[start : start + at_once], left_out[start : start + at_once]
            states = self._sweep(chunk, without)
            previous: Assignment | None = None
            for assignment, removed in zip(chunk, without, strict=True):
                first = 0 if previous is None else self._first_block(assignment, previous)
                yield assignment, states[assignment.tobytes()], int((~removed[first:]).sum())
                previous = assignment

    def _sweep(self, chunk: Assignments, left_out: npt.NDArray[np.bool_]) -> dict[bytes, list[Tensor]]:
        """States after the last block, by assignment."""
        states = {b"": self.embedded}
        for d, members in enumerate(self.members):
            before, after = members[0], members[-1] + 1
            following: dict[bytes, list[Tensor]] = {}
            for own in np.unique(chunk[:, before:after], axis=0):
                rows = (chunk[:, before:after] == own).all(axis=1)
                prefixes = {row[:before].tobytes() for row in chunk[rows]}
                if left_out[rows, d].all():
                    following |= {prefix + own.tobytes(): states[prefix] for prefix in prefixes}
                    continue
                self._set(d, own)
                with self.placed(d), self.fast(d):
                    for prefix in sorted(prefixes):
                        following[prefix + own.tobytes()] = self.forward_block(d, states[prefix])
            states = following
        return states
