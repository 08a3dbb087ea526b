"""A run folder: what was asked for, and everything that was measured and made for it.

run.json       the request
journal.jsonl  every loss measured on the calibration set
screening-*    losses on the first calibration sequences, the same way
bank/          quantized weights of every player at every width
scores/        one-layer scores
searches.json  which recorded losses each search may reuse; frozen when the search first starts
estimate.json  Shapley values, covariance and sizes: all that an allocation needs
plans/         one plan for each budget and method
evaluation/    losses on text that judges
saved/         models that were saved on the way to an engine's file, with a record of what each file was made of
judged.json    what evaluate found out about the models of plans
report-*.html  the report page of each plan; comparison.html is that of the latest comparison
run.lock       held while a process works in the folder
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct

from coopq.core.errors import CoopQError, Mismatch, OutputError, RunError, differing
from coopq.core.files import expanded, locked, read_record, require_writable, write_record
from coopq.core.specs import Request
from coopq.core.types import Width

_FORMAT_VERSION = 3
_FREE = ("permutations", "seed", "model", "device", "dtype", "screen_tokens", "target", "base", "context")
"""Options that may change from command to command in one run folder.

Other walks go on from the same journal. The fingerprints of the bank and of the journal guard what another model,
device or dtype must not change.
"""


def default_run(out: Path) -> Path:
    """The run folder of an output: beside it, or around a model that was saved on the way to an engine's file.

    Raises:
        OutputError: If the output is the root of a disk.
    """
    out = expanded(out).resolve()
    if out.parent.name == "saved" and (out.parent.parent / "run.json").is_file():
        return out.parent.parent
    if not out.name:
        raise OutputError(f"{out} is the root of a disk; name a file or a folder in it")
    return out.with_name(f"{out.name}-run")


class Delivered(Struct, frozen=True):
    """What an engine's file was made of: saved/NAME.json, beside the model that was saved on the way.

    Attributes:
        out: Path of the output, relative to the run folder.
        form: Form of the export.
        bits: The plan's widths, one for each player.
        is_whole: Whether the output was written to its end.
    """

    out: str
    form: str
    bits: list[Width]
    is_whole: bool = False

    def save(self, file: Path) -> None:
        """Write the record."""
        write_record(file, self, _FORMAT_VERSION)

    @classmethod
    def load(cls, file: Path) -> "Delivered":
        """A record.

        Raises:
            RunError: If the file is damaged, or of another version.
        """
        way_out = "delete it and the output, and repeat the command"
        return read_record(
            file, cls, _FORMAT_VERSION, what="record of an output", missing="", way_out=way_out, error=RunError
        )


class RunFolder:
    """The files of one run.

    Args:
        path: The folder.
        bank: Folder of the weight bank, if it is not in this one.
    """

    def __init__(self, path: Path, bank: Path | None = None) -> None:
        self.path = path
        self.bank = bank or path / "bank"
        self.journal = path / "journal.jsonl"
        self.evaluation = path / "evaluation"
        self.plans = path / "plans"
        self.scores = path / "scores"
        self.estimate = path / "estimate.json"

    def screening(self, n_sequences: int) -> Path:
        """The journal of losses on the first n calibration sequences."""
        return self.path / f"screening-{n_sequences}.jsonl"

    @contextmanager
    def opened(self, request: Request) -> Iterator[None]:
        """Hold the folder, which is made if it is missing; a run that is refused leaves nothing behind.

        The corrected command would otherwise meet the record of the refused one. Losses and weights that were made
        stay, and so does everything that was there before.

        Raises:
            Mismatch: As `check`.
            OutputError: If the folder cannot be written.
            RunError: If another process holds it.
        """
        was_missing = not self.path.exists()
        require_writable(self.path)
        try:
            with locked(self.path):
                before = self._records()
                try:
                    self.check(request)
                    yield
                except CoopQError:
                    if not self._has_results():
                        self._remove(self._records() - before, and_lock=was_missing)
                    raise
        except CoopQError:
            if was_missing:
                with suppress(OSError):  # it holds something, maybe of another process
                    self.path.rmdir()
            raise

    def _has_results(self) -> bool:
        """Whether the folder holds losses, scores or plans. A journal without losses has only its header."""
        results = (*self.scores.glob("*"), *self.plans.glob("*"))
        return bool(results) or any(file.read_bytes().count(b"\n") > 1 for file in self.path.rglob("*.jsonl"))

    def _records(self) -> set[Path]:
        """Files that record what was asked for. They can be removed while the folder holds no results."""
        bank = self.path / "bank"
        files = {
            self.path / "run.json",
            self.path / "searches.json",
            self.journal,
            *self.path.glob("screening-*.jsonl"),
        }
        if not any(bank.glob("*.safetensors")):
            files.add(bank / "bank.json")
        return {file for file in files if file.exists()}

    def _remove(self, records: set[Path], and_lock: bool) -> None:
        """Remove records that this process made under its lock."""
        for file in records:
            file.unlink()
        with suppress(OSError):  # it holds weights, or there is none
            (self.path / "bank").rmdir()
        if and_lock:
            with suppress(OSError):  # Windows keeps a file that is open
                (self.path / "run.lock").unlink()

    def check(self, request: Request) -> None:
        """Check that a request goes on with the one recorded, if there is one.

        Raises:
            Mismatch: If the folder belongs to another request.
        """
        if not (self.path / "run.json").exists():
            return
        ours = {name: value for name, value in request.options().items() if name not in _FREE}
        theirs = {name: value for name, value in self.request().options().items() if name not in _FREE}
        if differing(ours, theirs):
            raise Mismatch(
                f"run folder {self.path} was started with another request",
                ours,
                theirs,
                "use another run folder, or repeat the first request",
            )

    def start(self, request: Request) -> None:
        """Record the request."""
        write_record(self.path / "run.json", {"request": request}, _FORMAT_VERSION)

    def request(self) -> Request:
        """The request recorded.

        Raises:
            RunError: If this is no run folder.
        """
        return read_record(
            self.path / "run.json",
            dict[str, Request],
            _FORMAT_VERSION,
            what="record of a run",
            missing=f"{self.path} is not a run folder; `coopq quantize` or `coopq estimate` makes one",
            way_out="use another run folder",
            error=RunError,
        )["request"]
