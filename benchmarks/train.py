"""Trains the small models that the benchmarks measure.

    nice python benchmarks/train.py twelve                        # 45 minutes on two cores
    nice python benchmarks/train.py llama --tokens 130000000      # five minutes on a GPU, days on two cores

`twelve` is a Llama of 2.5 million parameters: all of its 4096 assignments can be measured, which is the ground truth of
allocators. `llama`, `gemma` and `qwen` are the reference models: twelve blocks in the forms of Llama-3, Gemma-2 and
Qwen3, ten million parameters, every row of a weight a multiple of 256. All models learn from the English Wikipedia
articles in benchmarks/data, `twelve` from every fourth article. The articles of wikipedia-held-out.jsonl validate:
neither a model nor a tokenizer is trained on these articles.

Writes benchmarks/data/NAME: float16 weights, tokenizer, and training.json with the losses. The folder build/train keeps
tokens and tokenizer by size of the vocabulary, and for each model the last checkpoint and log.jsonl. An interrupted
training resumes, also after kill -9. The batch of a step is a function of the seed and the step, and the learning rate
is a function of the step and --tokens. So an interrupted run on CPUs ends with the same weights, bit by bit for the
same number of threads (OMP_NUM_THREADS); log.jsonl then repeats the steps since the last checkpoint. A GPU adds in no
fixed order: its weights differ from run to run.

Linear layers compute in bfloat16 under autocast unless --dtype says float32: processors without fast instructions for
bfloat16 are slower with it. Weights, optimiser and validation are float32.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from _common import DATA, WORK, command_line
from _training import CONTEXT, Recipe, Training
from _wikipedia import TokenisedArticles, tokenised_articles
from coopq.core.files import atomic_folder, locked, require_new_folder, write_json

COMMON: dict[str, Any] = {
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
REFERENCE: dict[str, Any] = {
    **COMMON,
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "head_dim": 64,
}


@dataclass(frozen=True)
class Architecture:
    """What is trained.

    Attributes:
        config: The model's configuration.
        peak: The highest learning rate.
        batch: Tokens of a step.
        short: As for `Recipe`.
        every: Distance between articles that are trained on, in the order of the text.
    """

    config: PretrainedConfig
    peak: float = 3e-3
    batch: int = 32768
    short: float = 0.0
    every: int = 1


ARCHITECTURES = {
    "twelve": Architecture(
        LlamaConfig(**COMMON, vocab_size=1024, hidden_size=128, intermediate_size=384),
        peak=4e-3,
        batch=8192,
        short=0.8,
        every=4,
    ),
    "llama": Architecture(LlamaConfig(**REFERENCE, rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
    "gemma": Architecture(Gemma2Config(**REFERENCE, query_pre_attn_scalar=64, sliding_window=256)),
    "qwen": Architecture(Qwen3Config(**REFERENCE)),
}
VALIDATION_STEPS, N_VALIDATION_WINDOWS = 250, 64
"""Steps between validations, and windows of a validation."""
LINE_SECONDS = 60.0
"""Time between lines of the log."""


def train(training: Training, text: TokenisedArticles, checkpoint_seconds: float) -> Iterator[dict[str, float]]:
    """Train to the end, with checkpoints; yields a line of the log each minute and at each validation."""
    some = text.windows[:: max(1, len(text.windows) // N_VALIDATION_WINDOWS)]
    saved = since = time.monotonic()
    losses: list[Tensor] = []
    while training.step < training.recipe.steps:
        losses.append(training.advance(text.train))
        last = training.step == training.recipe.steps
        validates = last or training.step % VALIDATION_STEPS == 0
        if validates or time.monotonic() - since > LINE_SECONDS:
            loss = float(torch.stack(losses).mean())  # waits for the device
            row = {
                "step": training.step,
                "tokens_per_second": len(losses) * training.recipe.batch / (time.monotonic() - since),
                "loss": loss,
            }
            if validates:
                row |= {f"validation_{key}": value for key, value in text.scores(training.model, some).items()}
            yield row
            losses, since = [], time.monotonic()
        if last or time.monotonic() - saved > checkpoint_seconds:
            training.save()
            saved = time.monotonic()


def save(training: Training, text: TokenisedArticles, out: Path) -> None:
    """Write the model folder in float16, read the folder again, and print the losses on the whole validation text."""
    scores = {"float32": text.scores(training.model, text.windows)}
    with atomic_folder(out) as folder:
        training.model.half().save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # safetensors lets nobody else read the file
        text.tokenizer.save_pretrained(folder)
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(training.model.device)
        scores["float16"] = text.scores(saved, text.windows)
        sample = text.tokenizer.decode(text.windows[0])
        if AutoTokenizer.from_pretrained(folder).encode(sample) != text.tokenizer.encode(sample):
            raise SystemExit("error: the saved tokenizer is not the one that was trained with")
        write_json(folder / "training.json", {**asdict(training.recipe), "validation": scores})
        shutil.rmtree(out, ignore_errors=True)  # an earlier model of this script: `main` checked that
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"{out}: {size:.2f} MB; validation on {text.windows.size:,} tokens, computed in float32:")
    for name, row in scores.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.5f}" for key, value in row.items()))


def main() -> None:
    """Train or resume, and write the model."""
    parser = command_line(__doc__)
    parser.add_argument("name", choices=ARCHITECTURES)
    parser.add_argument("--tokens", type=int, default=24_000_000, help="tokens to train on; repeats count")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first weights and of the order of the text")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="dtype of linear layers")
    parser.add_argument("--out", type=Path, help="model folder to write or replace (default: benchmarks/data/NAME)")
    parser.add_argument("--work", type=Path, default=WORK / "train", help="folder of tokens, checkpoints and logs")
    parser.add_argument("--checkpoint-seconds", type=float, default=120.0, help="time between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    architecture, out = ARCHITECTURES[arguments.name], arguments.out or DATA / arguments.name
    if not (out / "training.json").exists():
        require_new_folder(out)
    work = arguments.work / arguments.name
    work.mkdir(parents=True, exist_ok=True)
    with locked(work), (work / "log.jsonl").open("a") as log:
        vocabulary = architecture.config.vocab_size
        text = tokenised_articles(arguments.work / f"tokens-{vocabulary}", vocabulary, architecture.every, CONTEXT)
        recipe = Recipe(arguments.tokens, arguments.seed, arguments.dtype, architecture.batch, architecture.short)
        training = Training(architecture.config, architecture.peak, recipe, work, arguments.device)
        where = f"{torch.get_num_threads()} threads" if arguments.device == "cpu" else torch.cuda.get_device_name()
        print(f"step {training.step} of {training.recipe.steps}, {where}", flush=True)
        for row in train(training, text, arguments.checkpoint_seconds):
            print(", ".join(f"{key} {value:.6g}" for key, value in row.items()), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
        save(training, text, out)


if __name__ == "__main__":
    main()
