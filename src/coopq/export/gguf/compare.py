"""Compares a whole base with a model, tensor by tensor, before anything is written."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.core.errors import Mismatch
from coopq.core.types import ProgressCallback
from coopq.export.gguf.base import BaseFile, BaseTensor
from coopq.export.gguf.names import TensorNames, module_tensors
from coopq.model.matrices import matrix_of

Numbers = npt.NDArray[np.float32]
_PERMUTED = ("attn_q", "attn_k", "attn_qkv", "ssm_")
"""Vectors whose entries llama.cpp reorders: biases of projections, and state spaces."""
_log = logging.getLogger("coopq")


def row_orders(
    base: BaseFile, model: Any, modules: Iterable[str], progress: ProgressCallback
) -> dict[str, npt.NDArray[np.intp]]:
    """Compare every tensor of a base with the model's.

    Args:
        base: The base.
        model: The model in full precision.
        modules: Names of the players' modules.
        progress: Told of every tensor.
    Returns:
        For each tensor that holds a module: which row of the module's weight each row of the tensor is.
    Raises:
        ExportError: If a module has no tensor of its own.
        Mismatch: Naming a tensor with other values.
    """
    names, owners = TensorNames(base), dict[str, list[str]]()
    state = model.state_dict()
    for name in state:
        for holder in names.tensors(name) or ():
            owners.setdefault(holder, []).append(name)
    unverified, orders = [], dict[str, npt.NDArray[np.intp]]()
    held = {tensor.name: module for tensor, module in module_tensors(base, modules)}
    n_tensors = Counter(held.values())
    for done, tensor in enumerate(base.tensors.values()):
        progress("comparing the base", done, len(base.tensors))
        if (module := held.get(tensor.name)) is not None:
            rows = matrix_of(model, module).rows()
            orders[tensor.name] = _row_order(tensor, rows, module, n_tensors[module])
            continue
        own = owners.get(tensor.name)
        if own is None:
            unverified.append(tensor.name)
        elif not any(_is_same(tensor, _matrix(model, name, state[name])) for name in own):
            raise Mismatch(
                f"{tensor.name} of the GGUF file {base.path} is not {own[0]} of the model",
                {"values": _sample(state[own[0]].flatten()[:3].float().cpu().numpy())},
                {"values": _sample(tensor.values().flatten()[:3])},
                "name an unquantized GGUF file of the same weights with --base",
            )
    progress("comparing the base", len(base.tensors), len(base.tensors))
    if unverified:
        more = f" and {len(unverified) - 5} more" if len(unverified) > 5 else ""
        _log.warning(
            "%d tensors of %s have no known counterpart in the model and are copied unverified: %s%s",
            len(unverified), base.path.name, ", ".join(unverified[:5]), more,
        )  # fmt: skip
    return orders


def _row_order(tensor: BaseTensor, weight: Tensor, module: str, n_tensors: int) -> npt.NDArray[np.intp]:
    """Which row of the model's weight each row of the base's tensor is.

    llama.cpp reorders the rows of some projections. Equal rows have equal blocks, so any of several equal rows will do.

    Args:
        tensor: The base's tensor.
        weight: The model's weight, shape (rows, columns).
        module: Name of the module.
        n_tensors: Number of the base's tensors that hold the module, each with a part of the rows.
    Raises:
        Mismatch: If the base has other rows.
    """
    theirs = tensor.values()
    if (len(weight) == len(theirs) or n_tensors > 1) and weight.shape[1] == theirs.shape[1]:
        for model_rows, base_rows in _rounded(tensor, weight, theirs):
            if np.array_equal(model_rows, base_rows):
                return np.arange(len(model_rows))
            order = _places(model_rows, base_rows)
            # A reordered tensor holds each row as often as the model; of two tensors, each holds its share.
            if order.min() >= 0 and (n_tensors > 1 or _has_same_rows(model_rows, base_rows)):
                return order
    raise Mismatch(
        f"{tensor.name} of the GGUF file is not {module} of the model",
        {"shape": tuple(weight.shape), "values": _sample(weight.flatten()[:3].float().cpu().numpy())},
        {"shape": theirs.shape, "values": _sample(theirs.flatten()[:3])},
        "name an unquantized GGUF file of the same weights with --base",
    )


def _matrix(model: Any, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the model, with its outputs before its inputs where it is a matrix."""
    if tensor.ndim < 2:
        return tensor
    try:
        return matrix_of(model, name.removesuffix(".weight")).rows()
    except (AttributeError, KeyError, ValueError, TypeError):
        return tensor  # a convolution, or another parameter that is no matrix


