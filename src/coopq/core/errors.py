"""Errors that a user can meet, and words of their messages. Each message names the thing, the value and the way out."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def hint(name: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown name."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"choose from {', '.join(known)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library has run out of memory: torch says so by a class of its own on devices, and in words on CPUs."""
    return type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names of the fields in which two records differ, in order."""
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]


def first_names(names: Sequence[str]) -> str:
    """The first three names of many, with commas between."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def one_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or the error's kind; at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(" :.")


class CoopQError(Exception):
    """Base of all errors that a user can solve; the command line prints them as one line."""


class ModelError(CoopQError):
    """A model that cannot be found, read or quantized."""


class CalibrationError(CoopQError):
    """Text that cannot be read or is too short."""


class BackendError(CoopQError):
    """An unknown backend, or one whose library is missing."""


class UnsupportedBits(BackendError):
    """A bit-width that the backend does not have."""


class BudgetError(CoopQError):
    """A budget that cannot be parsed."""


class InfeasibleBudget(BudgetError):
    """A budget below the smallest or above the largest assignment."""


class EstimationError(CoopQError):
    """A loss that is not a number, or an estimator asked for the impossible."""


class JournalError(CoopQError):
    """A journal with a broken line."""


class RunError(CoopQError):
    """A run folder that is missing something, or in use by another process."""


class OutputError(CoopQError):
    """An output folder that cannot be written."""


class OutOfMemory(CoopQError):
    """A run that does not fit into memory."""


class ExportError(CoopQError):
    """A saved model that an engine's form cannot hold."""


class PlanError(CoopQError):
    """A plan file that cannot be read."""


class OptionError(CoopQError):
    """A value that an option cannot take."""


class Mismatch(CoopQError):
    """Two things that do not belong together; the message lists the fields that differ.

    The arguments are kept as they are, so that the error can be pickled on its way from a worker.
    """

    def __init__(self, what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], way_out: str) -> None:
        super().__init__(what, ours, theirs, way_out)

    def __str__(self) -> str:
        what, ours, theirs, way_out = self.args
        differences = "; ".join(
            f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing(ours, theirs)
        )
        return f"{what} ({differences}); {way_out}"
