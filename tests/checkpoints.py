"""Plans made by hand, and models saved by them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.specs import Request
from coopq.core.types import Width
from coopq.export.checkpoint import Source, save_model
from coopq.model.load import LoadedModel
from coopq.model.players import find_players
from coopq.model.texts import TokenSet
from coopq.plan.plan import Plan, PlayerPlan, Solver
from coopq.quantizers import get_backend
from coopq.quantizers.sizes import packed_sizes


class Tokenizer:
    """Stands for a tokenizer where a model is fed tokens: saving needs the method alone."""

    def save_pretrained(self, folder: Path) -> None:
        """Write a file that a tokenizer writes."""
        (folder / "tokenizer.json").write_text("{}")


def plan_for(
    model: Any,
    backend: str,
    group_size: int | None,
    bits: Sequence[Width],
    granularity: str = "block",
    embeddings: bool = False,
) -> Plan:
    """A plan that gives each player of a model the width in `bits`."""
    request = Request.from_options(
        model="tiny", backend=backend, group_size=group_size, granularity=granularity, embeddings=embeddings
    )
    players = find_players(model, granularity, embeddings)
    sizes = packed_sizes(players, get_backend(request.quantizer), sorted(set(bits)))
    return Plan(
        method="coopq",
        alpha=0.5,
        budget="3avg",
        budget_bytes=sizes.total_bytes(bits),
        bytes=sizes.total_bytes(bits),
        file_bytes=sizes.file_bytes(bits),
        untouched_bytes=sizes.untouched_bytes(bits),
        average_bits=sizes.average_bits(bits),
        bits_per_weight=sizes.bits_per_weight(bits),
        players=tuple(
            PlayerPlan(
                name=player.name,
                bits=width,
                modules=tuple(linear.name for linear in player.linears),
                score=0.0,
                stderr=0.0,
                block=player.block,
                n_weights=player.n_weights,
                n_bytes=sizes.bytes_by_width(index),
            )
            for index, (player, width) in enumerate(zip(players, bits, strict=True))
        ),
        solver=Solver("optimal", 0.0, 0.0, 0.0),
        predicted_loss=0.0,
        measured_loss=None,
        request=request,
        fingerprint={"weights": "", "dtype": str(model.dtype).removeprefix("torch.")},
        block_forwards=1,
        block_forwards_unshared=1,
    )


def save(loaded: LoadedModel, plan: Plan, out: Path, tokens: npt.NDArray[np.int64] | None = None) -> Plan:
    """Quantize a model by a plan and save the model.

    Args:
        loaded: The model.
        plan: The plan.
        out: The folder to write.
        tokens: Tokens that weights are fitted to and that the saved loss is measured on, shape (n_sequences, length).
    """
    widths = plan.request.widths
    seen = None if tokens is None else TokenSet(tokens, "a test", bos=False)
    source = Source(
        loaded=loaded,
        players=find_players(loaded.model, widths.granularity, widths.embeddings),
        backend=get_backend(plan.quantizer),
        fitting=seen,
        calibration=seen,
    )
    return save_model(source, plan, out)
