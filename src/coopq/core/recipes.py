"""What an engine runs best: the settings of `coopq quantize --for ENGINE`, each with its reason.

A recipe is a choice of options. Every option that a user names goes before the recipe's.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from coopq.core.errors import OptionError, hint
from coopq.core.spec_base import spelled


class Setting(NamedTuple):
    """The value of an option, and why, in a clause."""

    value: Any
    why: str


class Recipe(NamedTuple):
    """The settings for an engine.

    Attributes:
        form: Form of the export, a name of `coopq.export.formats.FORMS`; None for what coopq itself saves.
        settings: Settings by the name of the option.
        run: How to run the result: the words of a command, with {out} for the path, or {text} for the path in quotes.
    """

    form: str | None
    settings: Mapping[str, Setting]
    run: tuple[str, ...]

    def command(self, out: str | Path) -> str:
        """The command that runs a result, for a shell."""
        return shlex.join(word.format(out=out, text=json.dumps(str(out), ensure_ascii=False)) for word in self.run)


_OWN_RUN = (
    "python",
    "-c",
    'import coopq, transformers; print(transformers.pipeline("text-generation", coopq.load({text}), tokenizer={text})'
    '("Once", max_new_tokens=20))',
)
_LINEAR = Setting("linear", "finest players: each layer has its own width")
_KL = Setting("kl", "divergence is less noisy than the text's loss, so fewer tokens are enough")
_TOKENS = Setting(4096, "enough for a divergence")
_EMBEDDINGS = Setting(True, "the embedding is a large part of a small file")
_SEARCHED = {"granularity": _LINEAR, "loss": _KL, "tokens": _TOKENS}

_LLAMA_CPP: dict[str, Setting] = {
    **_SEARCHED,
    "backend": Setting("ggml-gptq", "lowest loss per byte among the backends of ggml"),
    "bits": Setting((2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 8, 16), "the best type of each size"),
    "embeddings": _EMBEDDINGS,
}
_LLAMA_CPP_RUN = ("llama-cli", "-m", "{out}")

RECIPES: dict[str, Recipe] = {
    "coopq": Recipe(
        None,
        {
            **_SEARCHED,
            "backend": Setting("rtn", "needs no other library"),
            "bits": Setting((2, 3, 4, 8), "lower loss at an equal size than with two widths"),
        },
        _OWN_RUN,
    ),
    "llama.cpp": Recipe(
        "gguf",
        _LLAMA_CPP,
        _LLAMA_CPP_RUN,
    ),
    "vllm": Recipe(
        "compressed-tensors",
        {
            **_SEARCHED,
            "granularity": Setting("fused", "vLLM computes q/k/v together, and gate/up, each at one width"),
            "backend": Setting("gptq-static", "what is measured is what is saved"),
            "bits": Setting((4, 8, 16), "vLLM has kernels for 4 and 8 bits (Ampere and newer), and for 16"),
        },
        ("vllm", "serve", "{out}"),
    ),
    "transformers": Recipe(
        "auto-round",
        {
            **_SEARCHED,
            "backend": Setting("gptq-static", "what is measured is what is saved"),
            "bits": Setting((2, 4, 8), "the widths of GPTQ's kernels"),
        },
        (
            "python",
            "-c",
            'from transformers import pipeline; print(pipeline("text-generation", {text})("Once", max_new_tokens=20))',
        ),
    ),
    "openvino": Recipe(
        "openvino",
        {
            **_SEARCHED,
            "backend": Setting("rtn", "diverges up to 5 % more than gptq-static, much faster, needs no other library"),
            "bits": Setting((2, 4, 8), "the widths that OpenVINO computes with packed"),
        },
        (
            "python",
            "-c",
            'import openvino_genai as ov; print(ov.LLMPipeline({text}, "CPU").generate("Once", max_new_tokens=20))',
        ),
    ),
    "mlx": Recipe(
        "mlx",
        {
            **_SEARCHED,
            "backend": Setting("rtn", "its integers are mlx's own form, so the file holds what was measured"),
            "bits": Setting((2, 3, 4, 8), "the widths that mlx-lm and the backend share"),
        },
        ("mlx_lm.generate", "--model", "{out}", "--prompt", "Once upon a time"),
    ),
    "speed": Recipe(
        "gguf",
        {
            **_LLAMA_CPP,
            "bits": Setting((2.5, 3.5, 4.5, 6, 8, 16), "without I-quants and Q5_K, slow on CPUs"),
        },
        _LLAMA_CPP_RUN,
    ),
    "paper": Recipe(
        None,
        {
            "method": Setting("coopq", "the published method"),
            "backend": Setting("quanto", "the paper's backend for walks"),
            "bits": Setting((2, 4), "the paper's widths"),
            "granularity": Setting("block", "the paper's players"),
            "loss": Setting("nll", "the paper's loss"),
            "permutations": Setting(100, "the paper's M"),
            "alpha": Setting(0.5, "the paper's shrinkage"),
        },
        _OWN_RUN,
    ),
}
"""Recipes by name: of engines, llama.cpp's for speed, and the paper's. Why these: docs/decisions/0047-recipes.md."""


OWN = "coopq"
"""The recipe of the form that coopq itself saves."""
ENGINES = tuple(name for name in RECIPES if name not in ("paper", "speed"))


def engine_of(form: str | None) -> str:
    """The engine that loads a form.

    Raises:
        OptionError: If there is none.
    """
    engines = {RECIPES[name].form: name for name in ENGINES if name != OWN}
    if form not in engines:
        known = ", ".join(sorted(map(str, engines)))
        raise OptionError(f"target = {form} is loaded by no engine of a recipe; use one of {known}")
    return engines[form]


def get_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        OptionError: If the name is unknown.
    """
    if name not in RECIPES:
        raise OptionError(f"recipe {name!r} is unknown; {hint(name, RECIPES)}")
    return RECIPES[name]


