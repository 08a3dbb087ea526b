"""Plans made by hand, for models that are to be saved."""

from collections.abc import Sequence
from typing import Any

from coopq.quantize import get_backend
from coopq.quantize.bank import measure_storage
from coopq.plan.plan import Plan, PlayerPlan, Solver
from coopq.model.players import find_players
from coopq.core.config import RunConfig
from coopq.core.types import Width


def plan_for(
    model: Any,
    backend: str,
    group_size: int | None,
    bits: Sequence[Width],
    granularity: str = "block",
    embeddings: bool = False,
) -> Plan:
    players = find_players(model, granularity, embeddings)
    storage = measure_storage(players, get_backend(backend, group_size=group_size), sorted(set(bits)))
    return Plan(
        method="coopq",
        alpha=0.5,
        budget="3avg",
        budget_bytes=storage.bytes_of(bits),
        bytes=storage.bytes_of(bits),
        untouched_bytes=storage.untouched_bytes(bits),
        average_bits=storage.average_bits(bits),
        bits_per_weight=storage.bits_per_weight(bits),
        players=tuple(
            PlayerPlan(player.name, width, tuple(linear.name for linear in player.linears), 0.0, 0.0)
            for player, width in zip(players, bits, strict=True)
        ),
        solver=Solver("optimal", 0.0, 0.0, 0.0),
        predicted_loss=0.0,
        measured_loss=None,
        config=RunConfig(
            "tiny", backend=backend, group_size=group_size, granularity=granularity, embeddings=embeddings
        ).to_json(),
        fingerprint={"weights": "", "dtype": str(model.dtype).removeprefix("torch.")},
        layer_forwards=1,
        layer_forwards_unshared=1,
    )
