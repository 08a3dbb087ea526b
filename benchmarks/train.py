"""Trains the models that benchmarks measure where none of their kind is small enough.

    nice python benchmarks/train.py twelve                        # 45 minutes on two cores
    nice python benchmarks/train.py llama --tokens 130000000      # five minutes on a GPU, days on two cores

`twelve` is a Llama of 2.5 million parameters whose 4096 assignments can all be measured: the ground truth of
allocators. `llama`, `gemma` and `qwen` are the reference models: twelve blocks in the forms of Llama-3, Gemma-2 and
Qwen3, ten million parameters, every row of a weight a multiple of 256. They learn from the English Wikipedia articles
in benchmarks/data, `twelve` from every fourth. The articles of wikipedia-held-out.jsonl validate: neither a model nor a
tokenizer is trained on them.

Writes benchmarks/data/NAME (float16 weights, tokenizer, training.json with the losses), and works in build/train:
tokens and tokenizer by size of the vocabulary, and for each model the last checkpoint and log.jsonl. It resumes, also
after kill -9. The batch of a step is a function of the seed and the step, its learning rate of the step and --tokens,
so that an interrupted run on CPUs ends with the same weights, bit by bit for the same number of threads
(OMP_NUM_THREADS); log.jsonl then repeats the steps since the last checkpoint. A GPU adds in no fixed order: its weights
differ from run to run.

Linear layers compute in bfloat16 under autocast unless --dtype says float32: processors without fast instructions for
bfloat16 are slower with it. Weights, optimiser and validation are float32.
"""

import argparse
import json
import lzma
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from coopq.game.prefix_engine import model_nll
from coopq.core.files import atomic_file, atomic_folder, locked, read_json, require_new_folder, write_json
from coopq.model.safetensors_io import load_tensors, save_tensors

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "benchmarks" / "data" / "wikipedia-en-2015.txt.xz"
DATA, WORK = ROOT / "benchmarks" / "data", ROOT / "build" / "train"
HELD_OUT = DATA / "wikipedia-held-out.jsonl"
TWELVE = DATA / "twelve"
END, CONTEXT = "<|endoftext|>", 512
WARMUP_STEPS, WEIGHT_DECAY, CLIP = 300, 0.1, 1.0
SHORT = 128
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
        short: The part of the steps, the first ones, that sees a quarter of the context, where attention costs little.
        every: The distance between articles that are trained on, in the order of the text.
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
VALIDATION_STEPS, VALIDATION_WINDOWS = 250, 64
LINE_SECONDS = 60.0


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, beside this file.

    Attributes:
        tokens: To train on, repeats counted.
        seed: Of the first weights and the order of the text.
        dtype: Of linear layers.
        batch: Tokens of a step.
        short: As of `Architecture`.
    """

    tokens: int
    seed: int
    dtype: str
    batch: int
    short: float

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return max(1, self.tokens // self.batch)

    def learning_rate(self, step: int) -> float:
        """As a share of the highest: a linear warmup, then a cosine to zero."""
        warmup = min(WARMUP_STEPS, self.steps // 10 + 1)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def windows(self, step: int, stream: npt.NDArray[np.uint16]) -> Tensor:
        """Windows of the stream that start anywhere, each with the token after it."""
        length = SHORT if step < self.short * self.steps else CONTEXT
        random = np.random.default_rng((self.seed, step))
        starts = random.integers(len(stream) - length, size=self.batch // length)
        return torch.from_numpy(stream[starts[:, None] + np.arange(length + 1)].astype(np.int64))


@dataclass(frozen=True)
class Text:
    """The tokenised articles, each followed by the token of its end, and how validation is scored.

    Attributes:
        train: What is trained on.
        windows: The validation articles in windows of the whole context; an incomplete last one is dropped.
        bytes_per_token: Of the validation articles.
        tokenizer: In the form of transformers.
    """

    train: npt.NDArray[np.uint16]
    windows: npt.NDArray[np.int64]
    bytes_per_token: float
    tokenizer: Any

    def scores(self, model: Any, windows: npt.NDArray[np.int64]) -> dict[str, float]:
        """Nats per token, perplexity and bits per byte of windows."""
        nll = float(np.concatenate(list(model_nll(model, windows))).mean())
        return {"nll": nll, "perplexity": math.exp(nll), "bits_per_byte": nll / math.log(2) / self.bytes_per_token}


def read_text(work: Path, vocabulary: int, every: int) -> Text:
    """The text as tokens, tokenised at the first call."""
    work.mkdir(parents=True, exist_ok=True)
    validation = work / "validation.npy"
    if not validation.exists():  # written last
        tokenise(work, vocabulary, every)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"), eos_token=END, model_max_length=CONTEXT
    )
    held_out = np.load(validation).astype(np.int64)
    n_bytes = len(tokenizer.decode(held_out, skip_special_tokens=True).encode())
    windows = held_out[: len(held_out) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    return Text(np.load(work / "train.npy"), windows, n_bytes / len(held_out), tokenizer)


def held_out_articles() -> list[str]:
    """The articles that validate."""
    return [json.loads(line)["text"] for line in HELD_OUT.read_text().splitlines()]


def tokenise(work: Path, vocabulary: int, every: int) -> None:
    """Train the tokenizer, unless it is there, and write the tokens of both parts of the text."""
    validation = held_out_articles()
    articles = lzma.decompress(TEXT.read_bytes()).decode().split("\n\n\n")[::every]
    training = [article for article in articles if article not in set(validation)]
    if not (work / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(training, trainer)
        with atomic_file(work / "tokenizer.json") as path:
            tokenizer.save(str(path))
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    for name, part in ("train", training), ("validation", validation):
        ids = [token for encoding in tokenizer.encode_batch_fast(part) for token in (*encoding.ids, 0)]
        print(f"{name}: {len(part)} articles, {len(ids):,} tokens", flush=True)
        with atomic_file(work / f"{name}.npy") as path, path.open("wb") as handle:
            np.save(handle, np.array(ids, dtype=np.uint16))


def next_token_loss(model: Any, windows: Tensor) -> Tensor:
    """Nats per token, a scalar, of windows of shape (sequences, length + 1)."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


