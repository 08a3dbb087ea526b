"""What is asked for by the name of an engine: a recipe's settings, fitted to a model."""

from typing import Any

from coopq.core.recipes import recipe_options
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED, Width
from coopq.export.base_model import BaseModel
from coopq.export.formats import TargetFile
from coopq.export.gguf.base import BaseFile
from coopq.game.prepared import usable_bits, whole_group_size
from coopq.model.load import gguf_file


def request_for(engine: str, *, model: str, recipe: str | None = None, **options: Any) -> Request:
    """What `coopq quantize MODEL --for ENGINE` asks for: the recipe's settings, fitted to the model.

    Args:
        engine: The engine that will run the model: "llama.cpp", "vllm", "transformers", "openvino", "mlx" or "coopq".
        model: Folder, GGUF file or hub name of the model.
        recipe: Other settings than the engine's: "speed" or "paper".
        options: Options of `Request` in place of the recipe's, by name.
    Raises:
        CoopQError: If an option is unknown, or the model cannot be read.
    """
    request = Request.from_options(**recipe_options(recipe or engine, engine, {"model": model, **options}))
    return fitted_to_model(request, keep_bits="bits" in options)


def fitted_to_model(request: Request, *, keep_bits: bool) -> Request:
    """A recipe's request with what the model decides: the widths that its layers can use, and a group size.

    Args:
        request: The request.
        keep_bits: Whether a user has named the widths: they stay, and a width that no layer can use is an error later.
    """
    if not keep_bits:
        request = request.replace(bits=_recipe_bits(request))
    size = whole_group_size(request)
    return request if size is None else request.replace(group_size=size)


def _recipe_bits(request: Request) -> tuple[Width, ...]:
    """The widths of a recipe that a model can use.

    A recipe names more widths than every model has types for. Tensors of a GGUF file that is quantized already lose
    nothing as they are; those of 16 bits are too large to be of use.
    """
    if request.target.form != "gguf":
        return usable_bits(request)
    base = BaseModel.find(request)
    file = base.path or gguf_file(base.source)
    if file is not None and BaseFile.open(file).is_quantized:
        return usable_bits(request, TargetFile())
    return usable_bits(request.replace(bits=tuple(width for width in request.widths.bits if width != UNTOUCHED)))
