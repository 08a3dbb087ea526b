"""A model in training: its recipe, its steps and its checkpoints."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PretrainedConfig

from coopq.core.files import atomic_file, read_json, write_json
from coopq.model.safetensors_io import load_tensors, save_tensors

CONTEXT, SHORT = 512, 128
"""Tokens of a window, and of a window in the first part of a training."""
WARMUP_STEPS, WEIGHT_DECAY, CLIP = 300, 0.1, 1.0


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, besides this file.

    Attributes:
        tokens: Tokens to train on; repeats count.
        seed: Seed of the first weights and of the order of the text.
        dtype: What linear layers compute in.
        batch: Tokens of a step.
        short: Share of the steps, from the first on, that see windows of `SHORT` tokens: attention costs less there.
    """

    tokens: int
    seed: int
    dtype: str
    batch: int
    short: float

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return max(1, self.tokens // self.batch)

    def learning_rate(self, step: int) -> float:
        """The learning rate as a share of the highest: a linear warmup, then a cosine to zero."""
        warmup = min(WARMUP_STEPS, self.steps // 10 + 1)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def windows(self, step: int, stream: npt.NDArray[np.uint16]) -> Tensor:
        """Windows that start anywhere in the stream, each with the token after it, shape (n, length + 1)."""
        length = SHORT if step < self.short * self.steps else CONTEXT
        random = np.random.default_rng((self.seed, step))
        starts = random.integers(len(stream) - length, size=self.batch // length)
        return torch.from_numpy(stream[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def next_token_loss(model: Any, windows: Tensor) -> Tensor:
    """Loss of windows of shape (n, length + 1), nats per token, a scalar."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


class Training:
    """A model in training, with its optimiser; a checkpoint in the work folder is restored.

    Args:
        config: The model's configuration.
        peak: The highest learning rate.
        recipe: What else decides the weights.
        work: Folder of the checkpoints.
        device: "cpu" or "cuda".

    Attributes:
        recipe: The recipe.
        step: Number of steps done.
        model: The model.
    """

    def __init__(self, config: PretrainedConfig, peak: float, recipe: Recipe, work: Path, device: str) -> None:
        self.recipe, self.step, self._work = recipe, 0, work
        self._peak = peak
        torch.manual_seed(recipe.seed)
        self.model: Any = AutoModelForCausalLM.from_config(config).to(device)
        self._loss = (
            torch.compile(next_token_loss) if device == "cuda" else next_token_loss
        )  # on CPUs it gains 15 % at most
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
        """Take one step; returns the loss of the step, nats per token, a scalar."""
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
        """Write a checkpoint: the tensors, then the JSON that names the file of the tensors. Older tensors go last."""
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
            raise SystemExit(
                f"error: {self._work} trains {checkpoint['recipe']}; use the same options, or another --work"
            )
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
