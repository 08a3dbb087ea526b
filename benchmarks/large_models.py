"""What CoopQ takes for models of 1B, 8B and 70B parameters, computed from their shapes: no weights, no GPU.

    python benchmarks/large_models.py      # a minute; writes the tables of docs/large_models.md

Bytes are those that `coopq quantize --dry-run` states. Minutes divide the floating point operations of a search with
`--forwards 150` by an assumed rate, and add the copies of blocks that stay on the host.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _common import ROOT, command_line, table
from coopq.core.recipes import recipe_options
from coopq.core.specs import Request
from coopq.game.prepared import Prepared, prepare, usable_bits
from coopq.model.memory import Footprint
from coopq.plan.forecast import Work
from coopq.quantizers.ggml.gptq import portions

PAGE, START, END = ROOT / "docs" / "large_models.md", "<!-- large_models.py writes from here -->", "<!-- to here -->"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "dtype": "bfloat16"}
LLAMA |= {"max_position_embeddings": 131072, "num_key_value_heads": 8}
MODELS: Mapping[str, dict[str, Any]] = {
    "Llama-3.2 1B": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"head_dim": 64, "tie_word_embeddings": True},
    "Llama-3 8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-3 70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
OPTIONS: Mapping[str, Any] = {"dtype": "bfloat16", "device": "cpu"}
RECIPES = ("coopq", "llama.cpp")
FORWARDS, LOSSES = 150, 200
"""What a search takes: 90 to 159 forwards on the models of benchmarks/informed.py. Prefixes are shared."""
ROUND = 2
"""Assignments of a round of the active search for one size, which workers measure at the same time."""


@dataclass(frozen=True)
class Machine:
    """Assumed hardware.

    Attributes:
        free: Free bytes of a GPU.
        block_rate: Operations per second in a block.
        head_rate: Operations per second in the head with the loss.
        bus: Bytes per second from the host to the GPU.
        n_gpus: GPUs, each with a worker of Ray that holds the whole model.
    """

    free: float
    block_rate: float
    head_rate: float
    bus: float
    n_gpus: int = 1


H100 = Machine(78 * 2**30, 637e12, 389e12, 50e9)
"""Rates of docs/results/gpu.md; PCIe 5.0 x16 at 0.8 of its nominal rate."""
MACHINES = {
    "one GPU of 24 GB": Machine(22 * 2**30, 100e12, 60e12, 25e9),
    "one GPU of 80 GB": H100,
    "eight of 80 GB": replace(H100, n_gpus=8),
}


def prepared_from(config: Mapping[str, Any], recipe: str = "coopq", **options: Any) -> Prepared:
    """A request by a recipe for a model of which there is a configuration alone."""
    given = recipe_options(recipe, recipe, {**OPTIONS, **options})
    given.pop("target", None)
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        request = Request.from_options(model=folder, **given)
        bits = request.widths.quantized
        return prepare(request.replace(bits=usable_bits(request.replace(bits=bits))))


def gpu_footprint(prepared: Prepared) -> Footprint:
    """What a run takes on a GPU."""
    text, widths = prepared.request.text, prepared.request.widths.quantized
    bank, diverges = prepared.footprint.bank, prepared.request.search.loss == "kl"
    return Footprint.estimate(prepared.skeleton, prepared.players, text, "cuda", len(widths), bank, diverges)


def minutes(prepared: Prepared, work: Work, machine: Machine, *, offloaded: bool) -> float:
    """Minutes of a search.

    Workers share no prefixes, and a round keeps as many of them busy as the round has assignments. On the host, each
    block forward copies its block: assignments rarely give a block the same widths.
    """
    shape, tokens = prepared.skeleton.config, prepared.request.text.tokens
    needed = gpu_footprint(prepared)
    block_bytes = needed.blocks / shape.num_hidden_layers
    forwards, losses = float(work.block_forwards), float(work.evaluations)
    if machine.n_gpus > 1:
        at_once = min(machine.n_gpus, ROUND)
        forwards, losses = losses * shape.num_hidden_layers / at_once, losses / at_once
    block = tokens * block_bytes / machine.block_rate + (block_bytes / machine.bus if offloaded else 0)
    head = 2 * tokens * shape.hidden_size * shape.vocab_size / machine.head_rate
    return float(forwards * block + losses * head) / 60


def rows_of(name: str, by_recipe: Mapping[str, Prepared]) -> list[list[str]]:
    """The rows of a model, one for each machine."""
    prepared = by_recipe[RECIPES[0]]
    needed = gpu_footprint(prepared)
    work = Work(FORWARDS * prepared.skeleton.config.num_hidden_layers, LOSSES)
    counts = [str(len(prepared.players)), *(f"{each.footprint.bank / 1e9:.1f}" for each in by_recipe.values())]
    rows = []
    for machine_name, machine in MACHINES.items():
        offloaded = needed.must_offload(int(machine.free))
        on_gpu = needed.needed_offloaded if offloaded else min(needed.total, int(machine.free))
        on_host = needed.blocks + needed.bank if offloaded else needed.bank
        time = minutes(prepared, work, machine, offloaded=offloaded)
        cells = [f"{on_gpu / 1e9:.0f}", f"{on_host / 1e9:.0f}", f"{time:.1f}" if time < 10 else f"{time:.0f}"]
        if offloaded and (machine.n_gpus > 1 or needed.needed_offloaded > machine.free):
            cells = ["does not fit", "", ""]
        rows.append([name, machine_name, *counts, *cells])
    return rows


def names_of(prepared: Prepared) -> list[str]:
    """Names of all linear layers of the players."""
    return [linear.name for player in prepared.players for linear in player.linears]


def checks() -> list[list[str]]:
    """The same arithmetic where something was measured."""
    demo = prepare(Request.from_options(model="demo", backend="rtn", bits=(2, 4)))
    options: dict[str, Any] = {"bits": (2, 4), "granularity": "block", "tokens": 16384, "sequence_length": 2048}
    gpu = prepared_from(MODELS["Llama-3 8B"], **options)
    bank, found = demo.footprint.bank / 1e6, minutes(gpu, Work(4949, 210), H100, offloaded=False)
    return [
        ["bank of SmolLM2-135M, `rtn` at 2 and 4 bits, MB", f"{bank:.0f}", "[88](results/bank.md)"],
        ["4,949 block forwards and 210 losses of an 8B model, minutes", f"{found:.1f}", "[1.2](results/gpu.md)"],
    ]


def main() -> None:
    """Compute the tables, and write them into the page."""
    command_line(__doc__).parse_args()
    prepared = {name: {recipe: prepared_from(config, recipe) for recipe in RECIPES} for name, config in MODELS.items()}
    banks = [f"disk, GB, recipe {recipe}" for recipe in RECIPES]
    columns = ["model", "machine", "layers", *banks, "GPU, GB", "host, GB", "minutes"]
    fitting = [
        [name, str(sum(1 for _ in portions(each["llama.cpp"].skeleton, names_of(each["llama.cpp"]))))]
        for name, each in prepared.items()
    ]
    lines = [
        *table(columns, [row for name, each in prepared.items() for row in rows_of(name, each)]),
        "",
        *table(["the same arithmetic", "computed", "measured"], checks()),
        "",
        *table(["model", "forwards of the model for the second moments of `ggml-gptq`"], fitting),
    ]
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    PAGE.write_text("\n".join([f"{before}{START}", "", *lines, "", END + rest.partition(END)[2]]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
