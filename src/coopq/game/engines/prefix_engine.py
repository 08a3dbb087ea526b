"""Losses of many assignments, with every common prefix of blocks computed once: the hot path.

The hidden states after block d depend only on the widths of the players in blocks 0 to d. Assignments in lexicographic
order are a depth-first walk of their prefix tree, so the engine keeps one hidden state for each depth.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from coopq.core.errors import EstimationError, ModelError, is_out_of_memory, one_line
from coopq.core.types import UNTOUCHED, Assignment, Assignments, as_widths
from coopq.game.engines.assigned_model import AssignedModel, Traversal, Walk
from coopq.game.engines.layer_major_engine import layer_major
from coopq.game.losses import Loss, NegativeLogLikelihood, make_loss, sequence_nll
from coopq.model.blockwise import Blockwise, States, whole_size
from coopq.model.offload import OffloadedBlocks
from coopq.model.players import blocks_share_weights
from coopq.model.texts import require_known_tokens
from coopq.quantizers.bank import WeightBank

_TOLERANCE = 1e-3
"""Most nats per token between the loss block by block and by the model's own forward, which has the same operations."""
_ROUNDING = 0.05
"""Most difference between the states after a block and after the compiled block, as a share of the states' norm. In
bfloat16 on an H100 either differs from float32 by 0.013 of the norm (docs/results/gpu.md)."""


def prefix_tree_size(assignments: Assignments, blocks: Sequence[int] | None = None) -> int:
    """Block forwards that a set of assignments takes: the number of distinct prefixes of one or more blocks.

    Args:
        assignments: Shape (n, n_players).
        blocks: Block of each player, ascending from 0, shape (n_players,); None if each player is a block.
    """
    unique = np.unique(assignments, axis=0)
    block_of_player = np.arange(unique.shape[1]) if blocks is None else np.asarray(blocks)
    shared = block_of_player[(unique[1:] != unique[:-1]).argmax(axis=1)]
    return int((block_of_player[-1] + 1) * len(unique) - shared.sum())


def make_engine(
    model: Any,
    bank: WeightBank,
    tokens: npt.NDArray[np.int64],
    loss: str = "nll",
    offloaded: OffloadedBlocks | None = None,
) -> "PrefixEngine":
    """The engine for a model: depth-first, or layer by layer if the model's blocks are offloaded.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        bank: The weights of the model's players at each width.
        tokens: Shape (n_sequences, length).
        loss: A name in `coopq.game.losses.LOSSES`.
        offloaded: The model's offloaded blocks.
    Raises:
        EstimationError: If the loss is unknown.
    """
    if offloaded is not None and blocks_share_weights(model):
        raise ModelError(
            f"{type(model).__name__}: its blocks share weights, so they cannot stay on the host; use a device that "
            "holds the whole model"
        )
    assigned = AssignedModel(Blockwise(model, tokens, offloaded), bank)
    return PrefixEngine(assigned, depth_first if offloaded is None else layer_major, make_loss(loss))


def depth_first(model: AssignedModel, assignments: Assignments, left_out: npt.NDArray[np.bool_]) -> Walk:
    """Walk the prefix tree depth-first: an assignment starts at the first block that differs from the one before.

    Args:
        model: The model, with all blocks where it computes.
        assignments: Distinct, in lexicographic order, shape (n, n_players).
        left_out: Which blocks each assignment leaves out, shape (n, n_blocks).
    """
    depth = len(model.members)
    states: list[States] = [[] for _ in range(depth + 1)]
    made: list[States | None] = [None] * depth  # what each block made last, which its next result is written over
    previous: Assignment | None = None
    for assignment, without in zip(assignments, left_out, strict=True):
        first = model.first_difference(assignment, previous)
        if first == 0:
            states[0] = model.embed(assignment)
        for d in range(first, depth):
            if without[d]:
                states[d + 1] = states[d]
                continue
            with model.block_at(d, assignment[model.members[d]]):
                states[d + 1] = made[d] = model.blockwise.forward_block(d, states[d], made[d])
        yield assignment, states[depth], int((~without[first:]).sum())
        previous = assignment


