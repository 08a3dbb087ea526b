"""Losses of many assignments, computing every common prefix of blocks once: the hot path.

The hidden state after block d depends only on the bits of the players in blocks 0..d. Assignments in lexicographic
order are a depth-first walk of their prefix tree, so one hidden state per depth is all that has to be kept.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.quantize.bank import WeightBank
from coopq.model.kernels_gpu import Compiled, is_compilable
from coopq.core.errors import EstimationError, ModelError
from coopq.game.losses import Reference, portions_divergence, portions_nll, sequence_means, sequence_nll
from coopq.model.kernels_cpu import ByOneDNN
from coopq.model.blockwise import Replay, whole_size
from coopq.core.types import REMOVED, UNTOUCHED, Assignment, Assignments, as_widths

_TOLERANCE = 1e-3
"""Nats per token by which a replay may differ from the model's own forward; it repeats the same operations."""
_ROUNDING = 0.05
"""Share of their norm by which states after a compiled block may differ: 16 bits are rounded in other places."""


def prefix_tree_size(assignments: Assignments, blocks: Sequence[int] | None = None) -> int:
    """Number of distinct prefixes of one or more blocks: the block forwards that a set of assignments costs.

    Args:
        assignments: Shape (n, n_players).
        blocks: Block of each player, ascending from 0, shape (n_players,); None where each player is a block.
    """
    unique = np.unique(assignments, axis=0)
    block_of = np.arange(unique.shape[1]) if blocks is None else np.asarray(blocks)
    shared = block_of[(unique[1:] != unique[:-1]).argmax(axis=1)]
    return int((block_of[-1] + 1) * len(unique) - shared.sum())


