"""The forward of a model in pieces on fixed tokens: each block is called as the model itself calls it.

What a block is called with besides the hidden states (masks, positions, rotary tables) depends on the tokens alone. So
it is recorded once, in a forward of the model itself, and no architecture needs code of its own.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.core.errors import ModelError
from coopq.model.kernels.cpu import onednn_forwards
from coopq.model.kernels.forward import Forward, override_forward
from coopq.model.kernels.gpu import compiled_forward, is_compilable
from coopq.model.offload import OffloadedBlocks
from coopq.model.players import body_of, find_blocks
from coopq.model.texts import require_known_tokens

States: TypeAlias = list[Tensor]
"""Hidden states of all tokens by batch, each of shape (n, length, width)."""
BATCH_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens that go through a block together, by device type. Larger batches are hardly faster on CPUs and take memory."""
WHOLE_LOGIT_BYTES = 2**30
"""Most bytes of float32 logits that a forward of the whole model makes at once."""
LOGIT_BYTES = {"cpu": 2**24, "cuda": 2**29}
"""Bytes of float32 logits held at once, by device type. On CPUs that is about what the cache holds. Half as much is
slower, because the C library then returns the memory of each batch to the system; twice as much is slower too."""


def batch_size(device_type: str, length: int) -> int:
    """Sequences of `length` tokens that go through a block together."""
    return max(1, BATCH_TOKENS.get(device_type, BATCH_TOKENS["cuda"]) // length)


def whole_size(device_type: str, length: int, vocabulary: int) -> int:
    """Sequences of `length` tokens that go through the whole model together, head included."""
    return max(1, min(batch_size(device_type, length), WHOLE_LOGIT_BYTES // (4 * length * vocabulary)))


def logit_bytes(device_type: str) -> int:
    """Bytes of logits held at once where the logits of a batch come in portions."""
    return LOGIT_BYTES.get(device_type, LOGIT_BYTES["cuda"])


@dataclass(frozen=True)
class _Call:
    """How the model calls one block on one batch: all arguments but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rest: tuple[Any, ...] | None
    """What the block returns beside the hidden states; None if the block returns the states alone."""


class Blockwise:
    """The forward of a model in pieces: before its blocks, each block, and after its blocks.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        tokens: Shape (n_sequences, length).
        offloaded: The model's offloaded blocks; None if all blocks are where the model computes.

    Attributes:
        batches: The tokens that go through a block together, each of shape (n, length).
        embedded: The states before the first block; empty until `record`.
        n_blocks: Number of blocks.
        prefix: Name of the list of blocks in the model.
        model_class: Name of the model's class.
        is_compiled: Whether torch compiles the blocks for a GPU.
    """

    def __init__(self, model: Any, tokens: npt.NDArray[np.int64], offloaded: OffloadedBlocks | None = None) -> None:
        require_known_tokens(model, tokens)
        self._model = model
        self._offloaded = offloaded
        self.prefix, blocks = find_blocks(model)
        self._blocks = list(blocks)
        self.n_blocks = len(self._blocks)
        self.model_class = type(model).__name__
        ids = torch.from_numpy(tokens).to(model.device)
        self.batches = ids.split(batch_size(model.device.type, tokens.shape[1]))
        self._sizes = [len(batch) for batch in self.batches]
        self.embedded: States = []
        self._calls: list[list[_Call]] = []
        self._shared: list[MutableMapping[Any, Any]] = []
        self.is_compiled = offloaded is None and is_compilable(model)
        on_cpu = model.device.type == "cpu"  # offloaded blocks are on the CPU, but compute elsewhere
        self._fast_model = onednn_forwards(model) if on_cpu else {}
        if self.is_compiled:
            self._fast_blocks = [{block: compiled_forward(block)} for block in self._blocks]
        else:
            self._fast_blocks = [onednn_forwards(block) if on_cpu else {} for block in self._blocks]

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        return int(self._model.config.get_text_config().vocab_size)

    def record(self) -> bool:
        """Watch the model call its blocks, in the first call only; whether this was the first call."""
        if self._calls:
            return False
        recorded = [self._record(batch) for batch in self.batches]
        self.embedded = _together([embedded for embedded, _ in recorded], self._sizes)
        self._calls = [list(calls) for calls in zip(*(calls for _, calls in recorded), strict=True)]
        self._shared = [shared for _, calls in recorded for shared in _shared_dictionaries(calls)]
        return True

    @torch.no_grad()
    def _record(self, batch: Tensor) -> tuple[Tensor, list[_Call]]:
        """States of a batch before the first block, and the call of each block, from one forward of the model."""
        embedded: list[Tensor] = []
        calls: list[_Call] = []

        def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kwargs = dict(kwargs)
            states, *rest = args if args else (kwargs.pop("hidden_states"),)
            if not calls:
                embedded.append(states)
            calls.append(_Call(tuple(rest), kwargs, tuple(output[1:]) if isinstance(output, tuple | list) else None))

        handles = [block.register_forward_hook(record, with_kwargs=True) for block in self._blocks]
        try:
            body_of(self._model)(input_ids=batch, use_cache=False)  # no logits
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != self.n_blocks or embedded[0].dim() != 3:
            shape = tuple(embedded[0].shape) if embedded else ()
            raise ModelError(
                f"{self.model_class}: its forward makes {len(calls)} calls of its {self.n_blocks} blocks, and the "
                f"states before the first have shape {shape}; only models that call each block once, with states of "
                "shape (sequences, length, width), can be measured"
            )
        return embedded[0], calls

    def memory(self) -> list[dict[Any, Any]]:
        """What blocks left for later blocks in dictionaries that the model hands to several of them, by copies."""
        return [dict(shared) for shared in self._shared]

    def remember(self, memory: Sequence[Mapping[Any, Any]]) -> None:
        """Let later blocks find what `memory` gave before; empty dictionaries where it gives nothing."""
        for shared, content in zip(self._shared, memory or [{}] * len(self._shared), strict=True):
            shared.clear()
            shared.update(content)

    def placed(self, d: int) -> AbstractContextManager[None]:
        """Let block d be on the device of the states inside the `with` block."""
        return nullcontext() if self._offloaded is None else self._offloaded.placed(d)

    def fast(self, d: int) -> AbstractContextManager[None]:
        """Let block d compute by the fastest kernels, without gradients, inside the `with` block."""
        return override_forward(self._fast_blocks[d])

    def fast_head(self) -> AbstractContextManager[None]:
        """Let everything around the blocks compute by the fastest kernels, without gradients."""
        return override_forward(self._fast_model)

    @torch.no_grad()
    def forward_block(self, d: int, states: States, out: States | None = None) -> States:
        """States after block d.

        Args:
            d: The block.
            states: The states before it.
            out: The result of an earlier call that nobody needs any more. It is written over: new memory is slow.
        """
        with self.placed(d):
            return _together((self.call_block(d, j, batch) for j, batch in enumerate(states)), self._sizes, out)

    def call_block(self, d: int, j: int, states: Tensor) -> Tensor:
        """States of batch j after block d, which is called as the model calls it."""
        call = self._calls[d][j]
        output = self._blocks[d](states, *call.args, **call.kwargs)
        return output if call.rest is None else output[0]

    def head(self, states: Tensor) -> Tensor:
        """Logits of each position, shape (n, length, vocabulary), by the model's own norm and head.

        The model's own forward runs with every block replaced by a function that returns `states`. The tokens do not
        matter then.

        Args:
            states: States after the last block, shape (n, length, width).
        """

        def answer(*_: Any, **__: Any) -> Any:
            rest = self._calls[-1][0].rest
            return states if rest is None else (states, *rest)

        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        with override_forward(dict.fromkeys(self._blocks, answer)):
            return self._model(input_ids=ids, use_cache=False).logits

    def logits(self, states: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Logits of all positions but the last of each sequence, a portion of the vocabulary at a time.

        A portion stays in the processor's cache. The head has all its rows again before a portion is handed out, so
        the model is unchanged at any time, even if not all portions are asked for.

        Args:
            states: States after the last block, shape (n, length, width).
        Yields:
            The first token of the portion, and the portion's logits, shape (n * (length - 1), size).
        """
        positions = states[:, :-1].flatten(0, 1).unsqueeze(1)  # sequences of one token
        n_rows = len(self._model.get_output_embeddings().weight)
        size = max(1, logit_bytes(states.device.type) // (4 * len(positions)))
        for first in range(0, n_rows, size):
            with self._head_rows(first, first + size):
                portion = self.head(positions)[:, 0]
            yield first, portion

    @contextmanager
    def _head_rows(self, start: int, stop: int) -> Iterator[None]:
        """Let the head have only some rows of its weight inside the `with` block."""
        head, embedding = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        padding = getattr(embedding, "padding_idx", None)
        whole = [(tensor, tensor.data) for tensor in (head.weight, head.bias) if tensor is not None]
        try:
            for tensor, data in whole:
                tensor.data = data[start:stop]
            # The embedding may be the head, without the padding token's row now. Only gradients need the row.
            embedding.padding_idx = None
            yield
        finally:
            embedding.padding_idx = padding
            for tensor, data in whole:
                tensor.data = data

    @torch.no_grad()
    def embed(self) -> States:
        """The states before the first block, by the weights that the embedding has now."""
        return _together((self._embed(batch) for batch in self.batches), self._sizes)

    def _embed(self, batch: Tensor) -> Tensor:
        """What the model hands to its first block, by its own forward with blocks that only pass states on."""
        embedded: list[Tensor] = []
        pass_on = _pass_on(self._calls[0][0].rest)

        def first(*args: Any, **kwargs: Any) -> Any:
            embedded.append(args[0] if args else kwargs["hidden_states"])
            return pass_on(*args, **kwargs)

        with override_forward({**dict.fromkeys(self._blocks, pass_on), self._blocks[0]: first}):
            body_of(self._model)(input_ids=batch, use_cache=False)
        return embedded[0]

    def own_logits(self, batch: Tensor, left_out: Sequence[int]) -> Tensor:
        """Logits of a batch by the model's own forward without some blocks, shape (n, length, vocabulary)."""
        with override_forward({self._blocks[d]: _pass_on(self._calls[d][0].rest) for d in left_out}):
            return self._model(input_ids=batch, use_cache=False).logits

    def positions_at_once(self) -> int:
        """Positions whose logits over the whole vocabulary may be held with their gradients."""
        return max(1, logit_bytes(self._model.device.type) // (4 * self.vocabulary))


def _together(batches: Iterable[Tensor], sizes: Sequence[int], out: States | None = None) -> States:
    """Batches, each of shape (size, length, width), in one piece of memory.

    Hidden states outlive the batch that made them. If each batch had memory of its own, with a block's temporary
    tensors allocated between the batches, the C library could not return the memory to the system.
    """
    made = iter(batches)
    first = next(made)
    if len(sizes) == 1:
        return [first]
    pieces = out or list(first.new_empty((sum(sizes), *first.shape[1:])).split(list(sizes)))
    for piece, states in zip(pieces, chain([first], made), strict=True):
        piece.copy_(states)
    return pieces


def _shared_dictionaries(calls: Sequence[_Call]) -> list[MutableMapping[Any, Any]]:
    """Dictionaries that a model hands to several of its blocks, in which blocks leave keys and values for others."""
    found = [
        value for call in calls for value in (*call.args, *call.kwargs.values()) if isinstance(value, MutableMapping)
    ]
    counts = Counter(id(value) for value in found)
    return list({id(value): value for value in found if counts[id(value)] > 1}.values())


def _pass_on(rest: tuple[Any, ...] | None) -> Forward:
    """The forward of a block that is left out: it returns the states that it gets, and `rest` if there is any."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return states if rest is None else (states, *rest)

    return forward
