"""GPTQ (Frantar et al., 2023) into ggml's block types, as IST-DASLab's gptq-gguf-toolkit does for K-quants."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.core.types import ProgressCallback, Width, silent
from coopq.model.matrices import in_float64, matrix_of
from coopq.quantizers.backend import Packed
from coopq.quantizers.ggml.codes import CodeLayout, code_layout
from coopq.quantizers.ggml.types import GGMLBackend, IQuants
from coopq.quantizers.input_statistics import second_moments
from coopq.quantizers.sizes import in_portions

_ROUNDING = 1
"""Version of the second-order rounding; raise it when the same inputs would give a weight other codes."""
_DAMPING = 0.01
"""Share of the mean second moment of a layer's inputs that is added to each second moment."""
_COLUMNS_AT_ONCE = 128
"""Columns whose errors are passed on to later columns together."""
_WEIGHTS_AT_ONCE = 2**24
"""Weights that are rounded together, in memory as float32 with up to four levels each."""
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

    def __init__(self) -> None:
        super().__init__()  # second moments hold the importance too, so no imatrix is taken

    @property
    def settings(self) -> dict[str, Any]:
        """See `GGMLBackend.settings`; and the version of the rounding, and the damping of second moments."""
        return {**super().settings, "rounding": _ROUNDING, "damping": _DAMPING}

    def _quantize_layers(
        self,
        model: Any,
        widths: Mapping[str, Sequence[Width]],
        tokens: npt.NDArray[np.int64] | None,
        progress: ProgressCallback = silent,
    ) -> Iterator[tuple[Width, str, Packed]]:
        """See `GGMLBackend._quantize_layers`."""
        for names in portions(model, list(widths)):
            moments = {} if tokens is None else second_moments(model, names, tokens, progress)
            inputs = {name: id(moments[name]) if name in moments else name for name in names}
            # q, k and v have the same inputs, and so have gate and up.
            for _, together in groupby(names, inputs.__getitem__):
                weights = {name: matrix_of(model, name).rows() for name in together}
                *_, own = (moments.pop(name, None) for name in weights)
                found = self._round(weights, widths, own)
                yield from ((width, name, {"blocks": found[name, width]}) for name in weights for width in widths[name])

    def _round(
        self, weights: Mapping[str, Tensor], widths: Mapping[str, Sequence[Width]], moments: Tensor | None
    ) -> dict[tuple[str, Width], Tensor]:
        """Blocks of layers with the same inputs, by name and width; rows of one type are rounded together.

        Args:
            weights: Weight of each layer by name, shape (out, in).
            widths: Widths of each layer by name.
            moments: Second moments of the inputs, shape (in, in) or (n_experts, in, in); None if no token reaches them.
        """
        importance = None if moments is None else moments.diagonal(dim1=-2, dim2=-1)
        blocks = {
            (name, width): self.quantize(weight, width, importance)["blocks"]
            for name, weight in weights.items()
            for width in widths[name]
        }
        if moments is None:
            return blocks
        moments = moments.reshape(-1, *moments.shape[-2:])  # a linear layer is one expert
        eliminations = [elimination_order(of_expert) for of_expert in moments]
        for width in dict.fromkeys(width for _, width in blocks):
            names = [name for name in weights if width in widths[name]]
            kind = self.format.tensor_type(moments.shape[-1], width)
            parts = [
                torch.cat([_by_expert(tensor, len(moments)) for tensor in tensors], dim=1)
                for tensors in ([weights[name] for name in names], [blocks[name, width] for name in names])
            ]
            rounded = torch.stack([second_order(kind, *part) for part in zip(*parts, eliminations, strict=True)])
            n_rows = [len(weights[name]) // len(moments) for name in names]
            for name, own in zip(names, rounded.split(n_rows, dim=1), strict=True):
                blocks[name, width] = own.reshape(-1, own.shape[-1])
        return blocks


def _by_expert(rows: Tensor, n_experts: int) -> Tensor:
    """Rows of experts one after the other, shape (n_experts * out, n), as (n_experts, out, n)."""
    return rows.reshape(n_experts, -1, rows.shape[1])


def portions(model: Any, names: Sequence[str]) -> Iterator[list[str]]:
    """Names of layers, in order, in portions whose second moments have room in memory together."""
    matrices = {name: matrix_of(model, name) for name in names}
    n_bytes = {name: 4 * max(1, own.n_experts) * own.shape[1] ** 2 for name, own in matrices.items()}
    return in_portions(n_bytes, _MOMENTS_BYTES)


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
    exact = in_float64(moments)
    damping = _DAMPING * exact.diagonal().mean().clamp(min=1e-30)
    order = exact.diagonal().argsort(descending=True, stable=True)
    ordered = exact[order][:, order] + damping * torch.eye(len(order)).to(exact)
    # The inverse of A = U U', U upper, has the upper factor U^-1; U is the Cholesky factor of A in reversed order.
    reversed_factor = torch.linalg.cholesky(ordered.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(order)).to(ordered)
    return Elimination(order, torch.linalg.solve_triangular(reversed_factor, identity, upper=True).float())


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
    at_once = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    parts = zip(weight.float().split(at_once), blocks.cpu().split(at_once), strict=True)
    return torch.cat([_second_order_rows(kind, layout, *part, elimination) for part in parts]).to(blocks.device)


def _second_order_rows(
    kind: Any, layout: CodeLayout, weight: Tensor, blocks: Tensor, elimination: Elimination
) -> Tensor:
    """`second_order` for some rows."""
    order, factor = elimination
    levels = layout.levels(kind, blocks).to(order.device)
    is_falling = levels[..., 0] > levels[..., -1]
    levels = torch.where(is_falling[..., None], levels.flip(2), levels)
    middles = ((levels[..., 1:] + levels[..., :-1]) / 2).unbind()
    by_run, run_of_column, pivots = levels.unbind(), (order // layout.run).tolist(), factor.diagonal().tolist()
    left = weight.T.to(order.device)[order]
    chosen = []
    for start in range(0, len(left), _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, len(left))
        errors = torch.empty_like(left[start:stop])
        for column, (own, error) in enumerate(
            zip(left[start:stop, :, None].unbind(), errors.unbind(), strict=True), start
        ):
            run = run_of_column[column]
            nearest = torch.searchsorted(middles[run], own)
            torch.sub(own, by_run[run].gather(1, nearest), out=error[:, None]).div_(pivots[column])
            left[column:stop].addr_(factor[column, column:stop], error, alpha=-1)
            chosen.append(nearest.byte())
        left[stop:] -= factor[start:stop, stop:].T @ errors
    numbers = torch.cat(chosen, dim=1)[:, order.argsort()]
    falls = is_falling.T.repeat_interleave(layout.run, dim=1)
    return layout.with_codes(blocks, torch.where(falls, layout.n_codes - 1 - numbers, numbers).cpu())
