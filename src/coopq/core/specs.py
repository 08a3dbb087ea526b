"""What a run is asked for: small frozen specs, each checked when it is built.

The command line's options, the keys of a bench's TOML file and the fields of saved JSON are all made from these
definitions, and the description of a field is the help of its option. The names of all options are different, so a flat
list of options says which spec each belongs to:

>>> Request.from_options(model="demo", bits=(3, 4), tokens=1024).widths.bits
(3, 4)
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import FieldInfo, fields, force_setattr

from coopq.core.errors import OptionError, hint
from coopq.core.spec_base import Spec, build, spec_options, spelled
from coopq.core.types import UNTOUCHED, Width, as_widths


class ModelSpec(Spec, frozen=True):
    """Which model, and how to compute with it."""

    source: Annotated[str, Meta(description="Hub id, local folder, .gguf file, or 'demo'.")] = msgspec.field(
        name="model"
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(
            description="Compute in this dtype. auto: float32 on CPUs and for .gguf files, else the checkpoint's dtype."
        ),
    ] = "auto"
    device: Annotated[
        str, Meta(description="auto, cpu, cuda, mps, ..., or 'sharded': blocks divided between GPUs.")
    ] = "auto"


class QuantizerSpec(Spec, frozen=True):
    """Which backend quantizes, and its options; None takes the backend's default."""

    backend: Annotated[str, Meta(description="Library and method that quantize the weights.")] = "rtn"
    group_size: Annotated[int | None, Meta(description="Weights that share a scale. Default: the backend's.")] = None
    act_order: Annotated[
        bool | None, Meta(description="gptq: quantize columns by decreasing Hessian diagonal. Default: the backend's.")
    ] = None
    symmetric: Annotated[
        bool | None,
        Meta(
            description="gptq, autoround: zero points in the middle of the range. Default: the backend's.",
            extra={"flags": "--symmetric/--asymmetric"},
        ),
    ] = None
    imatrix: Annotated[
        str | None,
        Meta(description="ggml, ggml-iq: llama.cpp's imatrix file, instead of statistics that CoopQ collects."),
    ] = None


