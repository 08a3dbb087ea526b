"""An embedding that is the head too, in some of ggml's types, by what its columns are taken to be worth.

    python benchmarks/tied_head.py        # five minutes on two cores

All other weights stay as they are. Inputs of the head are measured on some sequences of C4, and divergence on others.
Writes docs/results/tied_head.md.
"""

from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from rich.progress import track

from coopq.quantizers.ggml.types import GGMLBackend, from_blocks, to_blocks
from coopq.quantizers.ggml.gptq import elimination_order, second_order
from coopq.quantizers.input_statistics import second_moments
from coopq.model.texts import calibration_set
from coopq.model.load import load_model
from coopq.model.players import find_players
from coopq.core.config import CalibrationConfig
from ggml_types import expected

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "tied_head.md"
LONG_ROWS, SHORT_ROWS = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"), ("IQ4_NL", "Q5_1")
MODELS = {"llama": LONG_ROWS, "gemma": LONG_ROWS, "qwen": LONG_ROWS, "demo": SHORT_ROWS}
ROUNDINGS = ("no importance", "importance", "GPTQ")
FITTED, JUDGED, LENGTH = 64, 8, 512


@torch.no_grad()
def diverging(name: str) -> dict[str, tuple[float, ...]]:
    """Divergence from full precision for each type, by rounding, nats per token."""
    source = ROOT / "benchmarks" / "data" / name
    loaded = load_model(str(source) if source.exists() else name, dtype="float32", device="cpu")
    model = loaded.model
    text = calibration_set(CalibrationConfig(sequences=FITTED + JUDGED, length=LENGTH), loaded.tokenizer).tokens
    weight, of_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert weight is of_head, name
    embedding = find_players(model, embeddings=True)[0].linears[0].name
    moments = second_moments(model, [embedding], text[:FITTED])[embedding]
    elimination, original, own = elimination_order(moments), weight.data, expected(model, text[FITTED:])
    found = {}
    for of in track(MODELS[name], description=name):
        kind = GGMLQuantizationType[of]
        plain, weighted = (to_blocks(kind, original, importance) for importance in (None, moments.diagonal()))
        apart = []
        for blocks in (plain, weighted, second_order(kind, original, weighted, elimination)):
            weight.data = from_blocks(kind, blocks)
            apart.append(float((own.exp() * (own - expected(model, text[FITTED:]))).sum(dim=-1).mean()))
        found[of] = tuple(apart)
        weight.data = original
    return found


def main() -> None:
    """Measure and write."""
    lines = [
        "# An embedding that is the head too",
        "",
        "Written by `python benchmarks/tied_head.py`: the embedding alone in one of ggml's types; divergence from",
        f"full precision on {JUDGED} x {LENGTH} tokens of C4, nats per token. Importance, and second moments for GPTQ,",
        f"are those of the head's inputs on {FITTED} x {LENGTH} other tokens of C4.",
        f"libggml-python {GGMLBackend().version}.",
        "",
        f"| model | type | {' | '.join(ROUNDINGS)} |",
        "| --- | --- |" + " --- |" * len(ROUNDINGS),
    ]
    for name in MODELS:
        for of, apart in diverging(name).items():
            lines.append(f"| {' | '.join([name, of, *(f'{value:.4f}' for value in apart)])} |")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
