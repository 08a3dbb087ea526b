"""Every type of ggml by itself: what all linear layers of a reference model lose in it.

    python benchmarks/ggml_types.py        # four minutes on two cores

Weights are rounded with an importance matrix of some sequences of C4; losses are those on others. Which types the
backends `ggml` and `ggml-iq` take for a width follows from this. Writes docs/results/ggml_types.md.
"""

from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.progress import track

from coopq.backends.ggml import GGMLBackend, column_importance
from coopq.calibration import calibration_set
from coopq.engine import model_nll
from coopq.models import load_model
from coopq.players import find_players
from coopq.run import CalibrationConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "ggml_types.md"
MODELS = ("llama", "gemma", "qwen")
TYPES = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K"),
    *("IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
)
SEQUENCES, LENGTH = 16, 512


class OneType(GGMLBackend):
    """ggml's quantizer of the type that is set, whatever the width."""

    kind = GGMLQuantizationType.Q8_0

    def tensor_type(self, columns: int, bits: int) -> GGMLQuantizationType:
        """See `GGMLBackend.tensor_type`."""
        return self.kind


def losses(name: str) -> dict[str, float]:
    """Nats per token of a model by type; under "full precision" its own."""
    loaded = load_model(str(ROOT / "benchmarks" / "data" / name), dtype="float32", device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    text = calibration_set(CalibrationConfig(sequences=2 * SEQUENCES, length=LENGTH), tokenizer)
    fitted, others = text.tokens[:SEQUENCES], text.tokens[SEQUENCES:]
    names = [linear.name for player in find_players(model) for linear in player.linears]
    importance = column_importance(model, names, fitted)
    weights = {module: model.get_submodule(module).weight for module in names}
    originals = {module: weight.data for module, weight in weights.items()}
    found = {"full precision": float(np.concatenate(list(model_nll(model, others))).mean())}
    backend = OneType()
    for kind in track(TYPES, description=name):
        backend.kind = GGMLQuantizationType[kind]
        for module, original in originals.items():
            shape = (original.shape[0], original.shape[1])
            packed = backend.quantize(original, 0, importance[module])
            weights[module].data = backend.dequantize(packed, shape, 0, torch.float32)
        found[kind] = float(np.concatenate(list(model_nll(model, others))).mean())
    return found


def main() -> None:
    """Measure and write."""
    by_model = {name: losses(name) for name in MODELS}
    full = {name: found.pop("full precision") for name, found in by_model.items()}
    lines = [
        "# Types of ggml",
        "",
        "Written by `python benchmarks/ggml_types.py`: all linear layers of the reference models' blocks in one type,",
        f"with an importance matrix of {SEQUENCES} x {LENGTH} tokens of C4; loss above full precision on {SEQUENCES} x",
        f"{LENGTH} other tokens of C4, nats per token. libggml-python {GGMLBackend().version}.",
        "",
        "| type | bits per weight | " + " | ".join(MODELS) + " |",
        "| --- | --- |" + " --- |" * len(MODELS),
    ]
    for kind in TYPES:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        above = (f"{by_model[name][kind] - full[name]:.4f}" for name in MODELS)
        lines.append(f"| {kind} | {8 * size / block:.4g} | " + " | ".join(above) + " |")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
