"""How a model's parameters hold the matrices that are quantized.

A matrix has a row for each output and a column for each input: quantization groups lie along the inputs. Most
parameters are stored so. GPT-2's `Conv1D` and some experts are stored transposed, and experts of a layer share one
tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coopq.core.types import UNTOUCHED, Player, Width

if TYPE_CHECKING:
    from coopq.model.load import LoadedModel

_N_EXPERTS = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts", "n_experts")
"""Attributes of modules, and entries of configurations, that hold the number of experts."""
_DOWN = ("down_proj", "w2", "output_linear", "linear_2")
"""Names of experts' tensors that lead back to the hidden states."""


@dataclass(frozen=True)
class Matrix:
    """A parameter that holds one matrix, or the matrices of all experts of a layer.

    Attributes:
        parameter: The parameter.
        n_experts: Number of experts in the parameter; 0 for one matrix.
        transposed: Whether the parameter has the inputs before the outputs.
    """

    parameter: nn.Parameter
    n_experts: int = 0
    transposed: bool = False

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Outputs (of all experts together) and inputs."""
        outputs, inputs = self._axes()
        return max(1, self.n_experts) * outputs, inputs

    @cached_property
    def stored_shape(self) -> torch.Size:
        """Shape of the parameter when it had values."""
        return self.parameter.shape

    def rows(self, tensor: Tensor | None = None) -> Tensor:
        """The matrix, shape (outputs, inputs); the rows of experts lie one after the other.

        Args:
            tensor: A tensor of the parameter's shape instead of the parameter's own values.
        """
        data = self.parameter.data if tensor is None else tensor
        if self.n_experts:
            data = data.reshape(self.n_experts, -1, data.shape[-1])
        if self.transposed:
            data = data.transpose(-1, -2)
        return data.reshape(self.shape)

    def stored(self, rows: Tensor) -> Tensor:
        """A matrix of shape (outputs, inputs) as the parameter holds it, contiguous."""
        if self.transposed:
            rows = rows.reshape(max(1, self.n_experts), -1, self.shape[1]).transpose(-1, -2)
        return rows.contiguous().view(self.stored_shape)

    def _axes(self) -> tuple[int, int]:
        """Outputs and inputs of one matrix."""
        *leading, columns = self.parameter.shape
        n_rows = 1
        for size in leading:
            n_rows *= size
        n_rows //= max(1, self.n_experts)
        return (columns, n_rows) if self.transposed else (n_rows, columns)


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64: on its own device, or on the host if that device (MPS) has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes inputs W' + bias and nothing else; subclasses may have a forward of their own."""
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and _computes_a_product(type(module)))


def _computes_a_product(kind: type[nn.Linear]) -> bool:
    """Whether the forward of a class of linear layers is that of `nn.Linear`, written down again or inherited."""
    if kind.forward is nn.Linear.forward:
        return True
    with torch.random.fork_rng(devices=[]):
        layer, inputs = nn.Linear(3, 2, device="cpu"), torch.randn(4, 3, device="cpu")
    try:
        outputs = kind.forward(layer, inputs)
    except (TypeError, AttributeError, RuntimeError, ValueError, KeyError, IndexError):
        return False  # the forward needs more than a linear layer has
    return isinstance(outputs, torch.Tensor) and torch.allclose(outputs, layer(inputs), atol=1e-6)


def matrix_of(model: nn.Module, name: str) -> Matrix:
    """The matrix of a `LinearLayer`, by its name: a module with a weight, or a parameter that holds experts."""
    owner, _, attribute = name.rpartition(".")
    parent = model.get_submodule(owner)
    found = getattr(parent, attribute)
    if isinstance(found, nn.Parameter):
        experts = expert_matrices(parent)
        return experts[attribute] if attribute in experts else Matrix(found)
    return Matrix(found.weight, transposed=isinstance(found, Conv1D))


def round_untouched(loaded: "LoadedModel", players: Sequence[Player], widths: Sequence[Width]) -> bool:
    """Round weights to the 16 bits in which a saved model stores them, so that what is measured is what is saved.

    These are the players' weights, if players may stay untouched, and all other matrices, if the checkpoint has 16
    bits. Matrices of a GGUF file need it: an int8 times a scale in float16 has more digits than 16 bits.

    Returns:
        Whether a weight was changed.
    """
    model, checkpoint = loaded.model, loaded.checkpoint_dtype
    names = (linear.name for player in players for linear in player.linears)
    owned = {id(matrix_of(model, name).parameter) for name in names}
    is_changed = False
    for parameter in model.parameters():
        stays = UNTOUCHED in widths if id(parameter) in owned else checkpoint.itemsize == 2 and parameter.dim() > 1
        if stays:
            rounded = parameter.data.to(sixteen_bit_dtype(parameter.data, checkpoint)).to(parameter.dtype)
            is_changed |= not torch.equal(rounded, parameter.data)
            parameter.data = rounded
    return is_changed


def sixteen_bit_dtype(weight: Tensor, checkpoint: torch.dtype) -> torch.dtype:
    """The dtype that an untouched weight is saved in.

    Args:
        weight: The weight.
        checkpoint: The checkpoint's dtype, which is kept if it is bfloat16.
    Returns:
        Otherwise float16, or bfloat16 if float16 cannot hold a value of the weight.
    """
    if checkpoint == torch.bfloat16:
        return checkpoint
    fits = weight.is_meta or not weight.numel() or bool(weight.abs().max() <= torch.finfo(torch.float16).max)
    return torch.float16 if fits else torch.bfloat16


def expert_matrices(module: nn.Module) -> dict[str, Matrix]:
    """The experts that a module itself holds in shared tensors, by the name of the parameter."""
    n_experts = number_of_experts(module)
    if n_experts < 2:
        return {}
    found = {}
    for name, tensor in module.named_parameters(recurse=False):
        if "bias" in name:
            continue
        is_shared = tensor.dim() == 3 and len(tensor) == n_experts
        is_flat = tensor.dim() == 2 and len(tensor) % n_experts == 0 and len(tensor) > n_experts
        if (is_shared and min(tensor.shape[1:]) > 1) or (is_flat and _holds_flat_experts(module)):
            found[name] = tensor
    return {name: Matrix(tensor, n_experts, _is_transposed(module, name, found)) for name, tensor in found.items()}


def number_of_experts(module: Any) -> int:
    """The number of experts that a module, or a configuration, says it has; 0 if it says none."""
    for name in _N_EXPERTS:
        value = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _holds_flat_experts(module: nn.Module) -> bool:
    """Whether 2-D parameters hold experts one below the other, as DBRX's w1, v1 and w2 do."""
    return {"w1", "v1", "w2"} <= dict(module.named_parameters(recurse=False)).keys()


def _is_transposed(module: nn.Module, name: str, tensors: dict[str, nn.Parameter]) -> bool:
    """Whether a tensor of experts has the inputs before the outputs.

    transformers marks most modules of experts. For the others the hidden size says where inputs and outputs are.
    """
    if tensors[name].dim() == 2:  # each expert has rows as long as the hidden states
        return name in _DOWN
    marked = getattr(module, "is_transposed", None)
    if isinstance(marked, bool):
        return marked
    inputs = getattr(module, "input_size", None)
    hidden = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None)
    for other, tensor in tensors.items():  # one tensor whose axes differ tells about all
        middle, last = tensor.shape[1:]
        size = inputs if inputs is not None else hidden
        if size is None or middle == last:
            continue
        leads_back = inputs is None and other.startswith(_DOWN)
        if size in (middle, last):
            return (size == last) if leads_back else (size == middle)
    return False
