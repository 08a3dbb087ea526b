"""Losses of a folder in AutoRound's form, in a process of its own: the library takes over logging.

python -m coopq.export.folders.auto_round_process < REQUEST
"""

import json
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from coopq.export.verification import token_losses


def main() -> None:
    """Answer the request of `AutoRound.losses` on the standard input."""
    request = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float16).eval()
    losses = token_losses(model, np.array(request["tokens"]), "the exported model")
    print(json.dumps(losses.tolist()))  # noqa: T201


if __name__ == "__main__":
    main()
