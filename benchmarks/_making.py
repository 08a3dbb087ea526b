"""Seconds of the processor to make the demo model's bank by ggml-gptq, for `bank.py --making`.

Runs in a process of its own, so that it can also measure an earlier version of coopq by `PYTHONPATH`.
"""

import json
from collections.abc import Mapping

import torch

from _common import cpu_seconds
from coopq.core.specs import QuantizerSpec, TextSpec
from coopq.core.types import Width
from coopq.model.load import load_model
from coopq.model.players import find_players
from coopq.model.texts import calibration_set
from coopq.quantizers import get_backend
from coopq.quantizers.ggml import gptq
from coopq.quantizers.ggml.gptq import GGMLGPTQ
from coopq.quantizers.input_statistics import second_moments

SEQUENCES, LENGTH = 2, 512
"""Tokens whose second moments are timed. Weights are fitted to 64 sequences by default."""


def main() -> None:
    """Print seconds for second moments of all layers, and for rounding the layers of one block at all their types."""
    backend = get_backend(QuantizerSpec("ggml-gptq"))
    assert isinstance(backend, GGMLGPTQ)
    loaded = load_model("demo", dtype="float32", device="cpu")
    tokens = calibration_set(TextSpec(tokens=SEQUENCES * LENGTH, sequence_length=LENGTH), loaded.tokenizer).tokens
    linears = [linear for player in find_players(loaded.model) for linear in player.linears]
    start = cpu_seconds()
    moments = second_moments(loaded.model, [linear.name for linear in linears], tokens)
    seconds = {"moments": cpu_seconds() - start}
    first = linears[: len(linears) // loaded.model.config.num_hidden_layers]
    layers = {
        width: [each.name for each in first if width in types_of(backend, each.shape[1])] for width in backend.bits
    }
    setattr(gptq, "second_moments", lambda *_: {each.name: moments[each.name] for each in first})  # noqa: B010 - mypy
    for kind in {backend.format.tensor_type(each.shape[1], width) for each in first for width in (4, 5, 8)}:
        vars(gptq)["code_layout"](kind)  # found once a process
    start = cpu_seconds()
    for _ in backend.quantize_widths(loaded.model, loaded.tokenizer, layers, tokens):
        pass
    print(json.dumps(seconds | {"rounding": cpu_seconds() - start}))


def types_of(backend: GGMLGPTQ, columns: int) -> Mapping[Width, str]:
    """Types by width for rows of a length."""
    return backend.short_rows if columns % 256 else backend.long_rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
