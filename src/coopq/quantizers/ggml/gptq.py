"""GPTQ (Frantar et al., 2023) into ggml's block types, as IST-DASLab's gptq-gguf-toolkit does for K-quants."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.core.types import Width
from coopq.model.matrices import matrix_of
from coopq.quantizers.backend import Packed
from coopq.quantizers.ggml.library import from_blocks, to_blocks
from coopq.quantizers.ggml.types import GGMLBackend, IQuants
from coopq.quantizers.input_statistics import second_moments

_DAMPING = 0.01
"""Share of the mean second moment of a layer's inputs that is added to each second moment."""
_COLUMNS_AT_ONCE = 128
"""Columns whose errors are passed on to later columns together."""
_LEAST_BITS, _MOST_BITS = 2, 6
"""Bits of codes that are rounded column by column. Codes of 1 bit are the signs of I-quants, whose other bits several
weights share; codes of more than 6 bits leave no error to compensate."""
_LEVELS_AT_ONCE = 2**26
"""Levels in memory, for rows that are rounded together: one for every code of every weight."""
_MOMENTS_BYTES = 2**31
"""Memory for second moments; the model runs once for as many layers as have room."""


class GGMLGPTQ(GGMLBackend):
    """ggml's types with second-order rounding: K-quants at 2.5 and 3.5 bits, the types of `ggml-iq` at other widths.

    ggml chooses the scales of a weight's blocks, with an importance matrix. Then codes are chosen column by column,
    columns with the largest inputs first, and later columns compensate the error of earlier ones. Inputs are those of
    the full-precision model, so a layer's weights depend on no other layer. ggml's own rounding stays if several
    weights share a code (I-quants below 4 bits), if codes have 8 bits, or if no token reaches a weight.
    """

    name: ClassVar[str] = "ggml-gptq"
    long_rows: ClassVar[Mapping[Width, str]] = {**IQuants.long_rows, 2.5: "Q2_K", 3.5: "Q3_K"}
    bits: ClassVar[tuple[Width, ...]] = tuple(sorted({*long_rows, *GGMLBackend.short_rows}))

    @property
    def settings(self) -> dict[str, Any]:
        """See `GGMLBackend.settings`; and the damping of second moments."""
        return {**super().settings, "damping": _DAMPING}

    def _quantize_layers(
        self, model: Any, widths: Mapping[str, Sequence[Width]], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[Width, str, Packed]]:
        """See `GGMLBackend._quantize_layers`."""
        for names in _portions(model, list(widths)):
            moments = {} if tokens is None else second_moments(model, names, tokens)
            latest, eliminations = torch.empty(0), list[Elimination]()
            for name in names:
                weight = matrix_of(model, name).rows()
                own = moments.pop(name, None)
                if own is None:
                    yield from ((width, name, self.quantize(weight, width)) for width in widths[name])
                    continue
                own = own.reshape(-1, *own.shape[-2:])  # (n_experts, in, in); a linear layer is one expert
                if not torch.equal(own, latest):  # q, k and v have the same inputs
                    latest, eliminations = own, [elimination_order(expert_moments) for expert_moments in own]
                for width in widths[name]:
                    blocks = self.quantize(weight, width, own.diagonal(dim1=1, dim2=2))["blocks"]
                    kind = self.format.tensor_type(weight.shape[1], width)
                    n_experts = len(eliminations)
                    parts = zip(weight.chunk(n_experts), blocks.chunk(n_experts), eliminations, strict=True)
                    yield width, name, {"blocks": torch.cat([second_order(kind, *part) for part in parts])}


def _portions(model: Any, names: Sequence[str]) -> Iterator[list[str]]:
    """Names of layers, in order, in portions whose second moments have room in memory together."""
    portion: list[str] = []
    left = _MOMENTS_BYTES
    for name in names:
        matrix = matrix_of(model, name)
        needed = 4 * max(1, matrix.n_experts) * matrix.shape[1] ** 2
        if portion and needed > left:
            yield portion
            portion, left = [], _MOMENTS_BYTES
        portion.append(name)
        left -= needed
    if portion:
        yield portion


class Elimination(NamedTuple):
    """The order in which columns are rounded, and how later columns compensate errors.

    Attributes:
        order: The columns, shape (in,).
        factor: Upper Cholesky factor of the inverse of the columns' second moments, in this order, shape (in, in). The
            row of a column divided by its diagonal entry is what later columns compensate for an error of one.
    """

    order: Tensor
    factor: Tensor


