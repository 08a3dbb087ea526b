"""Which tensors of a GGUF file hold which tensors of a model, and what a base must have before any work is done."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coopq.core.errors import ExportError, Mismatch
from coopq.core.types import LinearLayer
from coopq.export.gguf.base import BaseFile, BaseTensor
from coopq.quantizers.ggml.names import IN_PARTS, spellings

_ELSEWHERE = {"attn_kv_b.weight": ("attn_k_b.weight", "attn_v_b.weight")}
"""Tensors that llama.cpp stores in another form under other names."""
_HEADS_IN_TURN = ("qwen35", "qwen35moe")
"""Architectures whose value heads llama.cpp reorders: the first head of each group, then the second of each group.

Source: _LinearAttentionVReorderBase in convert_hf_to_gguf.py.
"""
_DEFAULTS = {"rope.freq_base": 10_000.0}
"""What llama.cpp takes for a setting that is missing. Old converters do not find the base of rotary embeddings where
transformers writes it since version 5. Source: `load_hparams` in llama.cpp's src/llama-model.cpp."""
_WAY_OUT = "name an unquantized GGUF file of the same model with --base"


class TensorNames:
    """Names of a base's tensors by names of a model's tensors.

    Args:
        base: The base.
    """

    def __init__(self, base: BaseFile) -> None:
        import gguf

        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(kinds[base.architecture], base.n_blocks)
        self._base = base

    def expected(self, name: str) -> str | None:
        """The name that llama.cpp has for a tensor of a model; None if no name is known."""
        names = (self._map.get_name(spelling, try_suffixes=(".weight", ".bias")) for spelling in spellings(name))
        found = next((str(name) for name in names if name is not None), None)
        if found is not None and found not in self._base.tensors:
            longer = (f"{found}{end}" for end in (".weight", ".bias"))
            return next((name for name in longer if name in self._base.tensors), found)
        return found

    def tensors(self, name: str) -> list[str] | None:
        """Names of the base's tensors that hold a tensor of the model, in order; None if one of them is missing."""
        own = self.expected(name)
        if own is not None and own in self._base.tensors:
            return [own]
        stem = name.removesuffix(".weight")
        for whole, *parts in IN_PARTS:
            if stem.endswith(whole):
                both = [self.expected(f"{stem.removesuffix(whole)}{part}.weight") for part in parts]
                found = [part for part in both if part is not None and part in self._base.tensors]
                if len(found) == 2:
                    return found
        for suffix, others in _ELSEWHERE.items():
            if own is not None and own.endswith(suffix):
                names = [own.removesuffix(suffix) + other for other in others]
                return names if all(name in self._base.tensors for name in names) else None
        return None

    def is_in_another_form(self, module: str) -> bool:
        """Whether the base holds a module in tensors whose rows are not the module's, so that it stays as it is."""
        own = self.expected(f"{module}.weight")
        if own is None:
            return False
        if own.endswith("ssm_out.weight"):  # its columns are in the order of the value heads
            architecture = self._base.architecture
            groups, heads = (self._base.value(f"{architecture}.ssm.{key}") for key in ("group_count", "time_step_rank"))
            return architecture in _HEADS_IN_TURN and groups != heads
        return own.endswith(tuple(_ELSEWHERE)) and self.tensors(f"{module}.weight") != [own]

    def module_rows(self, module: str) -> list[BaseTensor]:
        """The tensors whose rows are the rows of a module, in any order.

        Raises:
            ExportError: If the module has no tensors of its own.
        """
        found = self.tensors(f"{module}.weight")
        if found is None or self.is_in_another_form(module):
            own = self.expected(f"{module}.weight")
            raise ExportError(
                f"{module} has no tensor of its own in the GGUF file ({own or 'no name is known for it'}): llama.cpp "
                f"stores {self._base.architecture} models in another form; leave out --target gguf, or use another "
                "--target"
            )
        return [self._base.tensors[name] for name in found]


def module_tensors(base: BaseFile, modules: Iterable[str]) -> list[tuple[BaseTensor, str]]:
    """The tensors of modules in a GGUF file, each with the name of its module.

    Experts have one tensor, or two where transformers keeps gates and ups together and llama.cpp does not.

    Raises:
        ExportError: If a module has no tensor of its own.
    """
    names = TensorNames(base)
    return [(tensor, module) for module in modules for tensor in names.module_rows(module)]


