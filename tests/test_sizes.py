import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coopq.core.errors import BudgetError, InfeasibleBudget, UnsupportedBits
from coopq.core.sizes import Budget, Sizes
from coopq.core.types import Width
from coopq.judge.references import random_assignments
from coopq.model.players import find_players
from coopq.quantizers.rtn import RTNBackend
from coopq.quantizers.sizes import packed_sizes
from tests.architectures import tiny_model

SIZES = Sizes(n_weights=(800, 1600, 2400), n_bytes={2: (250, 500, 750), 4: (450, 900, 1350)})


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("2.5avg", "2.5", "avg"), (" 2.8 bpw ", "2.8", "bpw"), ("40MiB", "40", "MiB"), ("1.4GB", "1.4", "GB")],
)
def test_budgets_are_parsed(text: str, value: str, unit: str) -> None:
    assert Budget.parse(text) == Budget(value + unit, Fraction(value), unit)


@pytest.mark.parametrize("text", ["", "2.5", "avg", "-2avg", "2.5 bits", "nanbpw", "1e3MiB", "2.5avg3"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="cannot be read"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("2avg", 1500),
        ("4avg", 2700),
        ("2.5avg", 1800),
        ("3bpw", 1800),
        ("2000B", 2000),
        ("2.5kB", 2500),
        ("2KiB", 2048),
    ],
)
def test_limits_in_bytes(text: str, limit: int) -> None:
    assert SIZES.limit(Budget.parse(text), (2, 4)) == limit


@pytest.mark.parametrize(
    ("text", "smallest", "largest"),
    [
        ("1.9avg", "2avg = 2.5bpw = 1500B", "4avg = 4.5bpw = 2700B"),
        ("4.1avg", "2avg = 2.5bpw = 1500B", "4avg = 4.5bpw = 2700B"),
        ("2.4bpw", "2.5bpw = 2avg = 1500B", "4.5bpw = 4avg = 2700B"),
        ("4.6bpw", "2.5bpw = 2avg = 1500B", "4.5bpw = 4avg = 2700B"),
        ("1499B", "1500B = 2avg = 2.5bpw", "2700B = 4avg = 4.5bpw"),
        ("1.4kB", "1.5kB = 2avg = 2.5bpw = 1500B", "2.7kB = 4avg = 4.5bpw = 2700B"),
        ("1KiB", "1.4649KiB = 2avg = 2.5bpw = 1500B", "2.6367KiB = 4avg = 4.5bpw = 2700B"),
    ],
)
def test_an_infeasible_budget_names_the_feasible_ones(text: str, smallest: str, largest: str) -> None:
    with pytest.raises(InfeasibleBudget, match=f"the smallest is {smallest}, the largest {largest}$"):
        SIZES.limit(Budget.parse(text), (2, 4))


def test_a_file_may_be_larger_than_the_widest_weights() -> None:
    widest = SIZES.limit(Budget.parse("4avg"), (2, 4))
    for text, holds_all in (("1MiB", True), (f"{widest}B", True), (f"{widest - 1}B", False), ("4avg", False)):
        assert SIZES.holds_all(Budget.parse(text), (2, 4)) == holds_all
        assert SIZES.limit(Budget.parse(text), (2, 4)) <= widest


def test_the_named_extremes_are_feasible() -> None:
    for text in ("1500B", "2700B", "2.5bpw", "4.5bpw", "2avg", "4avg"):
        SIZES.limit(Budget.parse(text), (2, 4))


def test_sizes_of_an_assignment() -> None:
    assert SIZES.total_bytes([2, 4, 2]) == 250 + 900 + 750
    assert SIZES.average_bits([2, 4, 2]) == pytest.approx((800 * 2 + 1600 * 4 + 2400 * 2) / 4800)
    assert SIZES.bits_per_weight([2, 4, 2]) == pytest.approx(8 * 1900 / 4800)


@given(limit=st.integers(1500, 2700), seed=st.integers(0, 2**32))
def test_random_assignments_fill_the_budget_and_keep_it(limit: int, seed: int) -> None:
    step_bytes = SIZES.step_bytes((2, 4))
    for assignment in random_assignments(SIZES, (2, 4), limit, n=4, seed=seed):
        used = SIZES.total_bytes(assignment)
        assert used <= limit
        assert all(used + n_bytes > limit for n_bytes in step_bytes[assignment == 2])


def test_a_width_that_is_not_smaller_than_a_wider_one_is_skipped() -> None:
    n_bytes: dict[Width, tuple[int, ...]] = {4: (10, 10, 10), 5: (12, 25, 14), 8: (15, 20, 13), 16: (15, 30, 12)}
    sizes = Sizes(n_weights=(20, 20, 20), n_bytes=n_bytes)
    assert sizes.player_widths((4, 5, 8, 16)) == ((4, 5, 16), (4, 8, 16), (4, 16))
    assert sizes.step_bytes((4, 5, 8, 16)).tolist() == [3, 2, 10, 10, 2]
    found = random_assignments(sizes, (4, 5, 8, 16), 45, n=50, seed=0)
    assert {tuple(assignment) for assignment in found} == {(5, 8, 16), (16, 4, 16), (16, 8, 4)}, "all that are full"
    assert all(sizes.total_bytes(assignment) <= 45 for assignment in found)
    with pytest.raises(
        UnsupportedBits, match=r"no player has 5 bits: .* or a wider type takes no more bytes; leave 5 out"
    ):
        Sizes((20, 20), {4: (10, 10), 5: (15, 15), 8: (15, 14)}).player_widths((4, 5, 8))
    assert Sizes((20, 20), {4: (10, 15), 8: (15, 14)}).player_widths((4, 8)) == ((4, 8), (8,))


def test_random_assignments_differ() -> None:
    assert len(np.unique(random_assignments(SIZES, (2, 4), 2000, n=20, seed=0), axis=0)) > 1


def test_the_feasible_budgets_that_an_error_names_are_feasible() -> None:
    odd = Sizes(n_weights=(777, 1313), n_bytes={2: (221, 379), 4: (411, 701)})
    with pytest.raises(InfeasibleBudget) as caught:
        odd.limit(Budget.parse("1B"), (2, 4))
    named = re.findall(r"[0-9.]+(?:avg|bpw|B)", str(caught.value).split(";")[1])
    assert len(named) == 6
    for text in named:
        odd.limit(Budget.parse(text), (2, 4))


def test_sizes_are_known_for_every_width() -> None:
    sizes = packed_sizes(find_players(tiny_model("llama")), RTNBackend(group_size=16), (2, 3, 4, 8))
    assert sorted(sizes.n_bytes) == [2, 3, 4, 8]