def elimination_order(moments: Tensor) -> Elimination:
    """The columns by falling second moment, and their factor.

    Args:
        moments: Second moments of a layer's inputs, shape (in, in).
    """
    exact = moments.double()
    damping = _DAMPING * exact.diagonal().mean().clamp(min=1e-30)
    order = exact.diagonal().argsort(descending=True, stable=True)
    ordered = exact[order][:, order] + damping * torch.eye(len(order), device=moments.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return Elimination(order, torch.linalg.cholesky(inverse, upper=True).float())


def second_order(kind: Any, weight: Tensor, blocks: Tensor, elimination: Elimination) -> Tensor:
    """Blocks with the same scales, and codes that change a layer's outputs less.

    Args:
        kind: A `gguf.GGMLQuantizationType`.
        weight: The weight, shape (out, in).
        blocks: ggml's blocks of the weight, uint8, shape (out, bytes of a row).
        elimination: Elimination of the layer's inputs.
    Returns:
        Blocks of the same shape; `blocks` itself if the type has no layout of codes.
    """
    layout = code_layout(kind)
    if layout is None:
        return blocks
    at_once = max(1, _LEVELS_AT_ONCE // (len(layout.patterns) * weight.shape[1]))
    parts = zip(weight.float().split(at_once), blocks.cpu().split(at_once), strict=True)
    return torch.cat([_second_order_rows(kind, layout, *part, elimination) for part in parts]).to(blocks.device)


def _second_order_rows(
    kind: Any, layout: "CodeLayout", weight: Tensor, blocks: Tensor, elimination: Elimination
) -> Tensor:
    """`second_order` for some rows."""
    order, factor = elimination
    filled = (from_blocks(kind, layout.filled(blocks, code)) for code in range(len(layout.patterns)))
    # Shape (in, codes, out): the levels of a column lie together.
    levels = torch.stack([weights.to(order.device).T[order] for weights in filled], dim=1)
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
    return layout.with_codes(blocks, codes[order.argsort()].T.cpu())


class CodeLayout(NamedTuple):
    """Where the blocks of a type keep the codes, if each weight has a code of its own.

    Attributes:
        places: Bits of a block that belong to each weight, the lowest bit of the code first; bits of a byte count from
            the lowest. Shape (bits of a code, weights).
        patterns: For each code, the bytes of a block in which every weight has this code and all other bits are zero,
            uint8, shape (codes, bytes).
    """

    places: npt.NDArray[np.intp]
    patterns: Tensor

    def with_codes(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """The blocks with other codes, uint8, shape (rows, columns)."""
        by_block = codes.numpy().reshape(-1, self.places.shape[1])
        return self._replace_codes(blocks, _code_bytes(by_block, self.places, self.patterns.shape[1]))

    def filled(self, blocks: Tensor, code: int) -> Tensor:
        """The blocks with one code for every weight."""
        return self._replace_codes(blocks, self.patterns[code])

    def _replace_codes(self, blocks: Tensor, code_bytes: Tensor) -> Tensor:
        """The blocks with other bits of codes. The pattern of the highest code has all bits of codes set."""
        by_block = blocks.reshape(-1, self.patterns.shape[1])
        return (by_block & ~self.patterns[-1] | code_bytes).reshape(blocks.shape)


def _code_bytes(codes: npt.NDArray[Any], places: npt.NDArray[np.intp], size: int) -> Tensor:
    """Blocks of `size` bytes that hold codes, shape (blocks, weights), and zeros elsewhere."""
    bits = np.zeros((len(codes), 8 * size), dtype=np.uint8)
    for bit, place in enumerate(places):
        bits[:, place] = codes >> bit & 1
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))


@cache
def code_layout(kind: Any) -> CodeLayout | None:
    """The layout of a type, found by flipping each bit of blocks and looking which weights change.

    Returns:
        None if weights have no codes of their own, or codes that are too short or too long (see `_LEAST_BITS`).
    """
    from gguf import GGML_QUANT_SIZES

    n_weights, size = GGML_QUANT_SIZES[kind]
    # Several blocks are tried: a bit of a scale changes a single weight if all other weights have the code of zero.
    random_blocks = to_blocks(
        kind, torch.randn(8, n_weights, generator=torch.Generator().manual_seed(0)), torch.ones(n_weights)
    )
    found = []
    for block in random_blocks.numpy():
        flipped = np.unpackbits(block, bitorder="little") ^ np.eye(8 * size, dtype=np.uint8)
        flipped_blocks = torch.from_numpy(np.packbits(flipped, axis=1, bitorder="little"))
        moved = (from_blocks(kind, flipped_blocks) != from_blocks(kind, torch.from_numpy(block[None]))).numpy()
        found.append(np.where(moved.sum(axis=1) == 1, moved.argmax(axis=1), -1))
    weight_of_bit = np.where(np.equal(found, found[0]).all(axis=0), found[0], -1)
    (n_bits, *different) = set(np.bincount(weight_of_bit[weight_of_bit >= 0], minlength=n_weights))
    if different or not _LEAST_BITS <= n_bits <= _MOST_BITS:
        return None
    places = np.stack([np.flatnonzero(weight_of_bit == weight) for weight in range(n_weights)], axis=1)
    return CodeLayout(places, _code_bytes(np.arange(2**n_bits)[:, None], places, size))
