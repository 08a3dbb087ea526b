"""GPTQ (Frantar et al., 2023) into ggml's block types, as IST-DASLab's gptq-gguf-toolkit has it for K-quants."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.quantize.backend import Packed
from coopq.quantize.ggml.types import GGMLBackend, IQuants, from_blocks, to_blocks
from coopq.quantize.input_statistics import second_moments
from coopq.model.players import weight_of
from coopq.core.types import Width

_DAMPING = 0.01
"""Of the mean second moment of a layer's inputs, added to each."""
_COLUMNS_AT_ONCE = 128
"""Whose errors reach later columns together."""
_LEAST_BITS, _MOST_BITS = 2, 6
"""Of a code of which columns are rounded one by one: some I-quants have a sign for each weight, and share the rest;
and rounding to more leaves nothing to make good."""
_LEVELS_AT_ONCE = 2**26
"""Numbers in memory: of rows that are rounded together, every level of every weight."""
_MOMENTS_BYTES = 2**31
"""Memory for second moments; the calibration tokens are run once for as many layers as have room."""


class GGMLGPTQ(GGMLBackend):
    """ggml's types with second-order rounding: K-quants have the half widths, I-quants the whole ones up to four.

    ggml chooses the scales of a weight's blocks, with an importance matrix; then codes are chosen column by column,
    those with the largest inputs first, and what each is off by is made good by those that come after. Inputs are those
    of the full-precision model, so that a layer's weights depend on nothing else. Where several weights share a code
    (I-quants of less than four bits), where codes have eight bits, and where no tokens reach a weight, ggml's own
    rounding stays.
    """

    name: ClassVar[str] = "ggml-gptq"
    long_rows: ClassVar[Mapping[Width, str]] = {**IQuants.long_rows, 2.5: "Q2_K", 3.5: "Q3_K"}
    bits: ClassVar[tuple[Width, ...]] = tuple(long_rows)

    @property
    def settings(self) -> dict[str, Any]:
        """See `GGMLBackend.settings`; and what is added to second moments."""
        return {**super().settings, "damping": _DAMPING}

    def _each(
        self, model: Any, widths: Mapping[str, Sequence[Width]], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[Width, str, Packed]]:
        """See `GGMLBackend._each`."""
        for names in _with_room(model, list(widths)):
            moments = {} if tokens is None else second_moments(model, names, tokens)
            before, orders = torch.empty(0), list[Elimination]()
            for name in names:
                weight = weight_of(model, name).data.flatten(0, -2)
                of_inputs = moments.pop(name, None)
                if of_inputs is None:
                    yield from ((width, name, self.quantize(weight, width)) for width in widths[name])
                    continue
                of_inputs = of_inputs.reshape(-1, *of_inputs.shape[-2:])  # of each expert, or of a layer
                if not torch.equal(of_inputs, before):  # as those of q, k and v are
                    before, orders = of_inputs, [elimination_order(of_expert) for of_expert in of_inputs]
                for width in widths[name]:
                    blocks = self.quantize(weight, width, of_inputs.diagonal(dim1=1, dim2=2))["blocks"]
                    kind = self.tensor_type(weight.shape[1], width)
                    parts = zip(weight.chunk(len(orders)), blocks.chunk(len(orders)), orders, strict=True)
                    yield width, name, {"blocks": torch.cat([second_order(kind, *part) for part in parts])}


def _with_room(model: Any, names: Sequence[str]) -> Iterator[list[str]]:
    """The names, in order, in groups of layers whose second moments fit in memory together."""
    group: list[str] = []
    left = _MOMENTS_BYTES
    for name in names:
        *experts, _, columns = weight_of(model, name).shape
        needed = 4 * int(np.prod(experts)) * columns**2
        if group and needed > left:
            yield group
            group, left = [], _MOMENTS_BYTES
        group.append(name)
        left -= needed
    if group:
        yield group


class Elimination(NamedTuple):
    """How columns are rounded one after the other.

    Attributes:
        order: The columns, shape (in,).
        factor: The upper Cholesky factor of the inverse of their second moments, in this order, shape (in, in): its
            row of a column, over that row's diagonal, is what later columns have to make good of an error of one.
    """

    order: Tensor
    factor: Tensor


