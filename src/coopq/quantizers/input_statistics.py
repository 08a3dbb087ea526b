"""Statistics of the inputs that tokens bring to layers of the full-precision model."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from coopq.core.errors import ModelError, first_names
from coopq.core.types import ProgressCallback, silent
from coopq.model.kernels.cpu import onednn_forwards
from coopq.model.kernels.forward import override_forward
from coopq.model.matrices import Matrix, in_float64, is_linear, matrix_of
from coopq.model.players import body_of
from coopq.model.texts import require_known_tokens

_log = logging.getLogger(__name__)
_BATCH_SEQUENCES = 2
_STRIPS = 8
"""Strips of a matrix of second moments, each without most of what lies below the diagonal."""
_PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
"""Functions by which models multiply inputs with experts."""

_Keep: TypeAlias = Callable[[str, int, Tensor], None]
"""Called with the name of a layer, the number of an expert (0 for a linear layer), and inputs."""


def column_importance(
    model: Any, names: Sequence[str], tokens: npt.NDArray[np.int64], progress: ProgressCallback = silent
) -> dict[str, Tensor]:
    """Mean square of each input column of linear layers, experts and the head.

    Args:
        model: A model of transformers.
        names: Names of linear layers, of tensors that hold experts, and of embeddings. The inputs of an embedding are
            those of the head, if the head is tied to the embedding.
        tokens: Tokens, shape (n_sequences, length).
        progress: Told of every batch of sequences.
    Returns:
        By name: shape (in,) for a linear layer, (n_experts, in) for experts. An expert that no token reaches gets the
        mean of the other experts. Layers that no token reaches are left out.
    """
    return _input_means(model, names, tokens, lambda rows: in_float64(rows.square()).sum(dim=0), progress)


def second_moments(
    model: Any, names: Sequence[str], tokens: npt.NDArray[np.int64], progress: ProgressCallback = silent
) -> dict[str, Tensor]:
    """Mean product of each pair of input columns of linear layers, experts and the head: half of GPTQ's Hessian.

    Args: as for `column_importance`.

    Returns:
        By name: shape (in, in) for a linear layer, (n_experts, in, in) for experts; otherwise as `column_importance`.
        Layers with the same inputs (q, k and v; gate and up) have the same tensor.
    """
    found = _input_means(model, names, tokens, _products_above, progress)
    for half in {id(half): half for half in found.values()}.values():
        half.triu_()
        half.add_(half.triu(1).mT)
    return found


def _products_above(rows: Tensor) -> Tensor:
    """The products of each pair of columns, summed over rows, on and above the diagonal, shape (in, in).

    The products below the diagonal are the same. Leaving most of them out takes 9/16 of the operations.
    """
    columns = rows.shape[1]
    total = rows.new_zeros(columns, columns)
    for start in range(0, columns, strip := -(-columns // _STRIPS)):
        total[start : start + strip, start:] = rows[:, start : start + strip].T @ rows[:, start:]
    return total


@torch.no_grad()
def _input_means(
    model: Any,
    names: Sequence[str],
    tokens: npt.NDArray[np.int64],
    total_of_rows: Callable[[Tensor], Tensor],
    progress: ProgressCallback,
) -> dict[str, Tensor]:
    """Means over all inputs of a statistic.

    Args:
        model: A model of transformers.
        names: As for `column_importance`.
        tokens: As for `column_importance`.
        total_of_rows: The statistic summed over some inputs, shape (n, in), float32.
        progress: As for `column_importance`.
    """
    require_known_tokens(model, tokens)
    sums: dict[tuple[str, int], Tensor] = {}
    counts: dict[tuple[str, int], int] = {}
    owners: dict[tuple[str, int], tuple[str, int]] = {}
    latest, latest_key = torch.empty(0), ("", 0)

    def keep(name: str, expert: int, inputs: Tensor) -> None:
        nonlocal latest, latest_key
        key = name, expert
        # Layers called one after the other with the same inputs have one sum: q, k and v; gate and up.
        owner = owners.setdefault(key, latest_key if inputs is latest else key)
        if owner != key:
            assert inputs is latest, key
            return
        latest, latest_key, rows = inputs, key, inputs.detach().flatten(0, -2)
        total = total_of_rows(rows.float())
        sums[key] = sums[key].add_(total) if key in sums else total
        counts[key] = counts.get(key, 0) + len(rows)

    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    handles = [
        linears[name].register_forward_pre_hook(lambda _, inputs, name=name: keep(name, 0, inputs[0]))
        for name in names
        if name in linears
    ]
    experts = {name: matrix for name in names if (matrix := matrix_of(model, name)).n_experts}
    head_weight = model.get_output_embeddings().weight
    head = [name for name in names if matrix_of(model, name).parameter is head_weight]
    fast = onednn_forwards(model) if model.device.type == "cpu" else {}
    try:
        with (
            _experts_one_by_one(model) if experts else nullcontext(),
            _ExpertInputs(experts, keep),
            override_forward(fast),
        ):
            for start in range(0, len(tokens), _BATCH_SEQUENCES):
                progress("collecting inputs of layers", start, len(tokens))
                batch = torch.from_numpy(tokens[start : start + _BATCH_SEQUENCES]).to(model.device)
                hidden = body_of(model)(input_ids=batch, use_cache=False).last_hidden_state
                for name in head:
                    keep(name, 0, hidden)
            progress("collecting inputs of layers", len(tokens), len(tokens))
    finally:
        for handle in handles:
            handle.remove()
    by_owner = {key: (sums.pop(key) / counts[key]).float() for key in list(sums) if counts[key]}
    means = {key: by_owner[owner] for key, owner in owners.items() if owner in by_owner}
    found = {name: means[name, 0] for name in names if (name, 0) in means and name not in experts}
    for name, matrix in experts.items():
        reached = {expert: mean for (owner, expert), mean in means.items() if owner == name}
        if reached:
            average = torch.stack(list(reached.values())).mean(dim=0)
            found[name] = torch.stack([reached.get(expert, average) for expert in range(matrix.n_experts)])
            if len(reached) < matrix.n_experts:
                _log.warning(
                    "%d of %d experts of %s were reached by no token; they are quantized as the mean of the others, so "
                    "use more tokens to fit weights to",
                    matrix.n_experts - len(reached),
                    matrix.n_experts,
                    name,
                )
    for name, mean in found.items():
        if not mean.isfinite().all():
            raise ModelError(
                f"inputs of {name} are not finite in {model.dtype}; compute with --dtype bfloat16 or float32"
            )
    unreached = [name for name in names if (name in linears or name in experts) and name not in found]
    if unreached:
        _log.warning(
            "%d layers were reached by no token (%s); they are quantized as if all their inputs were alike, so use "
            "more tokens to fit weights to",
            len(unreached),
            first_names(unreached),
        )
    return found


@contextmanager
def _experts_one_by_one(model: Any) -> Iterator[None]:
    """Let transformers multiply each expert by itself, with `functional.linear`."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


class _ExpertInputs(TorchFunctionMode):
    """Reports the inputs of experts that share one tensor; these are no modules, so hooks cannot see them.

    Args:
        experts: The tensors that hold the experts, by name.
        keep: Called with name, expert and inputs.
    """

    def __init__(self, experts: Mapping[str, Matrix], keep: _Keep) -> None:
        super().__init__()
        self._experts = experts
        self._keep = keep

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _PRODUCTS and len(args) > 1 and (place := self._place(args[1].data_ptr())):
            name, expert = place
            if args[1].dim() == 3:  # all experts at once, each with its own inputs
                for index in range(self._experts[name].n_experts):
                    self._keep(name, index, args[0][index])
            else:
                self._keep(name, expert, args[0])
        return function(*args, **(kwargs or {}))

    def _place(self, pointer: int) -> tuple[str, int] | None:
        """The tensor that holds an expert, and the expert's number; looked up anew, as offloaded tensors move."""
        for name, matrix in self._experts.items():
            parameter = matrix.parameter
            expert, rest = divmod(pointer - parameter.data_ptr(), parameter.nbytes // matrix.n_experts)
            if not rest and 0 <= expert < matrix.n_experts:
                return name, expert
        return None