class WidthsSpec(Spec, frozen=True):
    """What gets a width of its own, and which widths there are."""

    bits: Annotated[
        tuple[Width, ...],
        Meta(description="Widths to choose from: 2,4 or 3,4,8. 16 leaves a layer as it is."),
    ] = (2, 4)
    granularity: Annotated[
        Literal["block", "fused", "linear"],
        Meta(description="What gets a width of its own: block, fused (q/k/v and gate/up together) or linear (layer)."),
    ] = "block"
    embeddings: Annotated[
        bool, Meta(description="Give the embedding and the head widths of their own too; tied weights share one.")
    ] = False
    routers: Annotated[
        bool, Meta(description="Quantize routers and gates with one output too; they are small and sensitive.")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        bits = tuple(sorted(as_widths(self.bits)))
        if len(bits) < 2 or len(set(bits)) < len(bits):
            raise OptionError(
                f"bits = {', '.join(map(str, self.bits))} are not two or more different widths; write 2,4"
            )
        force_setattr(self, "bits", bits)

    @property
    def low(self) -> Width:
        """The lowest width."""
        return self.bits[0]

    @property
    def high(self) -> Width:
        """The highest width."""
        return self.bits[-1]

    @property
    def quantized(self) -> tuple[Width, ...]:
        """The widths that weights are quantized to: all but 16."""
        return tuple(width for width in self.bits if width != UNTOUCHED)

    @property
    def text(self) -> str:
        """The widths for people: "2, 3 and 4"."""
        *first, last = map(str, self.bits)
        return f"{', '.join(first)} and {last}"


class TextSpec(Spec, frozen=True):
    """Which text losses are measured on. The text is cut into sequences of equal length, without padding."""

    source: Annotated[
        str, Meta(description="Calibration text: 'c4' (packaged), a .txt or .jsonl file, hub:NAME or hub:NAME:CONFIG.")
    ] = msgspec.field(default="c4", name="calibration")
    tokens: Annotated[int, Meta(ge=1, description="Calibration tokens, in whole sequences.")] = 8192
    sequence_length: Annotated[int, Meta(ge=2, description="Tokens of a calibration sequence.")] = 512
    seed: Annotated[int, Meta(ge=0, description="Seed of the choice of calibration sequences.")] = msgspec.field(
        default=0, name="calibration_seed"
    )
    fit_tokens: Annotated[
        int | None,
        Meta(
            description="gptq, autoround, ggml: further tokens of the text that weights are fitted to. Default: 32768, "
            "or what the text has left."
        ),
    ] = None
    screen_tokens: Annotated[
        int | None,
        Meta(description="Calibration tokens that a search looks at; all tokens decide at the end. Default: all."),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "fit_tokens", "screen_tokens"):
            n = getattr(self, name)
            if n is not None and (n < 1 or n % self.sequence_length):
                raise OptionError(
                    f"{spelled(name)} = {n} is not a positive multiple of sequence-length = {self.sequence_length}; "
                    "sequences are never padded"
                )
        if self.screen_tokens is not None and self.screen_tokens > self.tokens:
            raise OptionError(
                f"screen-tokens = {self.screen_tokens} is more than tokens = {self.tokens}; a search looks at some of "
                "the calibration tokens"
            )

    @property
    def n_sequences(self) -> int:
        """Number of calibration sequences."""
        return self.tokens // self.sequence_length

    @property
    def n_fit_sequences(self) -> int | None:
        """Number of sequences that weights are fitted to; None where the text decides."""
        return None if self.fit_tokens is None else self.fit_tokens // self.sequence_length

    @property
    def n_screen_sequences(self) -> int:
        """Number of sequences that a search looks at."""
        return (self.screen_tokens or self.tokens) // self.sequence_length


class SearchSpec(Spec, frozen=True):
    """What searches minimize, and the random numbers of searches."""

    loss: Annotated[
        Literal["nll", "kl"],
        Meta(
            description="What searches minimize: nll (as in the paper), or kl, the divergence from the original model. "
            "At 3 bits and above kl is less noisy, so fewer tokens are enough."
        ),
    ] = "nll"
    permutations: Annotated[
        int, Meta(ge=2, description="Random walks, for methods that walk; a later command can add walks to a run.")
    ] = 25
    seed: Annotated[int, Meta(ge=0, description="Seed of the walks or of the search.")] = 0


class TargetSpec(Spec, frozen=True):
    """Which engine's file the model is for, and what has to fit beside it: a budget in bytes is that of the file."""

    form: Annotated[
        str | None,
        Meta(
            description="Form the model will be exported to. What the form cannot hold is refused at once, and a "
            "budget in bytes is that of the exported file."
        ),
    ] = msgspec.field(default=None, name="target")
    base: Annotated[
        str | None, Meta(description="For --target gguf or openvino: the model in full precision in that form.")
    ] = None
    context: Annotated[
        int | None, Meta(description="Reserve room in a budget in bytes for a KV cache of this many tokens.")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context is not None and self.context < 1:
            raise OptionError(f"context = {self.context} is not a number of tokens; leave it out for no KV cache")


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that losses and plans depend on."""

    model: ModelSpec
    quantizer: QuantizerSpec = QuantizerSpec()
    widths: WidthsSpec = WidthsSpec()
    text: TextSpec = TextSpec()
    search: SearchSpec = SearchSpec()
    target: TargetSpec = TargetSpec()

    @classmethod
    def from_options(cls, **options: Any) -> "Request":
        """A request from flat options: those of all specs by name, the others at their defaults.

        Raises:
            OptionError: If an option is unknown, or a value does not fit.
        """
        _check_known(options)
        return cls(**{group: build(kind, options) for group, kind in _SPECS.items()})

    def replace(self, **options: Any) -> "Request":
        """The same request with other values of some options."""
        return Request.from_options(**{**self.options(), **options})

    def options(self) -> dict[str, Any]:
        """All options by name."""
        return {name: value for group in _SPECS for name, value in spec_options(getattr(self, group)).items()}


class SolverSpec(Spec, frozen=True):
    """How the program of a budget is made and solved."""

    alpha: Annotated[
        float, Meta(ge=0, le=1, description="Shrinkage of the covariance towards its diagonal, 0 to 1; the paper: 0.5.")
    ] = 0.5
    time_limit: Annotated[
        float | None,
        Meta(description="Seconds for the solver. Default: until proven; 15 where only surrogates are solved."),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_limit is not None and not 0 < self.time_limit < float("inf"):
            raise OptionError(
                f"time-limit = {self.time_limit} is not a positive number of seconds; leave it out for no limit"
            )


DEFAULT_SOLVER = SolverSpec()
_SPECS: dict[str, type[Spec]] = {
    "model": ModelSpec,
    "quantizer": QuantizerSpec,
    "widths": WidthsSpec,
    "text": TextSpec,
    "search": SearchSpec,
    "target": TargetSpec,
}


def option_fields(*kinds: type[Spec]) -> Iterator[FieldInfo]:
    """The fields of specs; `encode_name` is the option's name. Without kinds, those of a whole request."""
    for kind in kinds or _SPECS.values():
        yield from fields(kind)


def request_words(request: Request, always: Collection[str] = ()) -> list[str]:
    """The model and the options of a request, as words of a command line.

    Args:
        request: The request.
        always: Names of options that are written even at their defaults.
    """
    given = request.options()
    usual = Request.from_options(model=given["model"]).options()
    changed = [name for name in given if given[name] != usual[name] or (name in always and given[name] is not None)]
    return [str(given["model"]), *(word for name in changed for word in _option_words(name, given[name]))]


def _option_words(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        names = {("symmetric", False): "asymmetric"}
        yield "--" + names.get((name, value), spelled(name) if value else f"no-{spelled(name)}")
    else:
        yield f"--{spelled(name)}"
        yield ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_known(options: Mapping[str, Any]) -> None:
    """Check that all options are known.

    Raises:
        OptionError: If one is not.
    """
    known = [field.encode_name for field in option_fields()]
    for name in options:
        if name not in known:
            raise OptionError(f"option {spelled(name)!r} is unknown; {hint(spelled(name), map(spelled, known))}")
