"""A request checked before any weight is loaded: the layers of the model, their sizes, the memory that a run takes."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coopq.core.errors import OutOfMemory
from coopq.core.sizes import Budget
from coopq.core.specs import Request
from coopq.core.subject import SizedRequest
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width, silent
from coopq.model.load import LoadedModel, load_model, load_skeleton, max_positions, pick_device
from coopq.model.memory import Footprint, free_memory, gib
from coopq.model.offload import OffloadedBlocks
from coopq.model.players import find_players, warn_of_weights_outside
from coopq.model.texts import check_length, check_text
from coopq.quantizers import get_backend
from coopq.quantizers.backend import Backend, ModelQuantizer
from coopq.quantizers.sizes import OUR_FILE, Target, packed_bytes

_log = logging.getLogger(__name__)
_GROUP_SIZES = (64, 32)
"""Group sizes that engines have kernels for, below the 128 of GPTQ."""


@dataclass(frozen=True)
class Prepared(SizedRequest):
    """A request that passed every check that needs no weights.

    Attributes:
        skeleton: The model without storage, in the dtype that it will compute in.
        backend: What quantizes.
        device: Where the model computes.
        target: The file that plans are made for.
    """

    skeleton: Any
    backend: Backend
    device: torch.device
    target: Target

    def check_budgets(self, budgets: Sequence[Budget]) -> None:
        """Check that budgets are feasible.

        Raises:
            InfeasibleBudget: With the smallest and the largest feasible budget.
        """
        bits = self.request.widths.bits
        for budget in budgets:
            self.sizes.limit(budget, bits)
            if self.sizes.holds_all(budget, bits):
                _log.warning("budget %s holds all layers at their widest: there is nothing to choose", budget.text)

    @property
    def footprint(self) -> Footprint:
        """What measuring this request takes."""
        text, widths, diverges = self.request.text, self.request.widths.quantized, self.request.search.loss == "kl"
        own = zip(self.players, self.player_widths, strict=True)
        bank = sum(
            packed_bytes(self.backend, player, width) for player, each in own for width in each if width in widths
        )
        return Footprint.estimate(self.skeleton, self.players, text, self.device.type, len(widths), bank, diverges)

    def fit(self) -> tuple[Footprint, int | None]:
        """Check that the run fits into memory; returns the memory that it needs, and the free bytes, None if unknown.

        Raises:
            OutOfMemory: If the run does not fit, with the setting that would fit.
        """
        needed, free = self.footprint, free_memory(self.request.model.device)
        needed.check(free)
        if not needed.must_offload(free):
            return needed, free
        must = f"{needed}, and {gib(free)} are free: blocks must stay on the host"
        if self.request.widths.embeddings:
            raise OutOfMemory(f"{must}, and then the embedding is no player; use --no-embeddings")
        if isinstance(self.backend, ModelQuantizer):
            raise OutOfMemory(
                f"{must}, and backend {self.backend.name!r} needs the whole model on the GPU; use rtn, hqq or ggml"
            )
        return needed, free

    def load(self, progress: ProgressCallback = silent, *, on_host: bool = False) -> LoadedModel:
        """Load the weights; `on_host` leaves the weights in the host's memory."""
        progress("loading the model", 0, 1)
        spec = self.request.model
        loaded = load_model(spec.source, dtype=spec.dtype, device=spec.device, on_host=on_host)
        progress("loading the model", 1, 1)
        return loaded

    def load_to_measure(
        self, must_offload: bool, progress: ProgressCallback = silent
    ) -> tuple[LoadedModel, OffloadedBlocks | None]:
        """Load the weights, and the blocks that stay on the host if they must."""
        loaded = self.load(progress, on_host=must_offload)
        return loaded, OffloadedBlocks(loaded.model, self.device) if must_offload else None


def prepare(request: Request, *, target: Target = OUR_FILE, judge_length: int = 0) -> Prepared:
    """Check a request and look at the model without its weights.

    Args:
        request: What is asked for.
        target: The file that plans are made for.
        judge_length: Tokens of the windows that assignments will be judged on, if they will be.
    Raises:
        CoopQError: Naming what is wrong.
    """
    check_text(request.text)
    backend, skeleton, found = _look(request, request.widths.bits)
    backend.check_text(request.text)
    check_length(max(request.text.sequence_length, judge_length), max_positions(skeleton))
    players, sizes = target.fit(request, skeleton, found, backend)
    warn_of_weights_outside(skeleton, players)
    sizes.player_widths(request.widths.bits)  # refuses widths that no player has
    return Prepared(request, tuple(players), sizes, skeleton, backend, pick_device(request.model.device), target)


def _look(request: Request, required: Sequence[Width]) -> tuple[Backend, Any, Sequence[Player]]:
    """The backend, which has to have some widths, the model without storage, and all its players."""
    spec, widths = request.model, request.widths
    backend = get_backend(request.quantizer, required)
    skeleton = load_skeleton(spec.source, dtype=spec.dtype, device=spec.device)
    return backend, skeleton, find_players(skeleton, widths.granularity, widths.embeddings, widths.routers)


def usable_bits(request: Request, target: Target = OUR_FILE) -> tuple[Width, ...]:
    """The widths of a request that are of use to some player: recipes name more than every backend and model has.

    Args:
        request: The request.
        target: The file that plans are made for.
    """
    backend, skeleton, players = _look(request, ())
    had = {width for player in players for linear in player.linears for width in backend.widths_of(linear.shape)}
    bits = tuple(width for width in request.widths.bits if width == UNTOUCHED or width in had)
    _, sizes = target.fit(request.replace(bits=bits), skeleton, players, backend)
    return sizes.usable_widths(bits)


def whole_group_size(request: Request) -> int | None:
    """The largest group size that divides all rows, if the backend's own does not and the target form packs rows.

    None if the backend's own size is right, if a size was asked for, or if no size fits.
    """
    if request.target.form is None or request.quantizer.group_size is not None:
        return None
    backend, _, players = _look(request, ())
    if not isinstance(own := backend.settings.get("group_size"), int):
        return None
    columns = math.gcd(*(linear.shape[1] for player in players for linear in player.linears))
    return None if columns % own == 0 else next((size for size in _GROUP_SIZES if columns % size == 0), None)