def elimination_order(moments: Tensor) -> Elimination:
    """The order of columns of falling second moment, shape (in, in), and their factor."""
    of_columns = moments.double()
    damping = _DAMPING * of_columns.diagonal().mean().clamp(min=1e-30)
    order = of_columns.diagonal().argsort(descending=True, stable=True)
    ordered = of_columns[order][:, order] + damping * torch.eye(len(order), device=moments.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return Elimination(order, torch.linalg.cholesky(inverse, upper=True).float())


def second_order(kind: Any, weight: Tensor, blocks: Tensor, elimination: Elimination) -> Tensor:
    """Blocks with the same scales, and codes that lose less of a layer's outputs.

    Args:
        kind: A `gguf.GGMLQuantizationType`.
        weight: Shape (out, in).
        blocks: What ggml makes of it, uint8, shape (out, bytes of a row).
        elimination: Of the inputs.
    """
    layout = code_layout(kind)
    if layout is None:
        return blocks
    at_once = max(1, _LEVELS_AT_ONCE // (len(layout.patterns) * weight.shape[1]))
    parts = zip(weight.float().split(at_once), blocks.cpu().split(at_once), strict=True)
    return torch.cat([_second_order(kind, layout, *part, elimination) for part in parts]).to(blocks.device)


def _second_order(kind: Any, layout: "CodeLayout", weight: Tensor, blocks: Tensor, elimination: Elimination) -> Tensor:
    """`second_order` of some rows."""
    order, factor = elimination
    every = (from_blocks(kind, layout.filled(blocks, code)) for code in range(len(layout.patterns)))
    levels = torch.stack([of_code.to(order.device).T[order] for of_code in every], dim=1)  # a column's in one place
    left = weight.T.to(order.device)[order]
    codes = torch.empty(left.shape, dtype=torch.uint8, device=order.device)
    for start in range(0, len(left), _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, len(left))
        errors = torch.empty_like(left[start:stop])
        for column in range(start, stop):
            chosen = (levels[column] - left[column]).abs().min(dim=0).indices  # argmin is several times slower
            codes[column] = chosen
            rounded = levels[column].gather(0, chosen[None])[0]
            errors[column - start] = (left[column] - rounded) / factor[column, column]
            left[column:stop].addr_(factor[column, column:stop], errors[column - start], alpha=-1)
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return layout.coded(blocks, codes[order.argsort()].T.cpu())


class CodeLayout(NamedTuple):
    """Where a type keeps the codes of weights that have each its own.

    Attributes:
        places: Bits of a block that are a weight's own, lowest first within a byte, shape (bits of a code, weights).
        patterns: The bytes of a block of which every weight has the same code, zero where others are, uint8, shape
            (codes, bytes).
    """

    places: npt.NDArray[np.intp]
    patterns: Tensor

    def coded(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """The blocks with other codes, uint8, shape (rows, columns)."""
        of_blocks = codes.numpy().reshape(-1, self.places.shape[1])
        return self._replaced(blocks, _bytes_of(of_blocks, self.places, self.patterns.shape[1]))

    def filled(self, blocks: Tensor, code: int) -> Tensor:
        """The blocks with one code for every weight."""
        return self._replaced(blocks, self.patterns[code])

    def _replaced(self, blocks: Tensor, own: Tensor) -> Tensor:
        """The blocks with other bytes where weights have bits of their own, all of which the last pattern has set."""
        every = blocks.reshape(-1, self.patterns.shape[1])
        return (every & ~self.patterns[-1] | own).reshape(blocks.shape)


def _bytes_of(codes: npt.NDArray[Any], places: npt.NDArray[np.intp], size: int) -> Tensor:
    """Blocks of so many bytes that hold codes, shape (blocks, weights), and nothing else."""
    bits = np.zeros((len(codes), 8 * size), dtype=np.uint8)
    for bit, place in enumerate(places):
        bits[:, place] = codes >> bit & 1
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))


@cache
def code_layout(kind: Any) -> CodeLayout | None:
    """The layout of a type, found by asking ggml which weights change with a bit of their block.

    Returns:
        None where weights have no codes of their own, or longer ones than second-order rounding is worth.
    """
    from gguf import GGML_QUANT_SIZES

    n_weights, size = GGML_QUANT_SIZES[kind]
    # Of several blocks, for a scale may move one weight alone where all others have the code of zero.
    drawn = torch.randn(8, n_weights, generator=torch.Generator().manual_seed(0))
    found = []
    for block in to_blocks(kind, drawn, torch.ones(n_weights)).numpy():
        flipped = np.unpackbits(block, bitorder="little") ^ np.eye(8 * size, dtype=np.uint8)
        of_flipped = torch.from_numpy(np.packbits(flipped, axis=1, bitorder="little"))
        moved = (from_blocks(kind, of_flipped) != from_blocks(kind, torch.from_numpy(block[None]))).numpy()
        found.append(np.where(moved.sum(axis=1) == 1, moved.argmax(axis=1), -1))
    owners = np.where(np.equal(found, found[0]).all(axis=0), found[0], -1)
    (n_bits, *others) = set(np.bincount(owners[owners >= 0], minlength=n_weights))
    if others or not _LEAST_BITS <= n_bits <= _MOST_BITS:
        return None
    places = np.stack([np.flatnonzero(owners == weight) for weight in range(n_weights)], axis=1)
    return CodeLayout(places, _bytes_of(np.arange(2**n_bits)[:, None], places, size))
