"""What several commands ask for: types of arguments and options with their help, and what their values mean."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coopq.core.errors import CalibrationError, EstimationError
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.types import as_widths

if TYPE_CHECKING:  # it imports torch
    from coopq.game.ray_cluster import RayConfig

Model = Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, or 'demo'.")]
Budget_ = Annotated[
    str | None, typer.Option("--budget", help="Average bits (2.5avg), bits per weight (2.8bpw) or bytes (40MiB).")
]
Granularity = Annotated[
    str,
    typer.Option(help="What gets a width of its own: block, fused (q/k/v and gate/up together), or linear (layer)."),
]
Embeddings = Annotated[
    bool, typer.Option("--embeddings", help="The embedding and the head are players too; one, where they are tied.")
]
Target = Annotated[
    str | None,
    typer.Option(
        help="Form that the model will be exported to (gguf, openvino, compressed-tensors, auto-round): what that "
        "cannot hold is refused at once, and a budget in bytes is that of the exported file."
    ),
]
Base = Annotated[
    str | None, typer.Option(help="For --target gguf or openvino: the model in full precision in that form.")
]
Context = Annotated[int | None, typer.Option(min=1, help="A budget in bytes holds the KV cache of so many tokens too.")]
Backend = Annotated[
    str, typer.Option(help="rtn, quanto, hqq, gptq, gptq-static, autoround, ggml, ggml-iq or ggml-gptq.")
]
METHOD_HELP = (
    "active searches on the true loss; coopq is the paper's; shapley, interactions and pruning read walks otherwise; "
    "greedy-down, greedy-up, evopress, regression, cross-layer, one-shot-high, one-shot-low, exact; or a score: "
    "fisher, llm-mq, llm-mq-block, lim, zd, zd-two-sided, activation, first-last, hawq, auto-quantize, "
    "auto-quantize-kl."
)
Method = Annotated[str, typer.Option(help=METHOD_HELP)]
GroupSize = Annotated[int | None, typer.Option(help="Weights that share a scale. (default: the backend's)")]
ActOrder = Annotated[
    bool | None, typer.Option("--act-order/--no-act-order", help="gptq: columns by decreasing Hessian diagonal.")
]
Symmetric = Annotated[
    bool | None, typer.Option("--symmetric/--asymmetric", help="gptq, autoround: zero points in the middle.")
]
Bits = Annotated[str, typer.Option(help="The widths to choose from, two or more.")]
Permutations = Annotated[
    int, typer.Option(help="Random walks to measure, for methods that walk; more can be added to a run later.")
]
Seed = Annotated[int, typer.Option(help="Seed of the walks, or of the search.")]
Calibration = Annotated[str, typer.Option(help="'c4' (packaged), a .txt or .jsonl file, hub:NAME or hub:NAME:CONFIG.")]
CalibrationSeed = Annotated[int, typer.Option(help="Seed of the choice of calibration sequences.")]
Tokens = Annotated[int, typer.Option(help="Calibration tokens, in whole sequences.")]
FitTokens = Annotated[
    int | None,
    typer.Option(
        help="gptq, autoround, ggml: further tokens of the text that weights are fitted to. (default: 32768, or what "
        "it has left)"
    ),
]
Length = Annotated[int, typer.Option("--sequence-length", help="Tokens of a calibration sequence.")]
ScreenTokens = Annotated[
    int | None, typer.Option(help="Calibration tokens that a search looks at; all decide at the end. (default: all)")
]
Loss = Annotated[
    str,
    typer.Option(
        help="What searches lower: nll, as in the paper, or kl, the divergence from full precision, of which few "
        "tokens say more."
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ..., or 'sharded': over all GPUs.")]
Alpha = Annotated[float, typer.Option(help="Shrinkage of the covariance towards its diagonal, 0 to 1.")]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        help="Seconds for the solver. (default: until proven; a quarter of a minute where only surrogates are solved)"
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Measure on a Ray cluster: its address, 'auto' for this machine's, 'local' to start one here."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Workers on the cluster. (default: one a GPU, or one a CPU core)")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Run = Annotated[Path | None, typer.Option(help="Folder of the work. (default: OUT-run)")]


def run_config(
    *,
    model: Model,
    granularity: Granularity = "block",
    embeddings: Embeddings = False,
    target: Target = None,
    base: Base = None,
    context: Context = None,
    backend: Backend = "rtn",
    group_size: GroupSize = None,
    act_order: ActOrder = None,
    symmetric: Symmetric = None,
    bits: Bits = "2,4",
    permutations: Permutations = 25,
    seed: Seed = 0,
    calibration: Calibration = "c4",
    calibration_seed: CalibrationSeed = 0,
    tokens: Tokens = 8192,
    sequence_length: Length = 512,
    fit_tokens: FitTokens = None,
    screen_tokens: ScreenTokens = None,
    loss: Loss = "nll",
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> RunConfig:
    """What a command is asked to measure."""
    for option, n in (("--tokens", tokens), ("--screen-tokens", screen_tokens), ("--fit-tokens", fit_tokens)):
        if sequence_length < 1 or (n is not None and n % sequence_length):
            raise CalibrationError(
                f"{option} {n} is not a multiple of --sequence-length {sequence_length}; sequences are never padded"
            )

    def in_sequences(n: int | None) -> int | None:
        return None if n is None else n // sequence_length

    try:
        low, *between, high = sorted(as_widths(bits.split(",")))
    except ValueError as error:
        raise EstimationError(f"--bits {bits!r} is not two widths or more; write 2,4 or 2,3,4,8") from error
    return RunConfig(
        model,
        backend,
        low=low,
        between=tuple(between),
        high=high,
        group_size=group_size,
        act_order=act_order,
        symmetric=symmetric,
        granularity=granularity,
        embeddings=embeddings,
        target=target,
        base=base,
        context=context,
        permutations=permutations,
        seed=seed,
        calibration=CalibrationConfig(
            calibration, tokens // sequence_length, sequence_length, calibration_seed, in_sequences(fit_tokens)
        ),
        screening=in_sequences(screen_tokens),
        loss=loss,
        dtype=dtype,
        device=device,
    )


def measures(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command, whose first parameter is a `RunConfig`, ask for the options that `run_config` makes one from.

    Args:
        without: Options that it does not need.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        asked = {name: of for name, of in signature(run_config).parameters.items() if name not in without}
        own = [of.replace(kind=Parameter.KEYWORD_ONLY) for of in list(signature(command).parameters.values())[1:]]

        @wraps(command)
        def with_options(**values: Any) -> None:
            command(run_config(**{name: values.pop(name) for name in asked}), **values)

        # The model, then what is the command's own, then the rest.
        model, *others = asked.values()
        parameters = [model, *own, *others]
        with_options.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {of.name: of.annotation for of in parameters}
        return with_options

    return decorate


def ray_config(address: str | None, workers: int | None) -> "RayConfig | None":
    """The cluster, if one is named."""
    if address is None:
        if workers is not None:
            raise EstimationError(f"--workers {workers} goes with a cluster; name one with --ray-address")
        return None
    from coopq.game.ray_cluster import RayConfig

    return RayConfig(address, workers)
