from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from coopq.core.errors import EstimationError, JournalError, Mismatch
from coopq.core.types import Assignment, Assignments, Width
from coopq.game.game import QuantizationGame
from coopq.game.journal import Journal

FINGERPRINT = {"weights": "abc", "backend": {"name": "rtn", "bits": (2, 4)}}


def point(*bits: Width) -> Assignment:
    return np.array(bits, dtype=np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal.jsonl"
    with Journal(path, FINGERPRINT) as journal:
        journal.append(point(2.5, 4), np.array([1.25, 0.1]), 3)
        journal.append(point(4, 4), np.array([1.0, 1 / 3]), 2)
    return path


def test_values_come_back_bit_by_bit(path: Path) -> None:
    with Journal(path, FINGERPRINT) as journal:
        assert len(journal) == 2
        assert journal.block_forwards == 5
        np.testing.assert_array_equal(journal.get(point(4, 4)), [1.0, 1 / 3])
        np.testing.assert_array_equal(journal.get(point(2.5, 4)), [1.25, 0.1])
        assert journal.get(point(2, 4)) is None
    (assignments, losses), block_forwards = Journal.peek(path)
    assert assignments.shape == (2, 2)
    np.testing.assert_allclose(sorted(losses), sorted([0.675, 2 / 3]))
    assert block_forwards.tolist() == [3, 2]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_last_line_cut_short_is_dropped_and_written_again(path: Path, cut: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    (_, losses), block_forwards = Journal.peek(path)
    assert (len(losses), block_forwards.tolist()) == (1, [3])
    with Journal(path, FINGERPRINT) as journal:
        assert journal.get(point(4, 4)) is None
        journal.append(point(4, 4), np.array([1.0, 1 / 3]), 2)
    assert path.read_bytes() == whole


def test_a_garbled_last_line_is_dropped(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"bits": [2, 2], "nll": [\x00\n')
    with Journal(path, FINGERPRINT) as journal:
        assert len(journal) == 2


def test_a_header_cut_short_starts_afresh(tmp_path: Path, path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_bytes(path.read_bytes()[:20])
    with Journal(short, FINGERPRINT) as journal:
        assert len(journal) == 0
    with Journal(short, FINGERPRINT) as journal:
        assert len(journal) == 0


@pytest.mark.parametrize(
    "broken",
    [
        b'{"bits": [400, 4], "nll": [1.0, 1.0], "block_forwards": 1}',
        b"{}",
        b"not json",
        b'{"bits": [2, 4], "nll": [NaN], "block_forwards": 1}',
        b'{"bits": 2, "nll": [1.0]}',
        b"\xff",
    ],
)
def test_a_broken_line_in_the_middle_is_an_error_that_names_it(path: Path, broken: bytes) -> None:
    header, _, second = path.read_bytes().splitlines()
    before = b"\n".join([header, broken, second]) + b"\n"
    path.write_bytes(before)
    for look in (lambda: Journal.peek(path), lambda: Journal(path, FINGERPRINT)):
        with pytest.raises(JournalError, match="line 2 is broken"):
            look()
    assert path.read_bytes() == before, "nothing may be lost"


def test_another_fingerprint_is_refused_with_the_fields_that_differ(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(Mismatch, match=r"something else \(weights: 'abc' there, 'xyz' here\)"):
        Journal(path, {**FINGERPRINT, "weights": "xyz"})
    assert path.read_bytes() == before


def test_a_record_of_other_sequences_is_broken(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"bits": [2, 2], "nll": [1.0], "block_forwards": 1}\n' * 2)
    with pytest.raises(JournalError, match="line 4 is broken"):
        Journal(path, FINGERPRINT)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"[4, 4]", b"[2, 4]"),
        (b"1.25", b"1.35"),
        (b'"block_forwards": 3', b'"block_forwards": 4'),
        (b"0.1]", b"0.1, 0.1]"),
        (b"[2.5, 4]", b"[2.5, 4, 4]"),
        (b"[2.5, 4]", b"[" * 100_000),
        (b"1.25", b"1e999"),
        (b"1.25", b'"1.25"'),
        (b'"check": "', b'"check": "0'),
        (b'"abc"', b'"abd"'),
    ],
)
def test_a_changed_value_is_never_read(path: Path, before: bytes, after: bytes) -> None:
    whole = path.read_bytes() + b"{}\n"  # so that no line with a change is the last
    assert before in whole
    path.write_bytes(whole.replace(before, after, 1))
    with pytest.raises(JournalError, match=r"line \d is broken"):
        Journal(path, FINGERPRINT)


@pytest.mark.parametrize("order", [[0, 2, 1], [0, 2], [0, 1, 1, 2], [1, 2], [1, 0, 2]])
def test_lines_that_are_moved_or_missing_are_noticed(path: Path, order: list[int]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*(lines[index] for index in order), b"{}\n"]))
    with pytest.raises(JournalError, match=r"line \d is broken"):
        Journal(path, FINGERPRINT)


def test_white_space_changes_nothing(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b", ", b" ,  "))
    with Journal(path, FINGERPRINT) as journal:
        np.testing.assert_array_equal(journal.get(point(2.5, 4)), [1.25, 0.1])
        journal.append(point(2, 2), np.array([2.0, 2.0]), 1)
    with Journal(path, FINGERPRINT) as journal:
        assert len(journal) == 3


@pytest.mark.parametrize("version", [1, 9])
def test_another_format_is_refused(path: Path, version: int) -> None:
    path.write_bytes(path.read_bytes().replace(b'"format_version": 3', b'"format_version": %d' % version))
    with pytest.raises(JournalError, match=f"format {version}.* reads 3; use another run folder"):
        Journal(path, FINGERPRINT)


class Forgetful:
    """An engine that leaves one assignment out."""

    def evaluate(self, assignments: Assignments) -> Iterator[tuple[Assignment, npt.NDArray[np.float64], int]]:
        for assignment in assignments:
            if assignment.tolist() != [2, 3]:
                yield assignment, assignment.astype(np.float64), 1


def test_an_answer_that_is_missing_is_an_error_with_the_assignment(tmp_path: Path) -> None:
    points = np.array([[2, 2], [2, 3], [2, 4]], dtype=np.float32)
    with Journal(tmp_path / "journal.jsonl", FINGERPRINT) as journal:
        game = QuantizationGame(Forgetful(), journal)
        np.testing.assert_array_equal(game(points[::2]), [2, 3])
        with pytest.raises(EstimationError, match=r"no loss for assignment \[2, 3\]; run the same command again"):
            game.per_sequence(points)
