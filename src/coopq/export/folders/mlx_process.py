"""mlx-lm, in a process of its own: when mlx-lm is imported, it changes limits of the process.

python -m coopq.export.folders.mlx_process < REQUEST
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coopq.core.errors import ExportError
from coopq.core.types import Losses
from coopq.export.folders.library_process import answer_of


def is_installed() -> bool:
    """Whether mlx-lm is installed."""
    return importlib.util.find_spec("mlx_lm") is not None


def mlx_losses(folder: Path, tokens: npt.NDArray[np.int64] | None) -> Losses:
    """Negative log-likelihood of each token but the first by mlx-lm, in float32, nats, shape (length - 1,).

    Args:
        folder: A model that mlx-lm loads.
        tokens: Shape (1, length); None only loads the model, without reading its weights.
    Raises:
        ExportError: If mlx-lm cannot load the model, or cannot compute.
    """
    request = {"folder": str(folder), "tokens": None if tokens is None else tokens.tolist()}
    try:
        return np.array(answer_of(__name__, request), dtype=np.float64)
    except RuntimeError as error:
        raise ExportError(
            f"mlx-lm cannot load the exported model ({error}); choose another engine (--for), or another form (--to)"
        ) from error


def main() -> None:
    """Answer the request of `mlx_losses` on the standard input."""
    import mlx.core as mx
    from mlx.nn.losses import cross_entropy
    from mlx_lm.utils import load_model

    request, losses = json.load(sys.stdin), []
    try:
        model, _ = load_model(Path(request["folder"]), lazy=True)
        if request["tokens"] is not None:
            model.set_dtype(mx.float32)
            ids = mx.array(request["tokens"])
            losses = cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none").tolist()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        sys.exit(" ".join(str(error).split())[:300])
    print(json.dumps(losses))  # noqa: T201


if __name__ == "__main__":
    main()