def recipe_options(name: str, engine: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recipe, with those that are given in place of the recipe's.

    Args:
        name: Name of the recipe.
        engine: Name of the engine that will run the model.
        given: Options by name.
    Raises:
        OptionError: If a name is unknown, or the recipe is for another engine or for another backend's widths.
    """
    if engine not in ENGINES:
        raise OptionError(f"engine {engine!r} is unknown; {hint(engine, ENGINES)}")
    form = RECIPES[engine].form
    if form is not None and given.get("target") not in (None, form):
        raise OptionError(f"engine {engine!r} takes the form {form!r}, not {given['target']!r}; leave --target out")
    own = get_recipe(name).form
    if own not in (None, form):
        theirs = next(other for other in ENGINES if RECIPES[other].form == own)
        raise OptionError(f"recipe {name!r} is not for engine {engine!r}; use --for {theirs}, or leave --recipe out")
    options = {option: setting.value for option, setting in get_recipe(name).settings.items()}
    backend = given.get("backend", options["backend"])
    if name == "speed" and backend != options["backend"] and "bits" not in given:  # its types have other widths there
        raise OptionError(
            f"the widths of recipe {name!r} are for backend {options['backend']!r}, not {backend!r}; name --bits too, "
            "or leave --backend out"
        )
    return {**options, **({} if form is None else {"target": form}), **given}


def reasons(name: str, options: Mapping[str, Any]) -> list[str]:
    """A line for each setting of a recipe that is in use: option, value, and why."""
    lines = []
    for option, (value, why) in RECIPES[name].settings.items():
        own = options.get(option)
        if own == value or (isinstance(value, tuple) and isinstance(own, tuple) and set(own) <= set(value)):
            shown = ",".join(map(str, own)) if isinstance(own, tuple) else str(own).lower()
            lines.append(f"{spelled(option)} {shown}: {why}")
    return lines
