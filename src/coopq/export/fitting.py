"""The size of a file that has to fit into a memory beside what an engine needs to run it."""

from typing import Any

from coopq.core.errors import InfeasibleBudget, OptionError
from coopq.core.sizes import Budget
from coopq.export.kv_cache import cache_bytes
from coopq.game.prepared import Prepared
from coopq.model.memory import gib

_TOKENS_AT_ONCE = 512
"""Tokens of a prompt that llama.cpp computes together unless it is told otherwise."""


def fitting_budget(fit: str, prepared: Prepared) -> Budget:
    """The budget of a file that fits into a memory, together with the KV cache and the engine's working memory.

    Args:
        fit: The memory, in bytes: "8GiB".
        prepared: The request; its target has the tokens of the KV cache, which a budget in bytes holds already.
    Raises:
        InfeasibleBudget: If the cache and the working memory leave no room.
        OptionError: If the request has no KV cache.
    """
    context, sizes, widths = prepared.request.target.context, prepared.sizes, prepared.request.widths
    if context is None:
        raise OptionError(f"fit {fit} has to hold a KV cache too; name the tokens of the cache with --context 8192")
    working, cache = working_bytes(prepared.skeleton), cache_bytes(prepared.skeleton, context)
    budget = Budget.parse(fit).minus(working)
    if budget.value <= cache:
        raise InfeasibleBudget(
            f"fit {fit} holds no model: the KV cache of {context} tokens takes {gib(cache)} and the engine's working "
            f"memory about {gib(working)}; allow more, or a shorter --context"
        )
    most = sizes.file_bytes([own[-1] for own in sizes.player_widths(widths.bits)]) + sizes.reserved
    return budget if budget.value <= most else Budget.parse(f"{most}B")


def working_bytes(model: Any) -> int:
    """About what an engine needs to compute a prompt: logits and activations of 512 tokens in float32."""
    text = model.config.get_text_config()
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return 4 * _TOKENS_AT_ONCE * int(text.vocab_size + 8 * text.hidden_size + 3 * wide)
