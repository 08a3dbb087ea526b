"""Finding the transformer blocks of a model and the linear layers and experts in them, from structure alone."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from coopq.core.errors import ModelError, hint
from coopq.core.types import LinearLayer, Player

GRANULARITIES = ("block", "fused", "linear")
"""What a player can be: a transformer block with all its linear layers, those that engines fuse into one, or each."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one input, which engines (vLLM for one) multiply as one matrix, so that they need the same width."""


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks and its name in the model.

    It is the outermost `nn.ModuleList` with as many entries as the configuration has hidden layers, each of
    which holds linear layers.

    Raises:
        ModelError: If there is none, or more than one.
    """
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if not isinstance(module, nn.ModuleList) or len(module) != n_layers or inside_another:
            continue
        if all(_linears(block) for block in module):
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


def check_granularity(granularity: str) -> None:
    """Check the name of a granularity, which needs no model.

    Raises:
        ModelError: If it is unknown.
    """
    if granularity not in GRANULARITIES:
        raise ModelError(f"granularity {granularity!r} is unknown; {hint(granularity, GRANULARITIES)}")


def find_players(model: Any, granularity: str = "block", embeddings: bool = False) -> tuple[Player, ...]:
    """The players of a model, by block and then in the order of the block's modules.

    Norms belong to no player and stay as they are; so do the embedding and the head unless they are asked for.

    Args:
        model: A causal language model of transformers.
        granularity: One of `GRANULARITIES`.
        embeddings: Whether the embedding is a player, the first, and the head, unless it is tied to that, the last.
    Raises:
        ModelError: If the granularity is unknown, or the blocks, the embedding or the head cannot be found.
    """
    check_granularity(granularity)
    prefix, blocks = find_blocks(model)
    players: list[Player] = []
    for index, block in enumerate(blocks):
        linears = tuple(
            LinearLayer(f"{prefix}.{index}.{linear.name}", linear.shape, linear.is_plain) for linear in _linears(block)
        )
        if granularity == "block":
            players.append(Player(f"{prefix}.{index}", linears, index))
        elif granularity == "fused":
            by_name = {linear.name: linear for linear in linears}
            players += [
                Player(
                    "+".join([first, *(name.rpartition(".")[2] for name in rest)]),
                    tuple(by_name[name] for name in (first, *rest)),
                    index,
                )
                for first, *rest in fused_groups(by_name)
            ]
        else:
            players += [Player(linear.name, (linear,), index) for linear in linears]
    if embeddings:
        first, *last = find_ends(model)
        players.insert(0, Player(first.name, (first,), 0, is_end=True))
        players += [Player(head.name, (head,), len(blocks) - 1, is_end=True) for head in last]
    return tuple(players)


def find_ends(model: Any) -> tuple[LinearLayer, ...]:
    """The embedding and, unless its weight is the same, the head.

    Raises:
        ModelError: If one of them is no plain module with a weight.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no nn.Embedding with an nn.Linear head that could be players; leave them out"
        )
    names = {id(module): name for name, module in model.named_modules()}
    first = LinearLayer(names[id(embedding)], (embedding.num_embeddings, embedding.embedding_dim), is_plain=False)
    if head.weight is embedding.weight:
        return (first,)
    return first, LinearLayer(names[id(head)], (head.out_features, head.in_features))


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names of linear layers in the groups that engines fuse, in the order of the first of each."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        mates = next((of for of in _FUSED if last in of), (last,))
        groups.setdefault((parent, mates), []).append(name)
    return [tuple(together) for together in groups.values()]


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a matrix that is quantized; see `LinearLayer`."""
    owner, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(owner), attribute)
    weight: nn.Parameter = found if isinstance(found, nn.Parameter) else found.weight
    return weight


def _linears(block: nn.Module) -> list[LinearLayer]:
    """Linear layers, and experts that are kept in one tensor, by their names in a block."""
    found: list[LinearLayer] = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            found.append(LinearLayer(name, (module.out_features, module.in_features)))
        for attribute, tensor in module.named_parameters(recurse=False):
            if tensor.dim() == 3 and len(tensor) == getattr(module, "num_experts", None):
                shape = (tensor.shape[0] * tensor.shape[1], tensor.shape[2])
                found.append(LinearLayer(f"{name}.{attribute}", shape, is_plain=False))
    return found
