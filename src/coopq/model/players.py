"""Finds the transformer blocks of a model, and the linear layers and experts in them, from structure alone."""

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from coopq.core.errors import ModelError, hint
from coopq.core.types import LinearLayer, Player
from coopq.model.matrices import Matrix, expert_matrices, is_linear, matrix_of, number_of_experts

_log = logging.getLogger("coopq")

GRANULARITIES = ("block", "fused", "linear")
"""What a player can be: a transformer block, linear layers of a block that engines fuse into one, or a linear layer."""

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),  # qkv_proj of nearly all decoders: llama.py
    ("gate_proj", "up_proj"),  # gate_up_proj: llama.py
    ("w1", "w3"),  # w1: lfm2.py
    ("q_a_proj", "kv_a_proj_with_mqa"),  # fused_qkv_a_proj: deepseek_v2.py, kimi_linear.py
    ("in_proj_qkv", "in_proj_z"),  # in_proj_qkvz: qwen3_5.py
    ("in_proj_b", "in_proj_a"),  # in_proj_ba: qwen3_5.py
)
"""Layers of one module with the same input that vLLM multiplies as one matrix, so that they need the same width.

Source: `packed_modules_mapping` and `stacked_params_mapping` of the files named, in vllm/model_executor/models.
"""
_WELL_COVERED = 0.95
"""Share of the blocks' weights below which a user is told how many can be quantized. Chosen by hand."""
_ROUTER_NAMES = ("router", "gate", "wg", "gating", "expert_gate")
"""Names of modules that choose experts, outside of the modules that hold experts."""


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks, with its name in the model.

    The list is the outermost `nn.ModuleList` of the text decoder that has as many entries as the configuration has
    hidden layers, with linear layers in each entry. Other parts of a model, such as a vision tower, have blocks too.

    Raises:
        ModelError: If there is no such list, or more than one.
    """
    text = model.config.get_text_config()
    n_layers = getattr(text, "num_hidden_layers", None)
    lengths = {n_layers, getattr(text, "num_layers", None)}  # LongCat counts two layers in each block
    found = _lists_of_blocks(_text_decoder(model), lengths) or _lists_of_blocks(model, lengths)
    names = {id(module): name for name, module in model.named_modules()}
    found = {names[id(module)]: module for module in found.values()}
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


def linear_layers(model: Any, routers: bool = False) -> tuple[LinearLayer, ...]:
    """All linear layers, and tensors that hold experts, in transformer blocks, in the order of the model's modules.

    A layer that several blocks share is listed once, in the first of them.

    Args:
        model: A causal language model of transformers.
        routers: Whether routers and gates with one output are listed; they choose experts and are very small.
    Raises:
        ModelError: If the blocks cannot be found.
    """
    return tuple(layer for layers in _layers_of_blocks(model, routers) for layer in layers)


def find_players(
    model: Any, granularity: str = "block", embeddings: bool = False, routers: bool = False
) -> tuple[Player, ...]:
    """The players of a model, by block and then in the order of the block's modules.

    Norms belong to no player and stay as they are. The embedding, the head and routers are players only on request.

    Args:
        model: A causal language model of transformers.
        granularity: One of `GRANULARITIES`.
        embeddings: Whether the embedding is the first player and the head the last; a tied head is no player.
        routers: Whether routers and gates with one output belong to players.
    Raises:
        ModelError: If the granularity is unknown, or the blocks, the embedding or the head cannot be found.
    """
    if granularity not in GRANULARITIES:
        raise ModelError(f"granularity {granularity!r} is unknown; {hint(granularity, GRANULARITIES)}")
    prefix, blocks = find_blocks(model)
    players: list[Player] = []
    for index, layers in enumerate(_layers_of_blocks(model, routers)):
        linears = {layer.name: layer for layer in layers}
        if not linears:
            raise ModelError(
                f"{type(model).__name__}: block {prefix}.{index} has no linear layers of its own, so it cannot be a "
                "player"
            )
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


def without_layers(players: Iterable[Player], names: Collection[str]) -> tuple[Player, ...]:
    """Players without some linear layers; players with no other layers are left out."""
    kept = ((player, tuple(each for each in player.linears if each.name not in names)) for player in players)
    return tuple(replace(player, linears=linears) for player, linears in kept if linears)


def covered_share(model: Any, players: Iterable[Player]) -> float:
    """Share of the weights of a model's blocks that belongs to players: norms, convolutions and routers do not."""
    blocks = find_blocks(model)[1]
    total = sum(tensor.numel() for tensor in {id(t): t for block in blocks for t in block.parameters()}.values())
    return sum(player.n_weights for player in players if not player.is_end) / total


