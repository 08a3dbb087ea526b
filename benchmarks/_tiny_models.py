"""Tiny random models of the architectures of transformers: the defaults of each configuration, made small.

Private part of transformers in use: `PreTrainedModel._from_config`, which the public auto classes call.
"""

import math
import re
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers as hf
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from _tiny_sizes import (
    BY_TYPE,
    LAYERS,
    LISTS_BY_LAYER,
    NAMES,
    TEXT,
    UNSET,
    VARIANTS,
    VISION,
    VOCABULARY,
)

CAUSAL = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
WRAPPERS = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers and torch raise for a configuration that does not fit together."""
_MOST_WEIGHTS = 30_000_000
_DROPPED = ((), ("head_dim",), LISTS_BY_LAYER, (*LISTS_BY_LAYER, "head_dim"), ("num_key_value_heads",))
"""Entries that the tries leave at their defaults."""


Made = TypeVar("Made")


class NotBuiltError(Exception):
    """No tiny model of a type, or of a configuration, can be made."""


def kinds() -> list[str]:
    """All types: of causal language models, of wrappers of language models ("wrapper:"), and variants (TYPE@FORM)."""
    return sorted(CAUSAL) + sorted(f"wrapper:{name}" for name in WRAPPERS if name not in CAUSAL) + sorted(VARIANTS)


def build(kind: str) -> Any:
    """A tiny random model of a type, in evaluation mode, that computes finite logits.

    A type that is a wrapper and a causal language model at once is built as the wrapper: checkpoints hold wrappers.

    Raises:
        NotBuiltError: If no configuration that was tried computes; with the first error.
    """
    name = kind.removeprefix("wrapper:").partition("@")[0]
    errors = []
    class_name = WRAPPERS.get(name) or CAUSAL[name]
    model_class = _by_transformers(lambda: getattr(hf, class_name))
    for config in _configs(kind, name):
        parts = [config, *vars(config).values()]
        own = next((part for part in parts if isinstance(part, model_class.config_class)), config)
        try:
            return _made(model_class, own)
        except NotBuiltError as error:
            errors.append(str(error))
    raise NotBuiltError(errors[0])


def _by_transformers(call: Callable[[], Made]) -> Made:
    """What a call of transformers returns. An error of our own code must not look like a broken configuration.

    Raises:
        NotBuiltError: With what transformers raised.
    """
    try:
        return call()
    except BROKEN as error:
        raise NotBuiltError(described(error)) from error


def described(error: BaseException) -> str:
    """An error in one line, with the place that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({Path(last.filename).name}:{last.lineno})"