class PrefixEngine:
    """Measures the loss of assignments of one model on fixed tokens; `make_engine` builds it.

    Args:
        model: The model at the widths of assignments.
        traversal: The order in which blocks compute.
        loss: What is measured.

    Attributes:
        blockwise: The model, block by block.
        block_forwards: Forwards of one block over all tokens so far.
    """

    def __init__(self, model: AssignedModel, traversal: Traversal, loss: Loss) -> None:
        self.blockwise = model.blockwise
        self.block_forwards = 0
        self._model = model
        self._traversal = traversal
        self._loss = loss

    def evaluate(
        self, assignments: Assignments
    ) -> Generator[tuple[Assignment, npt.NDArray[np.float64], int], None, None]:
        """Measure the loss of each distinct assignment.

        Args:
            assignments: Shape (n, n_players); duplicates are evaluated once.
        Yields:
            Each distinct assignment in lexicographic order, the loss of each sequence (shape (n_sequences,), nats per
            token), and the block forwards spent since the assignment before.
        Raises:
            EstimationError: If a loss is not finite, or some but not all players of a block are `REMOVED`.
            ModelError: If the model's own forward gives another loss for the first batch of the first or the
                last assignment of the first call, or its blocks cannot run one by one.
        """
        unique = np.unique(assignments, axis=0)
        left_out = self._model.left_out(unique)
        with self._in_one_line():
            is_unchecked = self._record()
        checked = {0, len(unique) - 1} if is_unchecked else set()
        try:
            walk = self._traversal(self._model, unique, left_out)
            for index, without in enumerate(left_out):
                with self._in_one_line():
                    assignment, states, spent = next(walk)
                    losses = self._losses(self._loss, states)
                self.block_forwards += spent
                if not np.isfinite(losses).all():
                    raise EstimationError(
                        f"an assignment has no finite loss: {self._first_not_finite(assignment, without)} gives "
                        "numbers that are not finite; compute in float32, or use a wider low bit-width"
                    )
                if index in checked:
                    self._check(assignment, without, states)
                yield assignment, losses, spent
        finally:
            self._model.restore()

    def timed(self, clock: Callable[[Callable[[], object]], float]) -> tuple[float, float]:
        """What `clock` returns for one block, and for the head with the loss, over all tokens."""
        blockwise = self.blockwise
        with self._in_one_line():
            self._record()
            with blockwise.placed(0), blockwise.fast(0):
                out = blockwise.forward_block(0, blockwise.embedded)
                block = clock(lambda: blockwise.forward_block(0, blockwise.embedded, out))
            return block, clock(lambda: self._losses(self._loss, blockwise.embedded))

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        """Turn what a model raises whose blocks cannot run one by one into an error that says so."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"{self.blockwise.model_class}: its blocks cannot run one by one ({type(error).__name__}: "
                f"{one_line(error)}), so it cannot be measured"
            ) from error

    @torch.no_grad()
    def _first_not_finite(self, assignment: Assignment, left_out: npt.NDArray[np.bool_]) -> str:
        """The first part of the model whose numbers are not finite, in words."""
        states = self._model.embed(assignment)
        if not all(batch.isfinite().all() for batch in states):
            return "the embedding"
        self.blockwise.remember([])
        for d in np.flatnonzero(~left_out).tolist():
            widths = assignment[self._model.members[d]]
            with self._model.block_at(d, widths):
                states = self.blockwise.forward_block(d, states)
            if not all(batch.isfinite().all() for batch in states):
                return f"block {self.blockwise.prefix}.{d} at widths {as_widths(widths)}"
        return "the head"

    @torch.no_grad()
    def _losses(self, loss: Loss, states: States) -> npt.NDArray[np.float64]:
        """Loss of each sequence from states after the last block, by the model's own norm and head.

        States may cover the first batches only.
        """
        with self.blockwise.fast_head():
            return np.concatenate(
                [
                    loss.sequence_losses(j, self.blockwise.logits(batch), tokens.to(batch.device))
                    for j, (batch, tokens) in enumerate(zip(states, self.blockwise.batches, strict=False))
                ]
            )

    def _record(self) -> bool:
        """Watch the model call its blocks, and keep what the loss needs of full precision; whether that is new.

        Raises:
            ModelError: If a compiled block computes something else than the block.
        """
        is_new = self.blockwise.record()
        if is_new and self.blockwise.is_compiled:
            self._check_compiled()
        if is_new and self._loss.needs_reference:
            self._set_reference()
        return is_new

    @torch.no_grad()
    def _set_reference(self) -> None:
        """Hand the logits of the full-precision model to the loss."""
        untouched = np.full((1, self._model.members[-1].stop), UNTOUCHED, dtype=np.float32)
        ((_, states, spent),) = self._traversal(self._model, untouched, self._model.left_out(untouched))
        self.block_forwards += spent
        with self.blockwise.fast_head():
            self._loss.set_reference(self.blockwise.logits(batch) for batch in states)

    @torch.no_grad()
    def _check(self, assignment: Assignment, left_out: npt.NDArray[np.bool_], states: States) -> None:
        """Compare the negative log-likelihood of the first batch with the model's own forward.

        They differ for models whose blocks hand each other more than the hidden states.

        Args:
            assignment: The assignment.
            left_out: Which blocks it leaves out, shape (n_blocks,).
            states: Its states after the last block.
        """
        blockwise = self.blockwise
        final = states[0]
        if blockwise.is_compiled:
            # Compiled blocks round differently, and low widths that ruin the model amplify rounding differences.
            final = self._model.embed(assignment)[0]
            for d in np.flatnonzero(~left_out).tolist():
                self._model.set_block(d, assignment[self._model.members[d]])
                final = blockwise.call_block(d, 0, final)
        n_sequences = whole_size(final.device.type, blockwise.batches[0].shape[1], blockwise.vocabulary)
        batch = blockwise.batches[0][:n_sequences]
        with self._model.assigned(assignment):
            own = sequence_nll(blockwise.own_logits(batch, np.flatnonzero(left_out).tolist()), batch)
        found = self._losses(NegativeLogLikelihood(), [final])[: len(batch)]
        if not np.allclose(own, found, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise ModelError(
                f"{blockwise.model_class}: its loss is {found.mean():.5f} block by block and {own.mean():.5f} by its "
                "own forward; its blocks depend on more than the hidden states, so it cannot be measured"
            )

    @torch.no_grad()
    def _check_compiled(self) -> None:
        """Compare the first block with its compiled form on the first batch."""
        blockwise = self.blockwise
        plain = blockwise.call_block(0, 0, blockwise.embedded[0]).float()
        with blockwise.fast(0):
            compiled = blockwise.call_block(0, 0, blockwise.embedded[0]).float()
        difference = float((compiled - plain).norm() / plain.norm())
        if not difference <= _ROUNDING:
            raise ModelError(
                f"compiled by torch, block {blockwise.prefix}.0 is off by {difference:.3g} of its norm, more than the "
                f"{_ROUNDING} allowed; set TORCH_COMPILE_DISABLE=1 to run uncompiled"
            )


def model_nll(model: Any, tokens: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float64]]:
    """Mean negative log-likelihood of each sequence by the model's plain forward, a batch at a time.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        tokens: Shape (n_sequences, length); the first token of each sequence is not scored.
    Yields:
        The losses of the next sequences, nats per token.
    Raises:
        EstimationError: If a loss is not finite.
    """
    require_known_tokens(model, tokens)
    ids = torch.from_numpy(tokens).to(model.device)
    vocabulary = model.config.get_text_config().vocab_size
    for batch in ids.split(whole_size(model.device.type, tokens.shape[1], vocabulary)):
        with torch.no_grad():
            logits = model(input_ids=batch, use_cache=False).logits
        losses = sequence_nll(logits, batch)
        if not np.isfinite(losses).all():
            raise EstimationError("the loss of the model is not a number on some sequences; compute in float32")
        yield losses
