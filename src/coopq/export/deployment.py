"""Deploys a plan with another quantizer than the one it was measured with."""

from collections.abc import Sequence

from msgspec.structs import replace

from coopq.core.errors import InfeasibleBudget
from coopq.core.sizes import Budget
from coopq.core.spec_base import spec_options
from coopq.core.specs import QuantizerSpec, Request
from coopq.core.subject import SizedRequest
from coopq.core.types import UNTOUCHED, Width
from coopq.plan.plan import Plan
from coopq.quantizers.packed_modules import PackedWeights


def deployed_request(request: Request, deployment: QuantizerSpec, assignment: Sequence[Width]) -> Request:
    """The request of a plan that another quantizer deploys, with the widths that the plan and its budget need."""
    widths = {*assignment, request.widths.low, request.widths.high}
    if not PackedWeights(deployment).backend.calibrated:
        request = request.replace(fit_tokens=None)
    return request.replace(**spec_options(deployment), bits=tuple(widths))


def resized(plan: Plan, deployed: SizedRequest) -> Plan:
    """The plan with the sizes of the backend that deploys it.

    Raises:
        InfeasibleBudget: If the deployed weights exceed the plan's budget.
    """
    sizes, limit = deployed.sizes, plan.budget_bytes
    n_bytes = sizes.total_bytes(plan.assignment)
    if n_bytes > limit:  # as many average bits may be more bytes by this backend
        limit = sizes.limit(Budget.parse(plan.budget), deployed.request.widths.bits)
    if n_bytes > limit:
        raise InfeasibleBudget(
            f"with backend {plan.quantizer.backend!r} the weights take {n_bytes} bytes, but the budget {plan.budget} "
            f"allows {limit} bytes; allocate a smaller budget, or search with that backend"
        )
    players = [replace(player, n_bytes=sizes.bytes_by_width(index)) for index, player in enumerate(plan.players)]
    return plan.replace(
        players=tuple(players),
        bytes=n_bytes,
        file_bytes=sizes.file_bytes(plan.assignment),
        untouched_bytes=sizes.untouched_bytes(plan.assignment) if UNTOUCHED in plan.assignment else 0,
        budget_bytes=limit,
        bits_per_weight=sizes.bits_per_weight(plan.assignment),
    )