class PrefixEngine(Replay):
    """Evaluates assignments of one model on one fixed set of tokens.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        bank: Its players' weights; the model's weights are the bank's to move.
        tokens: Shape (n_sequences, length).
        loss: Which of `coopq.game.losses.LOSSES`; the divergence keeps the full-precision model's distributions.

    Attributes:
        layer_forwards: Forwards of one block over all tokens spent so far.
        members: Indices of the players in each block, ascending.
    """

    def __init__(self, model: Any, bank: WeightBank, tokens: npt.NDArray[np.int64], loss: str = "nll") -> None:
        super().__init__(model, tokens)
        self._bank = bank
        # Blocks that only visit the device where the model computes are no matter for a CPU.
        on_cpu = model.device.type == "cpu"
        self._fast_model: AbstractContextManager[None] = ByOneDNN(model) if on_cpu else nullcontext()
        self._fast_blocks = [_fast(block, model.device) for block in self._blocks]
        self.layer_forwards = 0
        self.members: list[list[int]] = [[] for _ in self._blocks]
        for index, player in enumerate(bank.players):
            self.members[player.block].append(index)
        self._embeddings: dict[int, list[Tensor]] = {}
        self._embedding = 0 if bank.players[0].is_end else None
        self._diverges = loss == "kl"
        self._reference: list[Reference] | None = None

    def evaluate(
        self, assignments: Assignments
    ) -> Generator[tuple[Assignment, npt.NDArray[np.float64], int], None, None]:
        """Walk the prefix tree of the assignments.

        Args:
            assignments: Shape (n, n_players); duplicates are evaluated once.
        Yields:
            Each distinct assignment in lexicographic order, the loss of each sequence (shape (n_sequences,),
            nats per token), and the block forwards spent since the one before.
        Raises:
            EstimationError: If a loss is not finite, or some but not all players of a block are `REMOVED`.
            ModelError: If the model's own forward gives another loss for the first batch of the first assignment.
        """
        unique = np.unique(assignments, axis=0)
        left_out = self._left_out(unique)
        unchecked = self.record()
        try:
            for (assignment, hidden, spent), without in zip(self._walk(unique, left_out), left_out, strict=True):
                self.layer_forwards += spent
                losses = self.losses(hidden)
                if not np.isfinite(losses).all():
                    raise EstimationError(
                        f"the loss of assignment {as_widths(assignment)} is not a number; "
                        "compute in float32, or use a wider low bit-width"
                    )
                if unchecked:
                    self._check(assignment, without, hidden)
                    unchecked = False
                yield assignment, losses, spent
        finally:
            self._bank.restore()

    def _walk(
        self, unique: Assignments, left_out: npt.NDArray[np.bool_]
    ) -> Generator[tuple[Assignment, list[Tensor], int], None, None]:
        """Each assignment, its states after the last block, and the block forwards spent since the one before."""
        depth = len(self._blocks)
        hidden: list[list[Tensor]] = [self.embedded] + [[] for _ in range(depth)]
        room: list[list[Tensor] | None] = [None] * depth
        previous: Assignment | None = None
        for assignment, without in zip(unique, left_out, strict=True):
            first = 0 if previous is None else self._first_block(assignment, previous)
            if first == 0:
                hidden[0] = self.entering(assignment)
            for d in range(first, depth):
                if without[d]:
                    hidden[d + 1] = hidden[d]
                    continue
                self._set(d, assignment[self.members[d]])
                with self.fast(d):
                    hidden[d + 1] = room[d] = self.forward_block(d, hidden[d], room[d])
            yield assignment, hidden[depth], int((~without[first:]).sum())
            previous = assignment

    def entering(self, assignment: Assignment) -> list[Tensor]:
        """States before the first block, by batch: those of the embedding, at its width where it is a player."""
        width = UNTOUCHED if self._embedding is None else assignment[self._embedding].item()
        if width == UNTOUCHED:
            return self.embedded
        if width not in self._embeddings:
            self._bank.set_player(0, width)
            self._embeddings[width] = self.embed()
        return self._embeddings[width]

    def fast(self, d: int) -> AbstractContextManager[None]:
        """Let block d compute as fast as it can, without gradients."""
        return self._fast_blocks[d]

    def _set(self, d: int, bits: Assignment) -> None:
        """Let block d have the weights of its players at some widths, shape (n_members,)."""
        for player, width in zip(self.members[d], bits.tolist(), strict=True):
            self._bank.set_player(player, width)

    def _first_block(self, assignment: Assignment, previous: Assignment) -> int:
        """The first block in which two assignments differ."""
        return self._bank.players[int(np.argmax(assignment != previous))].block

    def _left_out(self, assignments: Assignments) -> npt.NDArray[np.bool_]:
        """Which blocks each assignment leaves out, shape (n, n_blocks)."""
        removed = assignments == REMOVED
        left_out = np.stack([removed[:, players].all(axis=1) for players in self.members], axis=1)
        for d, players in enumerate(self.members):
            if (removed[:, players].any(axis=1) != left_out[:, d]).any():
                raise EstimationError(
                    f"an assignment removes some players of block {self._prefix}.{d} and keeps others; "
                    "a block is left out as a whole: remove all of its players, or none"
                )
        return left_out

    @torch.no_grad()
    def _check(self, assignment: Assignment, left_out: npt.NDArray[np.bool_], hidden: list[Tensor]) -> None:
        """Compare what an assignment came to with the model's own forward, which goes without some blocks.

        They differ for models whose blocks hand each other more than the hidden states, which a replay cannot see.
        """
        kept = np.flatnonzero(~left_out).tolist()
        for d in kept:
            self._set(d, assignment[self.members[d]])
        states = hidden[0]
        if any(isinstance(fast, Compiled) for fast in self._fast_blocks):
            # They round otherwise, and an assignment that breaks the model makes much of that.
            states = self.entering(assignment)[0]
            for d in kept:
                states = self.call_block(d, 0, states)
        length, vocabulary = self.batches[0].shape[1], self._model.config.get_text_config().vocab_size
        batch = self.batches[0][: whole_size(states.device.type, length, vocabulary)]
        own = sequence_nll(self.own_logits(batch, np.flatnonzero(left_out).tolist()), batch)
        found = self._scores([states], None)[: len(batch)]
        if not np.allclose(own, found, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise ModelError(
                f"{type(self._model).__name__}: block by block its loss is {found.mean():.5f}, by its own "
                f"forward {own.mean():.5f}; its blocks depend on more than the hidden states, so it cannot be measured"
            )

    @torch.no_grad()
    def losses(self, hidden: list[Tensor]) -> npt.NDArray[np.float64]:
        """Loss of each sequence from the states after the last block, by the model's own norm and head."""
        return self._scores(hidden, self._reference)

    def _scores(self, hidden: list[Tensor], reference: list[Reference] | None) -> npt.NDArray[np.float64]:
        """Negative log-likelihood of each sequence, or divergence from a reference if there is one.

        States may be of the first batches alone.
        """
        with self._fast_model:
            found = []
            for j, (states, tokens) in enumerate(zip(hidden, self.batches, strict=False)):
                portions = self.logits(states)
                if reference is None:
                    scores = portions_nll(portions, tokens[:, 1:].flatten().to(states.device))
                else:
                    scores = portions_divergence(portions, reference[j])
                found.append(sequence_means(scores, tokens))
            return np.concatenate(found)

    def record(self) -> bool:
        """See `Replay.record`; what the full-precision model predicts is kept then, if need be.

        Raises:
            ModelError: If a compiled block computes something else than the block.
        """
        is_new = super().record()
        if is_new and isinstance(self._fast_blocks[0], Compiled):
            self._check_compiled()
        if is_new and self._diverges:
            self._reference = self._refer()
        return is_new

    @torch.no_grad()
    def _check_compiled(self) -> None:
        """Compare the first block with what torch compiles of it, on the first batch."""
        plain = self.call_block(0, 0, self.embedded[0]).float()
        with self.fast(0):
            compiled = self.call_block(0, 0, self.embedded[0]).float()
        off = float((compiled - plain).norm() / plain.norm())
        if not off <= _ROUNDING:
            raise ModelError(
                f"compiled by torch, block {self._prefix}.0 is off by {off:.3g} of its norm, and {_ROUNDING} are "
                "allowed; set TORCH_COMPILE_DISABLE=1 to run uncompiled"
            )

    @torch.no_grad()
    def _refer(self) -> list[Reference]:
        """What the full-precision model makes of each batch."""
        whole = np.full((1, len(self._bank.players)), UNTOUCHED, dtype=np.float32)
        ((_, hidden, spent),) = self._walk(whole, np.zeros((1, len(self._blocks)), dtype=np.bool_))
        self.layer_forwards += spent
        with self._fast_model:
            return [Reference.of(self.logits(states)) for states in hidden]

    def timed(self, clock: Callable[[Callable[[], object]], float]) -> tuple[float, float]:
        """What `clock` says of one block and of the head with the loss, over all tokens."""
        self.record()
        with self.placed(0), self.fast(0):
            room = self.forward_block(0, self.embedded)
            block = clock(lambda: self.forward_block(0, self.embedded, room))
        return block, clock(lambda: self.losses(self.embedded))


def _fast(block: Any, device: torch.device) -> AbstractContextManager[None]:
    """Lets a block compute as fast as it can on its device."""
    if device.type == "cpu":
        return ByOneDNN(block)
    return Compiled(block) if is_compilable(block, device) else nullcontext()


def model_nll(model: Any, tokens: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float64]]:
    """Loss of each sequence by the model's plain forward, a batch at a time; see `sequence_nll`."""
    ids = torch.from_numpy(tokens).to(model.device)
    vocabulary = model.config.get_text_config().vocab_size
    for batch in ids.split(whole_size(model.device.type, tokens.shape[1], vocabulary)):
        with torch.no_grad():
            logits = model(input_ids=batch, use_cache=False).logits
        losses = sequence_nll(logits, batch)
        if not np.isfinite(losses).all():
            raise EstimationError("the loss of the model is not a number on some sequences; compute in float32")
        yield losses
