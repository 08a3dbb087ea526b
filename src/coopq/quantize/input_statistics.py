"""What calibration tokens bring to the linear layers, experts and head of a full-precision model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from coopq.model.players import weight_of

_BATCH_SEQUENCES = 2

_Keep: TypeAlias = Callable[[str, int, Tensor], None]


def column_importance(model: Any, names: Sequence[str], tokens: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    """Mean squares of the inputs of linear layers, experts and the head, by column.

    Args:
        model: A model of transformers.
        names: Of linear layers, of experts that are kept in one tensor, and of embeddings, whose inputs are those of
            the head where that is tied to them.
        tokens: Shape (n_sequences, length).
    Returns:
        Shape (in,) for a linear layer, (n_experts, in) for experts, of which those that no token reaches have the mean
        of the others. What is not multiplied with anything is left out.
    """
    return _means(model, names, tokens, lambda rows: rows.square().sum(dim=0, dtype=torch.float64))


def second_moments(model: Any, names: Sequence[str], tokens: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    """Mean products of the inputs of linear layers, experts and the head, by pair of columns: half of GPTQ's Hessian.

    Args: as for `column_importance`.

    Returns:
        Shape (in, in) for a linear layer, (n_experts, in, in) for experts, otherwise as `column_importance`.
    """
    return _means(model, names, tokens, lambda rows: rows.T @ rows)


@torch.no_grad()
def _means(
    model: Any, names: Sequence[str], tokens: npt.NDArray[np.int64], summed: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Means over inputs, shape (n, in), of what `summed` makes of some of them."""
    sums: dict[tuple[str, int], Tensor] = {}
    counts: dict[tuple[str, int], int] = {}
    latest = total = torch.empty(0)

    def keep(name: str, expert: int, inputs: Tensor) -> None:
        nonlocal latest, total
        rows, key = inputs.detach().flatten(0, -2), (name, expert)
        if inputs is not latest:  # as those of k and v are those of q
            latest, total = inputs, summed(rows.float())
        sums[key] = sums[key].add_(total) if key in sums else total.clone()
        counts[key] = counts.get(key, 0) + len(rows)

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        linears[name].register_forward_pre_hook(lambda _, inputs, name=name: keep(name, 0, inputs[0]))
        for name in names
        if name in linears
    ]
    experts = {name: weight for name in names if (weight := weight_of(model, name).data).dim() == 3}
    head = [name for name in names if weight_of(model, name) is model.get_output_embeddings().weight]
    try:
        with _experts_one_by_one(model) if experts else nullcontext(), _ExpertInputs(experts, keep):
            for start in range(0, len(tokens), _BATCH_SEQUENCES):
                batch = torch.from_numpy(tokens[start : start + _BATCH_SEQUENCES]).to(model.device)
                hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
                for name in head:
                    keep(name, 0, hidden)
    finally:
        for handle in handles:
            handle.remove()
    means = {key: (sums.pop(key) / counts[key]).float() for key in list(sums) if counts[key]}
    found = {name: means[name, 0] for name in names if (name, 0) in means and name not in experts}
    for name, weight in experts.items():
        reached = {expert: mean for (of, expert), mean in means.items() if of == name}
        if reached:
            others = torch.stack(list(reached.values())).mean(dim=0)
            found[name] = torch.stack([reached.get(expert, others) for expert in range(len(weight))])
    return found


@contextmanager
def _experts_one_by_one(model: Any) -> Iterator[None]:
    """Let experts be multiplied by `functional.linear`, each by itself."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


class _ExpertInputs(TorchFunctionMode):
    """Tells of the inputs of experts that are kept in one tensor, whose modules cannot be hooked.

    Args:
        experts: Tensors of shape (n_experts, out, in), by name.
        keep: Told of name, expert and inputs.
    """

    def __init__(self, experts: Mapping[str, Tensor], keep: _Keep) -> None:
        super().__init__()
        self._places = {
            part.data_ptr(): (name, expert) for name, tensor in experts.items() for expert, part in enumerate(tensor)
        }
        self._keep = keep

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is functional.linear and args[1].data_ptr() in self._places:
            self._keep(*self._places[args[1].data_ptr()], args[0])
        return function(*args, **(kwargs or {}))
