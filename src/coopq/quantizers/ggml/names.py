"""Names that llama.cpp may have for the weight of a module, from the tables of the package gguf."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain

WRAPPERS = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))
"""How wrappers of several modes name their text part, and how llama.cpp names the text part."""
RENAMED = (("dt_bias", "dt_proj.bias"), ("e_score_correction_bias", "e_score_correction.bias"))
"""Tensors that llama.cpp's converter renames before it looks for their place. Source: convert_hf_to_gguf.py."""
SPELLED = ((".block_sparse_moe.", ".mlp."), (".block_sparse_moe.", ".feed_forward."))
"""Parts of names that transformers and llama.cpp spell differently for some architectures, of Granite's for example."""
IN_PARTS = (
    (".gate_up_proj", ".gate_proj", ".up_proj"),
    (".in_proj_qkvz", ".in_proj_qkv", ".in_proj_z"),
    (".shared_mlp.input_linear", ".mlp.shared_expert.gate_proj", ".mlp.shared_expert.up_proj"),
    (".shared_mlp.input_linear", ".mlp.gate_proj", ".mlp.up_proj"),
)
"""Layers of transformers that llama.cpp keeps in two tensors, with the names that both have in other models."""
_NUMBER = re.compile(r"\.(\d+)\.")


def spellings(name: str) -> list[str]:
    """How tables of llama.cpp may spell the name of a model's tensor."""
    for old, new in WRAPPERS:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    for old, new in RENAMED:
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return [name, *(name.replace(ours, theirs) for ours, theirs in SPELLED)]


def gguf_names(module: str) -> list[str]:
    """Names of the tensors that may hold the weight of a module, or a part of its rows, in any architecture."""
    parts = [
        f"{module.removesuffix(whole)}{part}" for whole, *parts in IN_PARTS if module.endswith(whole) for part in parts
    ]
    found = []
    for name in chain.from_iterable(map(spellings, [module, *parts])):
        number = _NUMBER.search(name)
        key = name if number is None else f"{name[: number.start(1)]}{{bid}}{name[number.end(1) :]}"
        block = "" if number is None else number[1]
        found += [f"{tensor.replace('{bid}', block)}.weight" for tensor in _table().get(key, ())]
    return list(dict.fromkeys(found))


@cache
def _table() -> Mapping[str, Sequence[str]]:
    """Names of llama.cpp by names of transformers, of all architectures together."""
    from gguf import TENSOR_NAMES, TensorNameMap

    maps = [
        TensorNameMap.mappings_cfg,
        TensorNameMap.block_mappings_cfg,
        *TensorNameMap.arch_block_mappings_cfg.values(),
    ]
    table = defaultdict[str, list[str]](list)
    for tensor, names in chain.from_iterable(each.items() for each in maps):
        for name in names:
            table[name].append(TENSOR_NAMES[tensor])
    return table
