"""OpenVINO models in full precision without Optimum, and the losses that OpenVINO computes.

The models keep no KV cache. They give the logits of whole sequences, and losses need no more.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import openvino
from coopq.game.losses import sequence_nll

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Settings for float32. By default OpenVINO computes in bfloat16 where it can, and rounds activations to 8 bits."""


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def save_openvino(model: Any, folder: Path) -> None:
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Logits(model), (torch.ones(2, 8, dtype=torch.int64),), dynamic_shapes=(free,))
        graph = openvino.convert_model(program)
    openvino.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)


def openvino_nll(folder: Path, tokens: npt.NDArray[np.int64], **settings: str) -> npt.NDArray[np.float64]:
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings)
    return sequence_nll(torch.from_numpy(compiled([tokens])[0]), torch.from_numpy(tokens))
