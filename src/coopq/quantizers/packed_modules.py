"""Modules that keep their weights packed, and the packed weights of a whole model."""

from collections import UserDict
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from coopq.core.specs import QuantizerSpec
from coopq.core.types import Width
from coopq.model.matrices import Matrix, is_linear, matrix_of
from coopq.model.safetensors_io import load_tensors
from coopq.quantizers import get_backend
from coopq.quantizers.backend import Backend, Packed

ABOUT = {"form": "packed weights and all other tensors"}
"""What the weights file of a saved model says that it holds."""


class PackedWeights(UserDict[str, Packed]):
    """The packed weights of a model by module name, with the backend that reads them.

    Args:
        spec: The backend and its options.
        tensors: Packed tensors of each module; none at first if None is given.
    Raises:
        BackendError: As `coopq.quantizers.get_backend`.
    """

    def __init__(self, spec: QuantizerSpec, tensors: Mapping[str, Packed] | None = None) -> None:
        super().__init__(tensors)
        self.backend = get_backend(spec)

    @classmethod
    def read(
        cls, folder: Path, spec: QuantizerSpec, modules: Iterable[str]
    ) -> tuple["PackedWeights", dict[str, Tensor]]:
        """Read the weights file of a saved model.

        Args:
            folder: The saved model.
            spec: The backend that packed the weights, and its options.
            modules: Names of the modules whose weights are packed.
        Returns:
            The packed weights, in the order of `modules`, and all other tensors of the file by name.
        Raises:
            OutputError: If the file cannot be read.
        """
        weights = cls(spec)
        packed: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
        rest: dict[str, Tensor] = {}
        for key, tensor in load_tensors(
            folder / weights.backend.weights_file, way_out="save the model again", about=ABOUT
        ).items():
            module, part = _split(key, packed)
            if module:
                packed[module][part] = tensor
            else:
                rest[key] = tensor
        weights.update(packed)
        return weights, rest


def _split(key: str, modules: Container[str]) -> tuple[str, str]:
    """The module that a saved tensor belongs to and the tensor's name there; ("", key) for other tensors."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module, part = ".".join(parts[:end]), ".".join(parts[end:])
        if module in modules and part != "bias":
            return module, part
    return "", key


def install(
    model: Any,
    weights: PackedWeights,
    widths: Mapping[str, Width],
    device: torch.device,
    dtype: torch.dtype,
    *,
    dequantize: bool = False,
) -> None:
    """Let a model compute with packed weights: by packed modules, or by its own modules with dequantized weights.

    Args:
        model: The model, on `device`; the weights of the named modules need no values.
        weights: The packed weights; the function empties them, so that each weight is in memory once.
        widths: Width of each named module.
        device: The device of the packed weights.
        dtype: The dtype to compute in.
        dequantize: Whether weights are dequantized now, instead of in each forward pass.
    Raises:
        KeyError: If a module has no packed tensors, or tensors of another width.
        AttributeError: If the model has no module of a name.
    """
    backend = weights.backend
    for name, bits in widths.items():
        matrix = matrix_of(model, name)
        shape = matrix.shape
        if sum(tensor.nbytes for tensor in weights[name].values()) != backend.storage_bytes(shape, bits):
            raise KeyError(f"the tensors of {name} are not those of {bits} bits")
        packed = {key: tensor.to(device) for key, tensor in weights.pop(name).items()}
        if dequantize:
            matrix.parameter.data = matrix.stored(backend.dequantize(packed, shape, bits, dtype))
            continue
        if matrix.n_experts:
            owner, _, attribute = name.rpartition(".")
            PackedExperts(backend, packed, matrix, bits, dtype).attach(model, owner, attribute)
            continue
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            if (head := model.get_output_embeddings()).weight is module.weight:
                model.set_output_embeddings(backend.linear(packed, shape, bits, head.bias, dtype))
            _replace(model, module, PackedEmbedding(module, backend, packed, bits, dtype))
        elif is_linear(module):
            _replace(model, module, backend.linear(packed, shape, bits, module.bias, dtype))
        else:
            raise AttributeError(f"{name} is no linear layer")


def _replace(model: Any, module: nn.Module, packed: nn.Module) -> None:
    """Put a module in the place of another, at every place that has its weight: blocks may share modules or weights."""
    weight, is_embedding = module.weight, isinstance(module, nn.Embedding)
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if child is module or (not is_embedding and is_linear(child) and child.weight is weight):
                setattr(parent, name, packed)


class _PackedModule(nn.Module):
    """A module that keeps a packed weight as buffers."""

    def __init__(self, backend: Backend, packed: Packed, bits: Width, dtype: torch.dtype) -> None:
        super().__init__()
        self._backend, self._bits, self._dtype = backend, bits, dtype
        for name, tensor in packed.items():
            self.register_buffer(name.replace(".", "/"), tensor)  # names of buffers have no dots

    def _weight(self, shape: tuple[int, int]) -> Tensor:
        """The dequantized weight."""
        packed = {name.replace("/", "."): tensor for name, tensor in self.named_buffers(recurse=False)}
        return self._backend.dequantize(packed, shape, self._bits, self._dtype)


class PackedLinear(_PackedModule):
    """A linear layer that dequantizes its weight in each forward pass, for backends without a module of their own."""

    def __init__(
        self,
        backend: Backend,
        packed: Packed,
        shape: tuple[int, int],
        bits: Width,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(backend, packed, bits, dtype)
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, shape (out, in): some models multiply by the weight themselves."""
        return self._weight((self.out_features, self.in_features))

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs W' + bias."""
        return functional.linear(inputs, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shape and width, for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self._bits}"