class Training:
    """The model, its optimiser and the next step, which checkpoints restore."""

    def __init__(self, architecture: Architecture, recipe: Recipe, work: Path, device: str) -> None:
        self.recipe, self.step, self._work = recipe, 0, work
        self._peak = architecture.peak
        torch.manual_seed(recipe.seed)
        self.model: Any = AutoModelForCausalLM.from_config(architecture.config).to(device)
        self._loss = torch.compile(next_token_loss) if device == "cuda" else next_token_loss  # 15 % on CPUs, no more
        self._parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        groups: list[dict[str, Any]] = [
            {"params": [tensor for tensor in self._parameters.values() if tensor.dim() > 1]},
            {"params": [tensor for tensor in self._parameters.values() if tensor.dim() == 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
        if self._checkpoint.exists():
            self._restore()

    @property
    def _checkpoint(self) -> Path:
        return self._work / "checkpoint.json"

    def advance(self, stream: npt.NDArray[np.uint16]) -> Tensor:
        """Take one step; returns its loss, a scalar."""
        device = self.model.device
        windows = self.recipe.windows(self.step, stream).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"):
            loss: Tensor = self._loss(self.model, windows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak * self.recipe.learning_rate(self.step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Write a checkpoint: the tensors, then the JSON that names their file, then remove older tensors."""
        tensors = {f"model.{name}": tensor.detach() for name, tensor in self._parameters.items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        current = self._work / f"step-{self.step}.safetensors"
        with atomic_file(current) as path:
            save_tensors(tensors, path)
        write_json(self._checkpoint, {"recipe": asdict(self.recipe), "step": self.step, "tensors": current.name})
        for other in self._work.glob("step-*.safetensors"):
            if other != current:
                other.unlink()

    def _restore(self) -> None:
        checkpoint = read_json(self._checkpoint)
        if checkpoint["recipe"] != asdict(self.recipe):
            raise SystemExit(f"error: {self._work} trains {checkpoint['recipe']}; use the same, or another --work")
        states: dict[int, dict[str, Tensor]] = {}
        start_over = f"delete {self._checkpoint} to start over"
        for key, tensor in load_tensors(self._work / checkpoint["tensors"], way_out=start_over).items():
            kind, name = key.split(".", 1)
            if kind == "model":
                self._parameters[name].data.copy_(tensor)
            else:
                index, name = name.split(".")
                states.setdefault(int(index), {})[name] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})
        self.step = checkpoint["step"]


def train(training: Training, text: Text, checkpoint_seconds: float) -> Iterator[dict[str, float]]:
    """Train to the end, with checkpoints; yields what is to be reported, a minute or a validation at a time."""
    some = text.windows[:: max(1, len(text.windows) // VALIDATION_WINDOWS)]
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
                row |= {f"validation_{key}": v for key, v in text.scores(training.model, some).items()}
            yield row
            losses, since = [], time.monotonic()
        if last or time.monotonic() - saved > checkpoint_seconds:
            training.save()
            saved = time.monotonic()


def ship(training: Training, text: Text, out: Path) -> None:
    """Write the model folder in float16, read it again, and print the losses on the whole validation text."""
    scores = {"float32": text.scores(training.model, text.windows)}
    with atomic_folder(out) as folder:
        training.model.half().save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
        text.tokenizer.save_pretrained(folder)
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(training.model.device)
        scores["float16"] = text.scores(saved, text.windows)
        sample = text.tokenizer.decode(text.windows[0])
        if AutoTokenizer.from_pretrained(folder).encode(sample) != text.tokenizer.encode(sample):
            raise SystemExit("error: the saved tokenizer is not the one that was trained with")
        write_json(folder / "training.json", {**asdict(training.recipe), "validation": scores})
        shutil.rmtree(out, ignore_errors=True)  # an earlier one; `main` saw to that
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"{out}: {size:.2f} MB; validation on {text.windows.size:,} tokens, computed in float32:")
    for name, row in scores.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.5f}" for key, value in row.items()))


def main() -> None:
    """Train, or go on training, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ARCHITECTURES)
    parser.add_argument("--tokens", type=int, default=24_000_000, help="to train on, repeats counted")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the order of the text")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of linear layers")
    parser.add_argument(
        "--out", type=Path, help="model folder to write, or write over; benchmarks/data/NAME unless named"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder of tokens, checkpoints and logs")
    parser.add_argument("--checkpoint-seconds", type=float, default=120.0, help="between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    architecture, out = ARCHITECTURES[arguments.name], arguments.out or DATA / arguments.name
    if not (out / "training.json").exists():
        require_new_folder(out)
    work = arguments.work / arguments.name
    work.mkdir(parents=True, exist_ok=True)
    with locked(work), (work / "log.jsonl").open("a") as log:
        vocabulary = architecture.config.vocab_size
        text = read_text(arguments.work / f"tokens-{vocabulary}", vocabulary, architecture.every)
        recipe = Recipe(arguments.tokens, arguments.seed, arguments.dtype, architecture.batch, architecture.short)
        training = Training(architecture, recipe, work, arguments.device)
        where = f"{torch.get_num_threads()} threads" if arguments.device == "cpu" else torch.cuda.get_device_name()
        print(f"step {training.step} of {training.recipe.steps}, {where}", flush=True)
        for row in train(training, text, arguments.checkpoint_seconds):
            print(", ".join(f"{key} {value:.6g}" for key, value in row.items()), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
        ship(training, text, out)


if __name__ == "__main__":
    main()