def _is_same(tensor: BaseTensor, ours: Tensor) -> bool:
    """Whether the model's numbers are the base's, or become them by what llama.cpp's converter does to tensors."""
    theirs = tensor.values()
    flat = ours.detach().float().cpu().reshape(-1)
    for model_values, base_values in _rounded(tensor, ours.detach().reshape(-1), theirs.reshape(-1)):
        if np.array_equal(model_values, base_values):
            return True
    numbers = flat.numpy()
    if numbers.size == theirs.size:
        if "norm" in tensor.name and np.allclose(numbers + 1, theirs.reshape(-1), rtol=1e-6, atol=1e-7):
            return True  # Gemma's norms
        if tensor.name.endswith("ssm_a") and _is_permuted(-np.exp(numbers), theirs.reshape(-1), 1e-5):
            return True
        if any(part in tensor.name for part in _PERMUTED) and 1 in (ours.ndim, *theirs.shape):
            return _is_permuted(numbers, theirs.reshape(-1), 0.0)
    if ours.ndim < 2:
        return False
    columns = theirs.shape[1]
    if numbers.size % columns or numbers.size < theirs.size:
        return False
    for model_rows, base_rows in _rounded(tensor, ours.detach().reshape(-1, columns), theirs):
        if _places(model_rows, base_rows).min() >= 0:
            return True
    if tensor.name.endswith("ssm_out.weight"):  # columns in another order
        return numbers.size == theirs.size and np.array_equal(
            np.sort(numbers.reshape(theirs.shape), axis=1), np.sort(theirs, axis=1)
        )
    if tensor.name.endswith("attn_k_b.weight"):
        return _is_permuted_part(numbers, theirs.reshape(-1))
    return False


def _rounded(tensor: BaseTensor, ours: Tensor, theirs: Numbers) -> list[tuple[Numbers, Numbers]]:
    """The model's and the base's numbers, in the base's type and in the model's dtype; no zero is negative."""
    import gguf

    narrow = {gguf.GGMLQuantizationType.F16: torch.float16, gguf.GGMLQuantizationType.BF16: torch.bfloat16}
    zero = np.float32(0)
    as_base = ours.detach().cpu().to(narrow.get(tensor.tensor_type, torch.float32)).float().numpy() + zero
    pairs = [(as_base, theirs + zero)]
    if ours.dtype != torch.float32:
        as_ours = torch.from_numpy(theirs.copy()).to(ours.dtype).float().numpy() + zero
        pairs.append((ours.detach().cpu().float().numpy() + zero, as_ours))
    return pairs


def _places(model_rows: Numbers, base_rows: Numbers) -> npt.NDArray[np.intp]:
    """Index of each row of the base in the model; -1 where the model has no such row."""
    places = {row.tobytes(): index for index, row in enumerate(model_rows)}
    return np.array([places.get(row.tobytes(), -1) for row in base_rows], np.intp)


def _has_same_rows(ours: Numbers, theirs: Numbers) -> bool:
    """Whether both have the same rows, each as often, in any order."""
    return sorted(row.tobytes() for row in ours) == sorted(row.tobytes() for row in theirs)


def _is_permuted(ours: Numbers, theirs: Numbers, tolerance: float) -> bool:
    return ours.size == theirs.size and bool(np.allclose(np.sort(ours), np.sort(theirs), rtol=tolerance, atol=0))


def _is_permuted_part(ours: Numbers, theirs: Numbers) -> bool:
    """Whether every number of the base is one of the model's: a part, transposed."""
    return bool(np.isin(theirs, ours.astype(np.float16).astype(np.float32)).all() or np.isin(theirs, ours).all())


def _sample(values: Numbers) -> list[float]:
    return [round(float(value), 6) for value in values]