def require_shapes(base: BaseFile, layers: Sequence[LinearLayer]) -> None:
    """Check that the tensors of layers have their rows.

    Raises:
        ExportError: If a layer has no tensor of its own.
        Mismatch: If rows are longer or shorter, or their number differs.
    """
    names = TensorNames(base)
    for layer in layers:
        tensors = names.module_rows(layer.name)
        shape = (sum(tensor.n_rows for tensor in tensors), tensors[0].shape[0])
        if shape != tuple(layer.shape) or any(tensor.shape[0] != shape[1] for tensor in tensors):
            raise Mismatch(
                f"{tensors[0].name} of the GGUF file {base.path} is not {layer.name} of the model",
                {"shape": tuple(layer.shape)},
                {"shape": shape},
                _WAY_OUT,
            )


def require_complete(base: BaseFile, model: Any) -> None:
    """Check that a base has every tensor of a model that llama.cpp has a name for.

    Raises:
        Mismatch: Naming the tensor that is missing.
    """
    names = TensorNames(base)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for name in model.state_dict():
        expected = names.expected(name)
        if expected is None or names.tensors(name) is not None or (tied and expected == "output.weight"):
            continue
        raise Mismatch(
            f"GGUF file {base.path} lacks {expected}, {name} of the model",
            {"tensor": expected},
            {"tensor": None},
            _WAY_OUT,
        )


def require_settings(base: BaseFile, config: Any) -> None:
    """Check the settings of a base that change what llama.cpp computes.

    Args:
        base: The base.
        config: The model's configuration.
    Raises:
        Mismatch: Naming the setting.
    """
    text = config.get_text_config()
    ours = _expected_settings(text)
    for name, value in ours.items():
        full = f"{base.architecture}.{name}"
        there = base.value(full)
        there = _DEFAULTS.get(name) if there is None else there
        if value is None or there is None or isinstance(there, tuple):
            continue
        if isinstance(there, str) != isinstance(value, str) or _differ(value, there):
            raise Mismatch(f"GGUF file {base.path} is of another model: {full}", {name: value}, {name: there}, _WAY_OUT)
    tokens = base.settings.get("tokenizer.ggml.tokens")
    embedding = base.tensors.get("token_embd.weight")
    n_rows, n_tokens = getattr(text, "vocab_size", None), None if tokens is None else tokens.length
    if n_rows is None:
        return
    for what, count in (
        ("rows of token_embd.weight", None if embedding is None else embedding.n_rows),
        ("tokens of its tokenizer", n_tokens),
    ):
        # The converter leaves out rows of the embedding that no token has (Gemma-3), and never adds some.
        if (count is not None and count not in (n_rows, n_tokens)) or (count or 0) > n_rows:
            raise Mismatch(f"GGUF file {base.path} is of another model", {what: n_rows}, {what: count}, _WAY_OUT)


def _differ(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, str):
        return bool(ours != theirs)
    return abs(float(ours) - float(theirs)) > 1e-5 * abs(float(ours))


def _expected_settings(text: Any) -> Mapping[str, Any]:
    """Settings of llama.cpp by name, from a configuration of transformers; None where a configuration has none."""

    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(text, name, None)) is not None), None)

    rope = getattr(text, "rope_parameters", None) or {}
    nested = any(isinstance(value, dict) for value in rope.values())
    full = rope.get("full_attention", {}) if nested else rope
    scaled = full.get("rope_type") in ("linear", "yarn")
    heads, kv_heads = first("num_attention_heads", "n_head"), first("num_key_value_heads")
    return {
        "block_count": first("num_hidden_layers", "n_layer"),
        "embedding_length": first("hidden_size", "n_embd"),
        "attention.head_count": heads if isinstance(heads, int) else None,
        "attention.head_count_kv": kv_heads if isinstance(kv_heads, int) and not first("kv_lora_rank") else None,
        "attention.layer_norm_rms_epsilon": first("rms_norm_eps", "layer_norm_epsilon", "norm_eps"),
        "attention.layer_norm_epsilon": first("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "rope.freq_base": full.get("rope_theta"),
        "rope.scaling.factor": full.get("factor") if scaled else None,
        "rope.scaling.type": full.get("rope_type") if scaled else None,
        "expert_count": first("num_local_experts", "num_experts", "n_routed_experts"),
        "expert_used_count": first("num_experts_per_tok"),
    }