def some_tokens(n_sequences: int = 2, length: int = 64) -> torch.Tensor:
    """Random tokens, none of them special, shape (n_sequences, length)."""
    return torch.randint(3, VOCABULARY - 12, (n_sequences, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a model, without a cache, float32."""
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def _made(model_class: Any, config: Any) -> Any:
    """A filled model of a configuration, which computes.

    Raises:
        NotBuiltError: If transformers cannot make the model, the model is not tiny, or its logits are not finite.
    """
    with torch.device("meta"):
        empty = _by_transformers(lambda: model_class(config))
    n_weights = sum(parameter.numel() for parameter in empty.parameters())
    if n_weights > _MOST_WEIGHTS:
        raise NotBuiltError(f"{n_weights / 1e6:.0f} million weights, too many")
    torch.manual_seed(0)
    model = _by_transformers(lambda: model_class._from_config(config, dtype=torch.float32).eval())
    _fill(model)
    logits = _by_transformers(lambda: logits_of(model, some_tokens()))
    if not torch.isfinite(logits).all() or logits.shape[-1] > 4 * VOCABULARY:
        raise NotBuiltError(f"logits of shape {tuple(logits.shape)} are not finite, or too wide")
    return model


@torch.no_grad()
def _fill(model: Any) -> None:
    """Fill every bias, norm, router and matrix with values of its own, matrices large enough to matter."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        last = name.rpartition(".")[2]
        if last == "D" or re.search(r"A_log|dt_bias|time_|gate_log|decay|slope", name):
            parameter.add_(0.05 * noise)  # rates of recurrent layers explode where they are far from their defaults
        elif parameter.dim() <= 1:
            is_bias = "bias" in last or abs(float(parameter.float().mean())) < 0.5
            parameter.copy_(0.1 * noise if is_bias else parameter + 0.1 * noise)
        elif "embed" in name or "wte" in name:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise / math.sqrt(max(1, parameter.shape[-1])))
    for name, buffer in model.named_buffers():
        if "bias" in name and "correction" in name and buffer.is_floating_point():
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def _configs(kind: str, name: str) -> Iterator[Any]:
    """Tiny configurations of a type; the more ordinary ones first.

    Raises:
        NotBuiltError: With the last error, if there is none.
    """
    config_class: Any = _by_transformers(lambda: CONFIG_MAPPING[name])
    try:
        default = _by_transformers(config_class)
    except NotBuiltError:
        default = None
    failed, n_made = None, 0
    for dropped in _DROPPED:
        for n_layers in (LAYERS, 2):
            options: dict[str, Any] = {} if default is None else _tiny(default, n_layers, dropped)
            options |= BY_TYPE.get(name, {}) | VARIANTS.get(kind, {})
            if hasattr(default, "is_decoder") and not getattr(default, "is_encoder_decoder", False):
                options["is_decoder"] = True
            try:
                config = _by_transformers(partial(config_class, **options))
            except NotBuiltError as error:
                failed = error
                continue
            n_made += 1
            yield config
    if failed is not None and not n_made:
        raise NotBuiltError(f"its configuration: {failed}")


def _tiny(config: Any, n_layers: int, dropped: tuple[str, ...], is_text: bool = True) -> dict[str, Any]:
    """The tiny values of a configuration's entries; entries that are not here keep their defaults."""
    found: dict[str, Any] = {}
    for key, value in vars(config).items():
        if key.startswith("_") or key in dropped:
            continue
        if isinstance(value, hf.PreTrainedConfig):
            reads_text = any(part in key for part in ("text", "llm", "lang", "thinker"))
            inner_text = reads_text or (is_text and "decoder" in key) or config.model_type == "blt"
            found[key] = {"model_type": value.model_type, **_tiny(value, n_layers, dropped, inner_text)}
            found[key] |= BY_TYPE.get(value.model_type, {})
            continue
        tiny = _tiny_text(key, value, n_layers) if is_text else _tiny_vision(key, value)
        if tiny is not UNSET:
            found[key] = tiny
    return found


def _tiny_vision(key: str, value: Any) -> Any:
    """The tiny value of an entry of a part that reads no text; `UNSET` keeps the default."""
    if key not in VISION or value is None or isinstance(value, bool):
        return UNSET
    tiny = VISION[key]
    each_of_two = isinstance(value, list | tuple) and not isinstance(tiny, list)
    return [tiny] * 2 if each_of_two else tiny


def _tiny_text(key: str, value: Any, n_layers: int) -> Any:
    """The tiny value of an entry of a language model's configuration; `UNSET` keeps the default."""
    if isinstance(value, dict) and isinstance(value.get("mrope_section"), list):
        return {**value, "mrope_section": [2, 3, 3]}
    if isinstance(value, bool):
        return UNSET
    if key in NAMES["layers"]:
        return n_layers
    if key in LISTS_BY_LAYER and isinstance(value, list | tuple) and value:
        return _every_kind(list(value), n_layers)
    if value is None and key not in ("num_key_value_heads", "intermediate_size", "n_inner"):
        return UNSET
    if key in TEXT:
        return TEXT[key] if value != 0 and not isinstance(value, list | tuple) else UNSET
    for names in NAMES.values():
        if key in names:
            tiny = names[key]
            return [tiny] * n_layers if isinstance(value, list | tuple) else tiny
    if re.search(r"_token(_id|_index)?$", key) and isinstance(value, int):
        return min(value, VOCABULARY - 12)
    return UNSET


def _every_kind(values: list[Any], n: int) -> list[Any]:
    """n entries with every kind of layer that the default has, in the default's order."""
    different = list(dict.fromkeys(values))
    if set(different) <= set(values[:n]):
        return values[:n]
    return (different * n)[:n] if len(different) <= n else different
