"""All methods in one table: checks, help texts and tables are made from the table.

A method turns a budget into a plan. A "search" measures losses of assignments that the method proposes, "walks" read
permutation walks, and a "score" looks at weights, activations or gradients alone.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from coopq.core.errors import EstimationError, hint
from coopq.core.goal import Limit
from coopq.core.sizes import Budget
from coopq.core.specs import SolverSpec
from coopq.core.subject import SizedRequest
from coopq.search.strategies.exhaustive import check_enumerable

if TYPE_CHECKING:
    from coopq.game.session import Session
    from coopq.plan.plan import Plan


@dataclass(frozen=True)
class Method:
    """One way from a budget to a plan.

    Attributes:
        name: What users write.
        kind: "search", "walks" or "score".
        summary: How the method decides, in a clause.
        cost: Forwards of the model over the calibration tokens, for five budgets of 30 blocks and two widths together;
            None where the number depends on the players (benchmarks: docs/results/allocators.md).
        path: Module and name of the strategy or of the score's function; None for methods that read walks.
        options: Keyword arguments of the strategy.
        cost_of_width: Forwards that each width beyond two adds, for scores of all widths in one pass.
        most_widths: Number of widths that the method can choose from; None for any number.
        learns: Whether the search fits what was measured before the search began.
        takes_prior: Whether the search starts from a gradient score of each step.
        is_anytime: Whether the search has an answer from its first losses on, so that a limit may end it.
        trusts_surrogate: Whether the search chooses what its surrogate predicts to be best, measured or not.
        takes_alpha: Whether the method solves the paper's program, with its alpha.
        proves: Whether the program is solved to proof. Programs with pair terms are not: a proof can take hours.
        scores_pairs: Whether the score has terms for pairs of steps too.
        is_at_once: Whether the score covers all widths in one pass, and scores embeddings and experts too.
        is_in_paper: Whether the paper compares with the method.
        is_compared: Whether `coopq compare` takes the method if none is named.
        whole_blocks: Whether players have to be whole blocks.
        watches_outputs: Whether the score looks at outputs of single linear layers, which experts in one tensor lack.
    """

    name: str
    kind: Literal["search", "walks", "score"]
    summary: str
    cost: int | None
    path: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    cost_of_width: int = 0
    most_widths: int | None = None
    learns: bool = False
    takes_prior: bool = False
    is_anytime: bool = False
    trusts_surrogate: bool = False
    takes_alpha: bool = False
    proves: bool = False
    scores_pairs: bool = False
    is_at_once: bool = False
    is_in_paper: bool = False
    is_compared: bool = False
    whole_blocks: bool = False
    watches_outputs: bool = False

    def load(self) -> Any:
        """The strategy, or the score's function."""
        assert self.path is not None, f"{self.name} has no code of its own"
        return _load(self.path)


def _search(name: str, summary: str, cost: int | None, path: str, **traits: Any) -> Method:
    """A search; its path leads into the folder of the strategies."""
    return Method(name, "search", summary, cost, f"coopq.search.strategies.{path}", **traits)


def _walks(name: str, summary: str, **traits: Any) -> Method:
    """A method that reads permutation walks between two widths."""
    return Method(name, "walks", summary, 328, most_widths=2, **traits)


def _score(name: str, summary: str, cost: int, path: str, **traits: Any) -> Method:
    """A score; its path leads into the folder of the scores."""
    return Method(name, "score", summary, cost, f"coopq.plan.scores.{path}", **{"proves": True, **traits})


_BASELINE = {"is_in_paper": True, "is_compared": True}
_ALL = (
    _search(
        "active",
        "a surrogate proposes, the true loss decides; the default",
        None,
        "active:ActiveSearch",
        learns=True,
        takes_prior=True,
        is_anytime=True,
        is_compared=True,
    ),
    _walks(
        "coopq",
        "the paper's method: Shapley values and their covariance from random walks, an integer program",
        takes_alpha=True,
        proves=True,
        is_compared=True,
    ),
    _walks("shapley", "the same walks without the covariance: a knapsack", proves=True, is_compared=True),
    _walks("interactions", "a surrogate fitted to the same walks", is_compared=True),
    _walks(
        "pruning",
        "the paper's ablation: walks that remove blocks instead of lowering their width",
        takes_alpha=True,
        proves=True,
        whole_blocks=True,
    ),
    _search(
        "greedy-down",
        "from the high width: what costs least by the byte is lowered first",
        291,
        "greedy:Greedy.paced",
        options={"direction": "down"},
    ),
    _search(
        "greedy-up",
        "from the low width: what gains most by the byte is raised first",
        267,
        "greedy:Greedy.paced",
        options={"direction": "up"},
    ),
    _search("evopress", "exchanges of widths, selected on more and more tokens", 602, "evolution:Evolution"),
    _search(
        "regression",
        "a quadratic fitted to random assignments that fill the budgets",
        170,
        "regression:Regression",
        learns=True,
        trusts_surrogate=True,
    ),
    _search(
        "cross-layer",
        "what each player and each pair of players costs (CLADO)",
        166,
        "cross_layer:CrossLayer",
        most_widths=2,
        trusts_surrogate=True,
    ),
    _search(
        "one-shot-high",
        "what each player costs when it alone is lowered",
        16,
        "one_shot:OneShot",
        options={"end": "high"},
        trusts_surrogate=True,
    ),
    _search(
        "one-shot-low",
        "what each player gains when it alone is raised",
        16,
        "one_shot:OneShot",
        options={"end": "low"},
        trusts_surrogate=True,
    ),
    _search("exact", "all assignments, of up to 14 players", None, "exhaustive:Enumeration"),
    _score(
        "fisher",
        "second order in the loss, all pairs of players, from gradients of each sequence",
        6,
        "fisher:terms",
        proves=False,
        scores_pairs=True,
        is_compared=True,
        watches_outputs=True,
    ),
    _score("llm-mq", "first-order sensitivity to rounding", 4, "llm_mq:gains_by_layer", **_BASELINE),
    _score("llm-mq-block", "the same: absolute value of a block's sum", 4, "llm_mq:gains_by_block", **_BASELINE),
    _score("lim", "how much a block changes its input", 1, "lim:gains", **_BASELINE),
    _score("zd", "the share of weights with a z-score above 1", 0, "zd:gains_one_sided", **_BASELINE),
    _score("zd-two-sided", "the same share above 1 or below -1", 0, "zd:gains_two_sided", **_BASELINE),
    _score("activation", "the norm of a block's output", 1, "activation:gains", **_BASELINE),
    _score("first-last", "distance from the middle: the ends keep more bits", 0, "first_last:gains"),
    _score("hawq", "traces of the Hessian times squared errors of weights", 64, "hawq:gains"),
    _score(
        "imatrix",
        "errors of weights weighted by squared inputs, as llama.cpp's importance matrix has it",
        1,
        "imatrix:gains",
        is_at_once=True,
    ),
    _score(
        "auto-quantize",
        "output errors weighted by squared gradients",
        7,
        "auto_quantize:gains_by_gradient",
        cost_of_width=1,
        is_at_once=True,
    ),
    _score("auto-quantize-kl", "KL of each player and width alone", 32, "auto_quantize:gains_by_divergence"),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}

