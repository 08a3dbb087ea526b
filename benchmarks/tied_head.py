"""An embedding that is the head too, in some of ggml's types, with and without importance of its columns.

    python benchmarks/tied_head.py        # five minutes on two cores

All other weights stay as they are. The importance is that of the head's inputs on some sequences of C4; the divergence
is measured on other sequences. Writes docs/results/tied_head.md.
"""

import torch
from gguf import GGMLQuantizationType
from rich.progress import track

from _common import RESULTS, command_line, table, write_report
from _models import source_of
from coopq.core.specs import TextSpec
from coopq.model.load import load_model
from coopq.model.players import find_players
from coopq.model.texts import calibration_set
from coopq.quantizers.ggml.gptq import elimination_order, second_order
from coopq.quantizers.ggml.library import from_blocks, to_blocks
from coopq.quantizers.ggml.types import GGMLBackend
from coopq.quantizers.input_statistics import second_moments
from ggml_types import log_probabilities

LONG_ROWS, SHORT_ROWS = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"), ("IQ4_NL", "Q5_0")
"""Types for rows of a multiple of 256 weights, and for other rows."""
MODELS = {"llama": LONG_ROWS, "gemma": LONG_ROWS, "qwen": LONG_ROWS, "demo": SHORT_ROWS}
ROUNDINGS = ("no importance", "importance", "GPTQ")
N_FITTED, N_JUDGED, LENGTH = 64, 8, 512


@torch.no_grad()
def measure(name: str) -> dict[str, list[float]]:
    """Divergence from full precision for each type, by rounding, nats per token."""
    loaded = load_model(source_of(name), dtype="float32", device="cpu")
    model, spec = loaded.model, TextSpec(tokens=(N_FITTED + N_JUDGED) * LENGTH, sequence_length=LENGTH)
    text = calibration_set(spec, loaded.tokenizer).tokens
    fitted, judging = text[:N_FITTED], text[N_FITTED:]
    weight, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert weight is head, f"{name}: the embedding is not the head"
    embedding = find_players(model, embeddings=True)[0].linears[0].name
    moments = second_moments(model, [embedding], fitted)[embedding]
    elimination, original, full = elimination_order(moments), weight.data, log_probabilities(model, judging)
    found = {}
    for type_name in track(MODELS[name], description=name):
        kind = GGMLQuantizationType[type_name]
        plain, weighted = (to_blocks(kind, original, importance) for importance in (None, moments.diagonal()))
        divergences = []
        for blocks in (plain, weighted, second_order(kind, original, weighted, elimination)):
            weight.data = from_blocks(kind, blocks)
            change = full - log_probabilities(model, judging)
            divergences.append(float((full.exp() * change).sum(dim=-1).mean()))
        found[type_name] = divergences
        weight.data = original
    return found


def main() -> None:
    """Measure all models, and write the report."""
    command_line(__doc__).parse_args()
    rows = [
        [name, type_name, *(f"{value:.4f}" for value in divergences)]
        for name in MODELS
        for type_name, divergences in measure(name).items()
    ]
    lines = [
        "Written by `python benchmarks/tied_head.py`: the embedding alone in one of ggml's types; divergence from",
        f"full precision on {N_JUDGED} x {LENGTH} tokens of C4, nats per token. Importance, and second moments for",
        f"GPTQ, are those of the head's inputs on {N_FITTED} x {LENGTH} other tokens of C4.",
        f"libggml-python {GGMLBackend().version}.",
        "",
        *table(["model", "type", *ROUNDINGS], rows),
    ]
    write_report(RESULTS / "tied_head.md", lines)


if __name__ == "__main__":
    main()
