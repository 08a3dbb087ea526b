"""Every type of ggml by itself: the divergence that the type causes in all linear layers of a reference model.

    python benchmarks/ggml_types.py        # ten minutes on two cores

Weights are rounded by ggml with an importance matrix of some sequences of C4, and also by GPTQ with ggml's scales where
the codes of the type allow GPTQ. Other sequences judge. This report decides which types the backends `ggml`, `ggml-iq`
and `ggml-gptq` have for a width. Writes docs/results/ggml_types.md.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.progress import track
from torch import Tensor

from _common import RESULTS, command_line, table, write_report
from _models import source_of
from coopq.core.specs import TextSpec
from coopq.model.load import load_model
from coopq.model.players import find_players
from coopq.model.texts import calibration_set
from coopq.quantizers.ggml.codes import code_layout
from coopq.quantizers.ggml.gptq import elimination_order, second_order
from coopq.quantizers.ggml.library import from_blocks, to_blocks
from coopq.quantizers.ggml.types import GGMLBackend
from coopq.quantizers.input_statistics import second_moments

MODELS = ("llama", "gemma", "qwen")
TYPES = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K"),
    *("IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
)
GPTQ = " by GPTQ"
VARIANTS = (*TYPES, *(f"{name}{GPTQ}" for name in TYPES if code_layout(GGMLQuantizationType[name])))
"""Types as ggml rounds them, and types whose codes GPTQ chooses."""
N_SEQUENCES, LENGTH = 16, 512


@torch.no_grad()
def log_probabilities(model: Any, tokens: npt.NDArray[np.int64]) -> Tensor:
    """What a model predicts after each token but the last, shape (n_sequences, length - 1, vocabulary)."""
    each = (model(input_ids=torch.from_numpy(ids[None])).logits[:, :-1].float() for ids in tokens)
    return torch.cat([logits.log_softmax(dim=-1) for logits in each])


def measure(model_name: str) -> dict[str, tuple[float, float]]:
    """Divergence from full precision, and loss above full precision, by variant, nats per token."""
    loaded = load_model(source_of(model_name), dtype="float32", device="cpu")
    model = loaded.model
    text = calibration_set(TextSpec(tokens=2 * N_SEQUENCES * LENGTH, sequence_length=LENGTH), loaded.tokenizer)
    fitted, judging = text.tokens[:N_SEQUENCES], text.tokens[N_SEQUENCES:]
    names = [linear.name for player in find_players(model) for linear in player.linears]
    moments = second_moments(model, names, fitted)
    eliminations = {name: elimination_order(moments[name]) for name in names}
    weights = {name: model.get_submodule(name).weight for name in names}
    originals = {name: weight.data for name, weight in weights.items()}
    full, following = log_probabilities(model, judging), torch.from_numpy(judging[:, 1:, None])
    found = {}
    for variant in track(VARIANTS, description=model_name):
        kind = type_of(variant)
        for name, original in originals.items():
            blocks = to_blocks(kind, original, moments[name].diagonal())
            if variant.endswith(GPTQ):
                blocks = second_order(kind, original, blocks, eliminations[name])
            weights[name].data = from_blocks(kind, blocks)
        change = full - log_probabilities(model, judging)
        found[variant] = float((full.exp() * change).sum(dim=-1).mean()), float(change.gather(2, following).mean())
    return found


def type_of(variant: str) -> GGMLQuantizationType:
    """The type of a variant."""
    return GGMLQuantizationType[variant.removesuffix(GPTQ)]


def bits_of(variant: str) -> float:
    """Stored bits per weight of a variant."""
    block, size = GGML_QUANT_SIZES[type_of(variant)]
    return float(8 * size / block)


def below_mixtures(divergences: Mapping[str, float]) -> list[str]:
    """Variants that diverge less than any mixture of two others of the same size, if divergences of layers add up."""
    found = []
    for variant, value in divergences.items():
        bits = bits_of(variant)
        smaller = [other for other in divergences if bits_of(other) < bits]
        larger = [other for other in divergences if bits_of(other) > bits]
        equal = [divergences[other] for other in divergences if other != variant and bits_of(other) == bits]
        mixed = [
            np.interp(bits, [bits_of(low), bits_of(high)], [divergences[low], divergences[high]])
            for low, high in product(smaller, larger)
        ]
        if value < min([*mixed, *equal, np.inf]):
            found.append(variant)
    return found


def main() -> None:
    """Measure all models, and write the report."""
    command_line(__doc__).parse_args()
    by_model = {name: measure(name) for name in MODELS}
    columns = [f"{name}: {what}" for what in ("divergence", "loss above") for name in MODELS]
    rows = [
        [variant, f"{bits_of(variant):.4g}", *(f"{by_model[name][variant][k]:.4f}" for k in (0, 1) for name in MODELS)]
        for variant in VARIANTS
    ]
    lines = [
        "Written by `python benchmarks/ggml_types.py`: all linear layers of the reference models' blocks in one type,",
        f"with second moments of inputs on {N_SEQUENCES} x {LENGTH} tokens of C4, whose diagonal is the importance",
        "matrix that ggml rounds with; divergence from full precision and",
        f"loss above it on {N_SEQUENCES} x {LENGTH} other tokens of C4, nats per token.",
        f"libggml-python {GGMLBackend().version}.",
        "",
        *table(["type", "bits per weight", *columns], rows),
        "",
        "Types that diverge less than a mixture of two others of the same size would, if divergences added up:",
        "",
    ]
    for name, measured in by_model.items():
        divergences = {variant: divergence for variant, (divergence, _) in measured.items()}
        lines.append(f"* {name}: {', '.join(below_mixtures(divergences))}")
    write_report(RESULTS / "ggml_types.md", lines)


if __name__ == "__main__":
    main()
