"""Every type of ggml by itself: what all linear layers of a reference model lose in it.

    python benchmarks/ggml_types.py        # ten minutes on two cores

Weights are rounded with an importance matrix of some sequences of C4, by ggml and with its scales by GPTQ where its
codes allow, and judged on others. Which types the backends `ggml`, `ggml-iq` and `ggml-gptq` take for a width follows
from this. Writes docs/results/ggml_types.md.
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.progress import track
from torch import Tensor

from coopq.quantizers.ggml.types import GGMLBackend, from_blocks
from coopq.quantizers.ggml.gptq import code_layout, elimination_order, second_order
from coopq.quantizers.input_statistics import second_moments
from coopq.model.texts import calibration_set
from coopq.model.load import load_model
from coopq.model.players import find_players
from coopq.core.config import CalibrationConfig
from coopq.core.types import Width

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "ggml_types.md"
MODELS = ("llama", "gemma", "qwen")
TYPES = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K"),
    *("IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
)
GPTQ = " by GPTQ"
VARIANTS = [
    *TYPES,
    *(f"{kind}{GPTQ}" for kind in TYPES if code_layout(GGMLQuantizationType[kind])),
]
SEQUENCES, LENGTH = 16, 512


class OneType(GGMLBackend):
    """ggml's quantizer of the type that is set, whatever the width."""

    kind = GGMLQuantizationType.Q8_0

    def tensor_type(self, columns: int, bits: Width) -> GGMLQuantizationType:
        """See `GGMLBackend.tensor_type`."""
        return self.kind


@torch.no_grad()
def expected(model: Any, tokens: npt.NDArray[np.int64]) -> Tensor:
    """Log-probabilities after each token but the last, shape (n_sequences, length - 1, vocabulary)."""
    each = (model(input_ids=torch.from_numpy(of[None])).logits[:, :-1].float() for of in tokens)
    return torch.cat([logits.log_softmax(dim=-1) for logits in each])


def lost(name: str) -> dict[str, tuple[float, float]]:
    """Of a model by type and rounding: divergence from full precision and loss above it, nats per token."""
    loaded = load_model(str(ROOT / "benchmarks" / "data" / name), dtype="float32", device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    text = calibration_set(CalibrationConfig(sequences=2 * SEQUENCES, length=LENGTH), tokenizer)
    fitted, others = text.tokens[:SEQUENCES], text.tokens[SEQUENCES:]
    names = [linear.name for player in find_players(model) for linear in player.linears]
    moments = second_moments(model, names, fitted)
    eliminations = {module: elimination_order(of) for module, of in moments.items()}
    weights = {module: model.get_submodule(module).weight for module in names}
    originals = {module: weight.data for module, weight in weights.items()}
    own, following = expected(model, others), torch.from_numpy(others[:, 1:, None])
    found, backend = {}, OneType()
    for variant in track(VARIANTS, description=name):
        backend.kind = GGMLQuantizationType[variant.removesuffix(GPTQ)]
        for module, original in originals.items():
            blocks = backend.quantize(original, 0, moments[module].diagonal())["blocks"]
            if variant.endswith(GPTQ):
                blocks = second_order(backend.kind, original, blocks, eliminations[module])
            weights[module].data = from_blocks(backend.kind, blocks)
        apart = own - expected(model, others)
        found[variant] = float((own.exp() * apart).sum(dim=-1).mean()), float(apart.gather(2, following).mean())
    return found


def bits_of(variant: str) -> float:
    """Stored bits per weight of a type."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[variant.removesuffix(GPTQ)]]
    return float(8 * size / block)


def below_mixtures(losses: Mapping[str, float]) -> list[str]:
    """Types that lose less than any two others would in as many bytes, if losses of layers added up."""
    found = []
    for kind, value in losses.items():
        smaller = [of for of in losses if bits_of(of) < bits_of(kind)]
        larger = [of for of in losses if bits_of(of) > bits_of(kind)]
        alike = [losses[of] for of in losses if of != kind and bits_of(of) == bits_of(kind)]
        mixed = [
            np.interp(bits_of(kind), [bits_of(low), bits_of(high)], [losses[low], losses[high]])
            for low, high in product(smaller, larger)
        ]
        if value < min([*mixed, *alike, np.inf]):
            found.append(kind)
    return found


def main() -> None:
    """Measure and write."""
    by_model = {name: lost(name) for name in MODELS}
    columns = [f"{name}: {what}" for what in ("divergence", "loss above") for name in MODELS]
    lines = [
        "# Types of ggml",
        "",
        "Written by `python benchmarks/ggml_types.py`: all linear layers of the reference models' blocks in one type,",
        f"with second moments of inputs on {SEQUENCES} x {LENGTH} tokens of C4, whose diagonal is the importance",
        "matrix that ggml rounds with; divergence from full precision and",
        f"loss above it on {SEQUENCES} x {LENGTH} other tokens of C4, nats per token.",
        f"libggml-python {GGMLBackend().version}.",
        "",
        f"| type | bits per weight | {' | '.join(columns)} |",
        "| --- | --- |" + " --- |" * len(columns),
    ]
    for kind in VARIANTS:
        cells = [f"{by_model[name][kind][what]:.4f}" for what in (0, 1) for name in MODELS]
        lines.append(f"| {kind} | {bits_of(kind):.4g} | {' | '.join(cells)} |")
    lines += [
        "",
        "Of these lose less, by divergence, than a mixture of two others in as many bytes would, if it added up:",
        "",
    ]
    for name, found in by_model.items():
        lines.append(f"* {name}: {', '.join(below_mixtures({kind: of[0] for kind, of in found.items()}))}")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
