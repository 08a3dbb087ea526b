"""The memory of an engine's KV cache."""

from typing import Any

from coopq.core.errors import ExportError

_CACHE_BYTES = 2
"""Bytes of a number in a KV cache."""
_WITHOUT_CACHE = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp")
"""Kinds of layers, as configurations name them, that keep no keys and values."""


def cache_bytes(model: Any, context: int) -> int:
    """Bytes of a KV cache of `context` tokens in 16 bits, at most: models with sliding windows need less.

    Raises:
        ExportError: If the configuration does not tell the sizes of the cache.
    """
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    by_layer = getattr(text, "per_layer_config", None)  # Gemma-4's layers differ
    numbers = 0
    try:
        n_layers = int(text.num_hidden_layers)
        for layer in range(n_layers - (getattr(text, "num_kv_shared_layers", None) or 0)):
            if kinds is None or kinds[layer] not in _WITHOUT_CACHE:
                own = text if by_layer is None else by_layer[layer]
                width = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
                heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
                numbers += 2 * int(heads) * int(width)  # keys and values
    except (AttributeError, TypeError, IndexError) as error:
        raise ExportError(
            f"the configuration of {type(model).__name__} does not tell the size of its cache ({error}); leave out "
            "--context"
        ) from error
    return _CACHE_BYTES * numbers * context
