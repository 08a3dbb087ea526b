"""Losses of many assignments, computing every common prefix of blocks once: the hot path.

The hidden state after block d depends only on the bits of the players in blocks 0..d. Assignments in lexicographic
order are a depth-first walk of their prefix tree, so one hidden state per depth is all that has to be kept.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.bank import WeightBank
from coopq.errors import EstimationError, ModelError
from coopq.losses import Reference, portions_divergence, portions_nll, sequence_means, sequence_nll
from coopq.onednn import ByOneDNN
from coopq.players import find_blocks
from coopq.types import REMOVED, UNTOUCHED, Assignment, Assignments

BATCH_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens that go through a block together, by device. On CPUs, larger batches are hardly faster, and take more."""
LOGIT_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""Logits that are held at once, by device: on CPUs about what the cache holds. Half as much is slower (the C library
then returns the memory of each batch to the system, and every page of the next one is a fault), and so is twice."""
_TOLERANCE = 1e-3
"""Nats per token by which a replay may differ from the model's own forward; it repeats the same operations."""


def batch_size(device: str, length: int) -> int:
    """Sequences of a length that go through a block together, on a type of device."""
    return max(1, BATCH_TOKENS.get(device, BATCH_TOKENS["cuda"]) // length)


def logit_bytes(device: str) -> int:
    """Bytes of logits that are held at once on a type of device, where not all of a batch are asked for."""
    return LOGIT_BYTES.get(device, LOGIT_BYTES["cuda"])


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


@dataclass(frozen=True)
class _Call:
    """How the model itself calls one block: everything but the hidden states depends on the tokens alone."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returns_tuple: bool


class PrefixEngine:
    """Evaluates assignments of one model on one fixed set of tokens.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        bank: Its players' weights; the model's weights are the bank's to move.
        tokens: Shape (n_sequences, length).
        loss: Which of `coopq.losses.LOSSES`; the divergence keeps the full-precision model's distributions.

    Attributes:
        layer_forwards: Forwards of one block over all tokens spent so far.
        members: Indices of the players in each block, ascending.
        batches: The tokens as they go through a block together, each of shape (n, length).
        embedded: The states that the first block gets, by batch, shape (n, length, width); empty until `record`.
    """

    def __init__(self, model: Any, bank: WeightBank, tokens: npt.NDArray[np.int64], loss: str = "nll") -> None:
        self._model = model
        self._bank = bank
        self._prefix, blocks = find_blocks(model)
        self._blocks = list(blocks)
        # Blocks that only visit the device where the model computes are no matter for a CPU.
        on_cpu = model.device.type == "cpu"
        self._fast_model: AbstractContextManager[None] = ByOneDNN(model) if on_cpu else nullcontext()
        self._fast_blocks = [ByOneDNN(block) if on_cpu else nullcontext() for block in self._blocks]
        self.layer_forwards = 0
        self.members: list[list[int]] = [[] for _ in self._blocks]
        for index, player in enumerate(bank.players):
            self.members[player.block].append(index)
        ids = torch.from_numpy(tokens).to(model.device)
        self.batches = ids.split(batch_size(model.device.type, tokens.shape[1]))
        self._sizes = [len(batch) for batch in self.batches]
        self.embedded: list[Tensor] = []
        self._embeddings: dict[int, list[Tensor]] = {}
        self._embedding = 0 if bank.players[0].is_end else None
        self._calls: list[list[_Call]] = []
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
                        f"the loss of assignment {assignment.tolist()} is not a number; "
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
        width = UNTOUCHED if self._embedding is None else int(assignment[self._embedding])
        if width == UNTOUCHED:
            return self.embedded
        if width not in self._embeddings:
            self._bank.set_player(0, width)
            self._embeddings[width] = _together((self._embed(batch) for batch in self.batches), self._sizes)
        return self._embeddings[width]

    @torch.no_grad()
    def _embed(self, batch: Tensor) -> Tensor:
        """What the model gives its first block for a batch, by its own forward with blocks that only pass it on."""
        embedded: list[Tensor] = []

        def answer(*args: Any, **kwargs: Any) -> Any:
            embedded.append(args[0] if args else kwargs["hidden_states"])
            return passed_on(*args, **kwargs)

        passed_on = _pass_on(self._calls[0][0].returns_tuple)
        answers = dict.fromkeys(range(1, len(self._blocks)), passed_on)
        with self._answering({0: answer, **answers}):
            self._model.base_model(input_ids=batch, use_cache=False)
        return embedded[0]

    def placed(self, d: int) -> AbstractContextManager[None]:
        """Let block d be where the states are; here it always is."""
        return nullcontext()

    def fast(self, d: int) -> AbstractContextManager[None]:
        """Let block d compute as fast as it can, without gradients."""
        return self._fast_blocks[d]

    def _set(self, d: int, bits: Assignment) -> None:
        """Let block d have the weights of its players at some widths, shape (n_members,)."""
        for player, width in zip(self.members[d], bits, strict=True):
            self._bank.set_player(player, int(width))

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
        found = self._scores(hidden[:1], None)
        for d in np.flatnonzero(~left_out):
            self._set(int(d), assignment[self.members[d]])
        batch = self.batches[0]
        removed = {int(d): _pass_on(self._calls[d][0].returns_tuple) for d in np.flatnonzero(left_out)}
        with self._answering(removed):
            own = sequence_nll(self._model(input_ids=batch, use_cache=False).logits, batch)
        if not np.allclose(own, found, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise ModelError(
                f"{type(self._model).__name__}: block by block its loss is {found.mean():.5f}, by its own "
                f"forward {own.mean():.5f}; its blocks depend on more than the hidden states, so it cannot be measured"
            )

    @torch.no_grad()
    def forward_block(self, d: int, hidden: list[Tensor], room: list[Tensor] | None = None) -> list[Tensor]:
        """States after block d from those before it, batch by batch.

        Args:
            d: The block.
            hidden: The states before it, by batch, each of shape (n, length, width).
            room: What an earlier call gave and nobody needs any more: it is written over, for new memory is slow.
        """
        with self.placed(d):
            return _together((self.call_block(d, j, states) for j, states in enumerate(hidden)), self._sizes, room)

    def call_block(self, d: int, j: int, states: Tensor) -> Tensor:
        """States of batch j after block d, called as the model itself does."""
        call = self._calls[d][j]
        output = self._blocks[d](states, *call.args, **call.kwargs)
        return output[0] if call.returns_tuple else output

    def head(self, states: Tensor) -> Tensor:
        """Logits from states after the last block, shape (n, length, width), each by itself.

        It is the model's own forward with every block replaced by one that answers `states`; which tokens it gets does
        not matter then.
        """

        def answer(*_: Any, **__: Any) -> Any:
            return (states,) if self._calls[-1][0].returns_tuple else states

        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        with self._answering(dict.fromkeys(range(len(self._blocks)), answer)):
            return self._model(input_ids=ids, use_cache=False).logits

    @contextmanager
    def _answering(self, answers: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
        """Let other functions stand in for the forwards of some blocks."""
        attributes = {d: vars(self._blocks[d]) for d in answers}
        before = {d: of_block["forward"] for d, of_block in attributes.items() if "forward" in of_block}
        try:
            for d, answer in answers.items():
                attributes[d]["forward"] = answer
            yield
        finally:
            for d in answers:
                del attributes[d]["forward"]
                if d in before:
                    attributes[d]["forward"] = before[d]

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
                portions = self._logits(states)
                if reference is None:
                    scores = portions_nll(portions, tokens[:, 1:].flatten().to(states.device))
                else:
                    scores = portions_divergence(portions, reference[j])
                found.append(sequence_means(scores, tokens))
            return np.concatenate(found)

    def _logits(self, states: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Logits of all positions but the last of each sequence, a portion of the vocabulary at a time.

        So they stay in the cache. Positions are sequences of one token.

        Args:
            states: After the last block, shape (n, length, width).
        Yields:
            The first token of the portion, and its logits in float32, shape (n * (length - 1), size).
        """
        positions = states[:, :-1].flatten(0, 1).unsqueeze(1)
        head = self._model.get_output_embeddings()
        weight, bias = head.weight.data, None if head.bias is None else head.bias.data
        size = max(1, logit_bytes(states.device.type) // (4 * len(positions)))
        try:
            for first in range(0, len(weight), size):
                head.weight.data = weight[first : first + size]
                if bias is not None:
                    head.bias.data = bias[first : first + size]
                yield first, self.head(positions).float()[:, 0]
        finally:
            head.weight.data = weight
            if bias is not None:
                head.bias.data = bias

    @torch.no_grad()
    def _refer(self) -> list[Reference]:
        """What the full-precision model makes of each batch."""
        whole = np.full((1, len(self._bank.players)), UNTOUCHED, dtype=np.int8)
        ((_, hidden, spent),) = self._walk(whole, np.zeros((1, len(self._blocks)), dtype=np.bool_))
        self.layer_forwards += spent
        with self._fast_model:
            return [Reference.of(self._logits(states)) for states in hidden]

    def positions_at_once(self) -> int:
        """Positions whose logits, of the whole vocabulary, may be held with their gradients."""
        vocabulary = self._model.config.get_text_config().vocab_size
        return max(1, logit_bytes(self._model.device.type) // (4 * vocabulary))

    def timed(self, clock: Callable[[Callable[[], object]], float]) -> tuple[float, float]:
        """What `clock` says of one block and of the head with the loss, over all tokens."""
        self.record()
        with self.placed(0), self.fast(0):
            room = self.forward_block(0, self.embedded)
            block = clock(lambda: self.forward_block(0, self.embedded, room))
        return block, clock(lambda: self.losses(self.embedded))

    def record(self) -> bool:
        """Watch the model call its blocks, and keep what it predicts if need be, once; whether it was done just now."""
        if self._calls:
            return False
        recorded = [self._record(batch) for batch in self.batches]
        self.embedded = _together([embedded for embedded, _ in recorded], self._sizes)
        self._calls = [list(calls) for calls in zip(*(calls for _, calls in recorded), strict=True)]
        if self._diverges:
            self._reference = self._refer()
        return True

    @torch.no_grad()
    def _record(self, batch: Tensor) -> tuple[Tensor, list[_Call]]:
        """Embedded states of a batch and the call of each block, from one forward of the model."""
        embedded: list[Tensor] = []
        calls: list[_Call] = []

        def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kwargs = dict(kwargs)
            states, *rest = args if args else (kwargs.pop("hidden_states"),)
            if not calls:
                embedded.append(states)
            calls.append(_Call(tuple(rest), kwargs, isinstance(output, tuple)))

        handles = [block.register_forward_hook(record, with_kwargs=True) for block in self._blocks]
        try:
            self._model(input_ids=batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return embedded[0], calls


def _together(batches: Iterable[Tensor], sizes: Sequence[int], room: list[Tensor] | None = None) -> list[Tensor]:
    """Batches, each of shape (size, length, width), in one piece of memory.

    Hidden states outlive the batch that made them. Pieces of a batch each, with what comes and goes within a block
    allocated between them, leave holes that the C library does not give back.
    """
    made = iter(batches)
    first = next(made)
    if len(sizes) == 1:
        return [first]
    pieces = room or list(first.new_empty((sum(sizes), *first.shape[1:])).split(list(sizes)))
    for piece, states in zip(pieces, chain([first], made), strict=True):
        piece.copy_(states)
    return pieces


def _pass_on(returns_tuple: bool) -> Callable[..., Any]:
    """The forward of a block that is left out."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states,) if returns_tuple else states

    return forward


def model_nll(model: Any, tokens: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float64]]:
    """Loss of each sequence by the model's plain forward, a batch at a time; see `sequence_nll`."""
    ids = torch.from_numpy(tokens).to(model.device)
    for batch in ids.split(batch_size(model.device.type, tokens.shape[1])):
        with torch.no_grad():
            logits = model(input_ids=batch, use_cache=False).logits
        losses = sequence_nll(logits, batch)
        if not np.isfinite(losses).all():
            raise EstimationError("the loss of the model is not a number on some sequences; compute in float32")
        yield losses
