"""A model replayed block by block on fixed tokens, each block called as the model itself calls it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.model.players import find_blocks

BATCH_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens that go through a block together, by device. On CPUs, larger batches are hardly faster, and take more."""
WHOLE_LOGIT_BYTES = 2**30
"""Logits that a forward of the whole model may make at once, in float32."""
LOGIT_BYTES = {"cpu": 2**24, "cuda": 2**29}
"""Logits that are held at once, by device: on CPUs about what the cache holds. Half as much is slower (the C library
then returns the memory of each batch to the system, and every page of the next one is a fault), and so is twice."""


def batch_size(device: str, length: int) -> int:
    """Sequences of a length that go through a block together, on a type of device."""
    return max(1, BATCH_TOKENS.get(device, BATCH_TOKENS["cuda"]) // length)


def whole_size(device: str, length: int, vocabulary: int) -> int:
    """Sequences of a length that go through a whole model together, head and all."""
    return max(1, min(batch_size(device, length), WHOLE_LOGIT_BYTES // (4 * length * vocabulary)))


def logit_bytes(device: str) -> int:
    """Bytes of logits that are held at once on a type of device, where not all of a batch are asked for."""
    return LOGIT_BYTES.get(device, LOGIT_BYTES["cuda"])


@dataclass(frozen=True)
class _Call:
    """How the model itself calls one block: everything but the hidden states depends on the tokens alone."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returns_tuple: bool


class Replay:
    """The forward of a model in pieces: what comes before its blocks, each block, and what comes after them.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        tokens: Shape (n_sequences, length).

    Attributes:
        batches: The tokens as they go through a block together, each of shape (n, length).
        embedded: The states that the first block gets, by batch, shape (n, length, width); empty until `record`.
    """

    def __init__(self, model: Any, tokens: npt.NDArray[np.int64]) -> None:
        self._model = model
        self._prefix, blocks = find_blocks(model)
        self._blocks = list(blocks)
        ids = torch.from_numpy(tokens).to(model.device)
        self.batches = ids.split(batch_size(model.device.type, tokens.shape[1]))
        self._sizes = [len(batch) for batch in self.batches]
        self.embedded: list[Tensor] = []
        self._calls: list[list[_Call]] = []

    def record(self) -> bool:
        """Watch the model call its blocks, once; whether it was done just now."""
        if self._calls:
            return False
        recorded = [self._record(batch) for batch in self.batches]
        self.embedded = _together([embedded for embedded, _ in recorded], self._sizes)
        self._calls = [list(calls) for calls in zip(*(calls for _, calls in recorded), strict=True)]
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
            self._model.base_model(input_ids=batch, use_cache=False)  # no logits
        finally:
            for handle in handles:
                handle.remove()
        return embedded[0], calls

    def placed(self, d: int) -> AbstractContextManager[None]:
        """Let block d be where the states are; here it always is."""
        return nullcontext()

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

    def logits(self, states: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Logits of all positions but the last of each sequence, a portion of the vocabulary at a time.

        So they stay in the cache. Positions are sequences of one token.

        Args:
            states: After the last block, shape (n, length, width).
        Yields:
            The first token of the portion, and its logits, shape (n * (length - 1), size).
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
                yield first, self.head(positions)[:, 0]
        finally:
            head.weight.data = weight
            if bias is not None:
                head.bias.data = bias

    @torch.no_grad()
    def embed(self) -> list[Tensor]:
        """What the first block gets with the embedding as it is now, by batch."""
        return _together((self._embed(batch) for batch in self.batches), self._sizes)

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

    def own_logits(self, batch: Tensor, left_out: Sequence[int]) -> Tensor:
        """Logits of a batch by the model's own forward without some blocks, shape (n, length, vocabulary)."""
        with self._answering({d: _pass_on(self._calls[d][0].returns_tuple) for d in left_out}):
            return self._model(input_ids=batch, use_cache=False).logits

    def positions_at_once(self) -> int:
        """Positions whose logits, of the whole vocabulary, may be held with their gradients."""
        vocabulary = self._model.config.get_text_config().vocab_size
        return max(1, logit_bytes(self._model.device.type) // (4 * vocabulary))


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
