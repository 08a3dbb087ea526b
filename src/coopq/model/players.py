"""Finds the transformer blocks of a model, and the linear layers and experts in them, from structure alone."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from coopq.core.errors import ModelError, hint
from coopq.core.types import LinearLayer, Player

GRANULARITIES = ("block", "fused", "linear")
"""What a player can be: a transformer block, linear layers of a block that engines fuse into one, or a linear layer."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers with the same input. Engines such as vLLM multiply them as one matrix, so they need the same width."""


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks, with its name in the model.

    The list is the outermost `nn.ModuleList` that has as many entries as the configuration has hidden layers, with
    linear layers in each entry.

    Raises:
        ModelError: If there is no such list, or more than one.
    """
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if not isinstance(module, nn.ModuleList) or len(module) != n_layers or inside_another:
            continue
        if all(_block_layers(block) for block in module):
            found[name] = module
    if len(found) != 1:
        lists = [
            f"{name} ({len(module)})" for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
        ]
        raise ModelError(
            f"{type(model).__name__}: {len(found) or 'no'} candidates for its transformer blocks {list(found)}; looked "
            f"for one nn.ModuleList of num_hidden_layers = {n_layers} blocks with nn.Linear layers in each, and the "
            f"model's lists are: {', '.join(lists) or 'none'}; only decoder-only models of that form can be quantized"
        )
    return next(iter(found.items()))


def linear_layers(model: Any) -> tuple[LinearLayer, ...]:
    """All linear layers, and tensors that hold experts, in transformer blocks, in the order of the model's modules.

    Raises:
        ModelError: If the blocks cannot be found.
    """
    prefix, blocks = find_blocks(model)
    return tuple(layer for index, block in enumerate(blocks) for layer in _block_layers(block, f"{prefix}.{index}."))


def find_players(model: Any, granularity: str = "block", embeddings: bool = False) -> tuple[Player, ...]:
    """The players of a model, by block and then in the order of the block's modules.

    Norms belong to no player and stay as they are. The embedding and the head are players only on request.

    Args:
        model: A causal language model of transformers.
        granularity: One of `GRANULARITIES`.
        embeddings: Whether the embedding is the first player and the head the last; a tied head is no player.
    Raises:
        ModelError: If the granularity is unknown, or the blocks, the embedding or the head cannot be found.
    """
    if granularity not in GRANULARITIES:
        raise ModelError(f"granularity {granularity!r} is unknown; {hint(granularity, GRANULARITIES)}")
    prefix, blocks = find_blocks(model)
    players: list[Player] = []
    for index, block in enumerate(blocks):
        linears = {layer.name: layer for layer in _block_layers(block, f"{prefix}.{index}.")}
        if granularity == "block":
            players.append(Player(f"{prefix}.{index}", tuple(linears.values()), index))
        elif granularity == "fused":
            for first, *rest in fused_groups(linears):
                name = "+".join([first, *(other.rpartition(".")[2] for other in rest)])
                players.append(Player(name, tuple(linears[member] for member in (first, *rest)), index))
        else:
            players += [Player(name, (linear,), index) for name, linear in linears.items()]
    if embeddings:
        embedding, *head = find_ends(model)
        players.insert(0, Player(embedding.name, (embedding,), 0, is_end=True))
        players += [Player(layer.name, (layer,), len(blocks) - 1, is_end=True) for layer in head]
    return tuple(players)


def find_ends(model: Any) -> tuple[LinearLayer, ...]:
    """The embedding, and the head unless its weight is tied to the embedding.

    Raises:
        ModelError: If the embedding is not an `nn.Embedding`, or the head is not an `nn.Linear`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no nn.Embedding with an nn.Linear head that could be players; leave "
            "--embeddings out"
        )
    names = {id(module): name for name, module in model.named_modules()}
    first = LinearLayer(names[id(embedding)], (embedding.num_embeddings, embedding.embedding_dim), is_plain=False)
    if head.weight is embedding.weight:
        return (first,)
    return first, LinearLayer(names[id(head)], (head.out_features, head.in_features))


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names of linear layers in the groups that engines fuse, in the order of the first layer of each group."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        partners = next((fused for fused in _FUSED if last in fused), (last,))
        groups.setdefault((parent, partners), []).append(name)
    return [tuple(group) for group in groups.values()]


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a `LinearLayer`, by its name."""
    owner, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(owner), attribute)
    weight: nn.Parameter = found if isinstance(found, nn.Parameter) else found.weight
    return weight


def _block_layers(block: nn.Module, prefix: str = "") -> list[LinearLayer]:
    """Linear layers of a block, and tensors that hold experts; `prefix` goes before names."""
    found: list[LinearLayer] = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            found.append(LinearLayer(prefix + name, (module.out_features, module.in_features)))
        for attribute, tensor in module.named_parameters(recurse=False):
            if tensor.dim() == 3 and len(tensor) == getattr(module, "num_experts", None):
                shape = (tensor.shape[0] * tensor.shape[1], tensor.shape[2])
                found.append(LinearLayer(f"{prefix}{name}.{attribute}", shape, is_plain=False))
    return found