_MAKERS = {
    "search": "coopq.plan.searches.by_search:plans_by_search",
    "walks": "coopq.plan.by_walks:plans_by_walks",
    "score": "coopq.plan.by_score:plans_by_score",
}


def make_plans(
    session: "Session", method: str, budgets: Sequence[Budget], solver: SolverSpec, limit: Limit | None = None
) -> "list[Plan]":
    """The plans of budgets by a method; a search takes all budgets at once and shares what the search measures.

    Args:
        session: The session.
        method: Name of the method.
        budgets: The budgets.
        solver: How programs are solved.
        limit: When to end early, for searches that have an answer at any time.
    Raises:
        EstimationError: If the method is unknown, or cannot end early.
    """
    found = get_method(method)
    if limit is not None and not found.is_anytime:
        raise EstimationError(f"method {method!r} cannot answer before its end; leave the limit out")
    plans: list[Plan] = _load(_MAKERS[found.kind])(session, found, budgets, solver, *([limit] if limit else []))
    return plans


def names(**traits: Any) -> tuple[str, ...]:
    """Names of the methods with some values of attributes: `names(kind="score", is_in_paper=True)`."""
    return tuple(
        method.name
        for method in METHODS.values()
        if all(getattr(method, trait) == value for trait, value in traits.items())
    )


def get_method(name: str) -> Method:
    """The method of a name.

    Raises:
        EstimationError: If the name is unknown.
    """
    if name not in METHODS:
        raise EstimationError(f"method {name!r} is unknown; {hint(name, METHODS)}")
    return METHODS[name]


def _load(path: str) -> Any:
    """What a path "module:name" leads to. Methods are imported when they are used, so that help needs no torch."""
    module, _, name = path.partition(":")
    return attrgetter(name)(importlib.import_module(module))


def check_methods(methods: Sequence[str], asked: SizedRequest) -> None:
    """Check that methods can choose the widths of players, before any weights are quantized.

    Raises:
        EstimationError: If a method is unknown or cannot.
    """
    players, player_widths, n_widths = asked.players, asked.player_widths, len(asked.request.widths.bits)
    one_width = next((player.name for player, own in zip(players, player_widths, strict=True) if len(own) == 1), None)
    for method in map(get_method, methods):
        if method.most_widths is not None and n_widths > method.most_widths:
            raise EstimationError(
                f"method {method.name!r} chooses between {method.most_widths} widths, and {n_widths} are given; take "
                "two, or another method: 'active'"
            )
        if method.most_widths is not None and one_width is not None:
            raise EstimationError(
                f"method {method.name!r} chooses between two widths of every player, and {one_width} has one of them "
                "only; take other widths, or another method: 'active'"
            )
        if method.kind == "score" and not method.is_at_once and any(player.is_end for player in players):
            raise EstimationError(
                f"method {method.name!r} scores layers in blocks, not embeddings; take a search, or use --no-embeddings"
            )
        experts = [linear.name for player in players for linear in player.linears if linear.n_experts]
        if method.watches_outputs and experts:
            raise EstimationError(
                f"method {method.name!r} looks at outputs of single layers, and {experts[0]} holds several experts; "
                "take another method: 'active'"
            )
        if (method.name, asked.request.model.dtype) == ("hawq", "bfloat16"):
            raise EstimationError("hawq needs --dtype float32 or float16: its steps are lost in bfloat16")
        if method.name == "exact":
            check_enumerable(player_widths)
        if method.whole_blocks and len({player.block for player in players}) < len(players):
            raise EstimationError(
                f"method {method.name!r} removes whole blocks; use --granularity block, or take another method"
            )