def warn_of_weights_outside(model: Any, players: Iterable[Player]) -> None:
    """Tell a user if much of a model belongs to no player."""
    if (share := covered_share(model, players)) < _WELL_COVERED:
        _log.warning("only %.0f %% of the blocks' weights can be quantized; the others stay as they are", 100 * share)


def body_of(model: Any) -> nn.Module:
    """The model without its head: its forward returns the last hidden states."""
    body: nn.Module = model.base_model
    if body is model:  # the class names another prefix than its own
        body = getattr(model, "model", model)
    decoder = _text_decoder(model)
    if body is model and decoder is not model:  # a wrapper around a model with a head (Llama-4)
        return body_of(decoder)
    return body


def blocks_share_weights(model: Any) -> bool:
    """Whether a parameter belongs to more than one block."""
    owned = [id(tensor) for block in find_blocks(model)[1] for tensor in block.parameters()]
    return len(owned) > len(set(owned))


def find_ends(model: Any) -> tuple[LinearLayer, ...]:
    """The embedding, and the head unless its weight is tied to the embedding.

    Raises:
        ModelError: If the embedding is not an `nn.Embedding`, or the head is not an `nn.Linear`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no nn.Embedding with an nn.Linear head that could be players; use "
            "--no-embeddings"
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


def _text_decoder(model: Any) -> nn.Module:
    """The part of a model that reads text."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else model


def _lists_of_blocks(model: nn.Module, lengths: Collection[int | None]) -> dict[str, nn.ModuleList]:
    """The outermost lists of as many modules as a model may have blocks, all with linear layers, by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if not isinstance(module, nn.ModuleList) or len(module) not in lengths or inside_another:
            continue
        if all(any(True for _ in _matrices(block)) for block in module):
            found[name] = module
    return found


def _layers_of_blocks(model: Any, routers: bool) -> list[list[LinearLayer]]:
    """The linear layers of each block, and tensors that hold experts; each parameter once."""
    prefix, blocks = find_blocks(model)
    seen: set[int] = set()
    found: list[list[LinearLayer]] = []
    for index, block in enumerate(blocks):
        own = []
        left_out = set() if routers else _routers(block)
        for name, matrix, is_plain in _matrices(block):
            if id(matrix.parameter) not in seen and name not in left_out:
                own.append(LinearLayer(f"{prefix}.{index}.{name}", matrix.shape, is_plain, matrix.n_experts))
                seen.add(id(matrix.parameter))
        found.append(own)
    return found


def _matrices(block: nn.Module) -> Iterator[tuple[str, Matrix, bool]]:
    """Name and matrix of each linear layer and each tensor of experts in a block, and whether it is an `nn.Linear`."""
    for name, module in block.named_modules():
        if is_linear(module):
            yield name, matrix_of(block, name), isinstance(module, nn.Linear)
        for attribute, matrix in expert_matrices(module).items():
            yield f"{name}.{attribute}" if name else attribute, matrix, False


def _routers(block: nn.Module) -> set[str]:
    """Names of linear layers that choose experts or scale their sum: routers, and gates with one output.

    A router has an output for each expert, and lies in the module that holds the experts, or says its name.
    """
    modules = dict(block.named_modules())
    n_experts = max((_experts_in(module) for module in modules.values()), default=0)
    found = set()
    for name, module in modules.items():
        if not is_linear(module):
            continue
        n_outputs, (owner, _, last) = matrix_of(block, name).shape[0], name.rpartition(".")
        says_so = last in _ROUTER_NAMES or any(part in ("router", "gate") for part in owner.split("."))
        chooses = n_outputs <= n_experts and (says_so or _holds_experts(modules[owner]))
        if n_outputs == 1 or chooses:
            found.add(name)
    return found


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module's own child is a list or a tensor of experts."""
    return any(_experts_in(child) for child in module.children())


def _experts_in(module: nn.Module) -> int:
    """Number of experts that a module itself holds, in a list or in shared tensors; 0 if it holds none."""
    if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(child) for child in module}) == 1:
        return len(module) if not is_linear(module[0]) else 0
    return number_of_experts(module) if expert_matrices(module) else 0