class PackedEmbedding(_PackedModule):
    """An embedding that dequantizes its weight in each forward pass.

    Args:
        embedding: The model's own embedding. Its forward is used; its weight is freed.
        backend: The backend that dequantizes.
        packed: The packed weight.
        bits: Width of the weight.
        dtype: Dtype to compute in.
    """

    def __init__(
        self, embedding: nn.Embedding, backend: Backend, packed: Packed, bits: Width, dtype: torch.dtype
    ) -> None:
        super().__init__(backend, packed, bits, dtype)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        embedding.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self._own = embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the weight, computed by the model's own embedding."""
        weight = self._weight((self.num_embeddings, self.embedding_dim))
        rows: Tensor = functional_call(self._own, {"weight": weight}, (ids,))
        return rows


class PackedExperts(_PackedModule):
    """Experts that share one tensor, dequantized while their module computes.

    Args:
        backend: The backend that dequantizes.
        packed: The packed weight: the rows of all experts, one after the other.
        matrix: How the model's parameter holds the experts.
        bits: Width of the weight.
        dtype: Dtype to compute in.
    """

    def __init__(self, backend: Backend, packed: Packed, matrix: Matrix, bits: Width, dtype: torch.dtype) -> None:
        super().__init__(backend, packed, bits, dtype)
        self._matrix = matrix

    def attach(self, model: Any, owner: str, attribute: str) -> None:
        """Let a module compute with these experts; the memory of the module's own tensor is freed.

        Args:
            model: The model.
            owner: Name of the module that has the tensor.
            attribute: Name of the tensor.
        """
        module, parameter = model.get_submodule(owner), self._matrix.parameter
        # A module that has experts in two dimensions gets them from its parent, which slices the tensor.
        user = module if parameter.dim() > 2 else model.get_submodule(owner.rpartition(".")[0])

        def fill(*_: Any) -> None:
            parameter.data = self._matrix.stored(self._weight(self._matrix.shape))

        def free(*_: Any) -> None:
            parameter.data = torch.empty(0, dtype=self._dtype)

        shape = self._matrix.shape, self._matrix.stored_shape  # known while the parameter has values
        assert shape[0][0] * shape[0][1] == parameter.numel(), shape
        free()
        module.add_module(f"packed_{attribute}", self)
        user.register_forward_pre_hook(fill)
        user.register_forward_hook(free, always_call=True)
