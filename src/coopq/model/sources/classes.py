"""The class of transformers that a configuration loads as: a wrapper of a language model keeps its other parts.

Private parts of transformers in use: `PreTrainedModel._from_config`, which the public auto classes call, and
`initialization.no_init_weights` in `empty_model`.
"""

from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from coopq.core.errors import ModelError
from coopq.core.versions import check_version
from coopq.model.sources.gguf import TRIED


def model_class(config: Any) -> Any:
    """The class of the model that a configuration describes.

    The class that `architectures` names comes first. Without it a configuration with several parts is a wrapper, and
    any other is a causal language model.

    Raises:
        ModelError: If the model is no decoder, or transformers has no class for it.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"models of type {config.model_type!r} have an encoder and a decoder; only decoder-only models can be "
            "quantized"
        )
    wrappers = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, *wrappers)
    if config.get_text_config() is not config:
        mappings = (*wrappers, MODEL_FOR_CAUSAL_LM_MAPPING)
    candidates = [found for mapping in mappings if (found := mapping.get(type(config), None)) is not None]
    flat = [each for found in candidates for each in (found if isinstance(found, tuple) else (found,))]
    named = (getattr(config, "architectures", None) or [None])[0]
    fitting = [each for each in flat if getattr(each, "config_class", type(config)) is type(config)]
    if not (fitting or flat):
        raise ModelError(
            f"models of type {config.model_type!r} ({named or 'no class named'}) are no language models that "
            f"transformers {transformers.__version__} can load; only decoder-only language models, and wrappers around "
            "them, can be quantized"
        )
    pool = fitting or flat
    return next((each for each in pool if each.__name__ == named), pool[0])


def make_model(config: Any, dtype: torch.dtype) -> Any:
    """A model of a configuration, with random weights on the current device.

    Raises:
        ModelError: As `model_class`.
    """
    return model_class(config)._from_config(config, dtype=dtype)


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """A model whose weights have storage but no values, for weights that are read from a file.

    Args:
        config: A configuration of transformers.
        dtype: Dtype of the weights.
    Raises:
        ModelError: If transformers has no such function any more.
    """
    check_version("transformers", TRIED, "coopq.load")
    try:
        from transformers.initialization import no_init_weights
    except ImportError as error:
        raise ModelError(
            f"the installed transformers cannot make a model without values ({error}); run: pip install "
            f"'transformers=={TRIED}.*'"
        ) from error
    with no_init_weights():
        return make_model(config, dtype)
