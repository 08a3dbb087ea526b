"""GGUF files in float16 of the reference models, or of a folder of their tokenizer, by llama.cpp's own converter.

    python benchmarks/convert.py llama build/llama.gguf

The converter knows tokenizers by what they make of one text, and has a list of them; those of the reference models are
byte-level BPE with GPT-2's way of splitting words, and not on it. It reads the base of rotary embeddings where
transformers wrote it before version 5.
"""

import argparse
import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import torch

from coopq.core.files import atomic_file

DATA = Path(__file__).parent / "data"


def converter() -> ModuleType:
    """llama.cpp's converter as ik-llama-cpp-python ships it, taught what it does not know."""
    file = Path(sysconfig.get_paths()["purelib"]) / "bin" / "convert_hf_to_gguf.py"
    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"error: {file} is not there; run: pip install ik-llama-cpp-python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    read = module.Model.load_hparams

    def settings(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = read(folder)
        now = {"rope_theta": found["rope_parameters"]["rope_theta"], "num_experts": found.get("num_local_experts")}
        return {**found, **now}

    module.Model.load_hparams = staticmethod(settings)
    module.Model.get_vocab_base_pre = lambda *_: "gpt-2"
    for name in "LlamaModel", "Gemma2Model", "Qwen2Model", "Qwen2MoeModel":  # Qwen3's are Qwen2's
        getattr(module, name).set_vocab = module.Model._set_vocab_gpt2
    return module


def convert(folder: Path, out: Path) -> None:
    """Write a model folder of transformers as a GGUF file."""
    module = converter()
    architecture = module.Model.load_hparams(folder)["architectures"][0]
    out.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), atomic_file(out) as temporary:
        kind = module.Model.from_model_architecture(architecture)
        kind(dir_model=folder, ftype=gguf.LlamaFileType.MOSTLY_F16, fname_out=temporary, model_name=folder.name).write()


def main() -> None:
    """One model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="llama, gemma or qwen, or a folder")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    convert(DATA / arguments.model, arguments.out)


if __name__ == "__main__":
    main()
