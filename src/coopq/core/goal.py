"""What a job is to reach: a size or a loss, by which method, within which limits."""

import math
import time
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from coopq.core.errors import OptionError
from coopq.core.sizes import Budget
from coopq.core.spec_base import Spec


class Stopped(Exception):
    """A limit is reached, so what was asked for is not measured. Losses measured before are in the journal."""


@dataclass
class Limit:
    """Limits of a search. Each is infinite unless it is given.

    Attributes:
        forwards: Most forwards of the whole model over all calibration tokens, scores included.
        minutes: Most minutes, counted from when the limit is made.
        spent: Forwards spent so far, as an uninterrupted search counts them.
        is_reached: Whether the limit has ended the search.
    """

    forwards: float = math.inf
    minutes: float = math.inf
    spent: float = 0.0
    is_reached: bool = False
    _has_begun: bool = field(default=False, repr=False)
    _start: float = field(default_factory=time.monotonic, repr=False)

    @property
    def text(self) -> str:
        """The limit as a user would say it: "60 forwards"."""
        limits = [(self.forwards, "forwards"), (self.minutes, "minutes")]
        return " or ".join(f"{value:g} {unit}" for value, unit in limits if value < math.inf)

    def spend(self, forwards: float) -> None:
        """Count forwards that are about to be measured.

        Raises:
            Stopped: If the limit does not allow them.
        """
        if self._has_begun and self.spent + forwards > self.forwards:
            self._stop()
        self.spent += forwards

    def check_time(self) -> None:
        """Check that there is time for another loss.

        Raises:
            Stopped: If not.
        """
        if self._has_begun and time.monotonic() - self._start >= 60 * self.minutes:
            self._stop()

    def begin(self) -> None:
        """Enforce the limit from now on. Earlier losses are needed for any answer, so the limit does not stop them."""
        self._has_begun = True

    def _stop(self) -> None:
        self.is_reached = True
        raise Stopped(f"stopped after {self.text}")


class Goal(Spec, frozen=True):
    """Which assignment is wanted, and by which method."""

    budget: Annotated[
        str | None, Meta(description="Average bits (2.5avg), bits per weight (2.8bpw) or bytes (40MiB).")
    ] = None
    fit: Annotated[
        str | None,
        Meta(
            description="Instead of a size: the memory (8GiB) that the file, the KV cache of --context tokens and the "
            "engine's working memory may take together."
        ),
    ] = None
    max_loss: Annotated[
        float | None,
        Meta(
            description="Instead of a budget: the smallest size whose calibration loss stays under this. The loss is "
            "that of `--loss`, in nats per token."
        ),
    ] = None
    method: Annotated[str, Meta(description="How to choose the widths; `coopq methods` lists all.")] = "active"
    forwards: Annotated[
        int | None,
        Meta(description="End the search after so many forwards of the model, with the best plan measured by then."),
    ] = None
    minutes: Annotated[
        float | None,
        Meta(
            description="End the search so many minutes after the command starts, with the best plan measured by "
            "then; loading the model and quantizing the weights count. 0 takes what an interrupted command measured."
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forwards is not None and self.forwards < 1:
            raise OptionError(f"forwards = {self.forwards} is no number of forwards; leave it out for no limit")
        if self.minutes is not None and not 0 <= self.minutes < float("inf"):
            raise OptionError(f"minutes = {self.minutes} is no length of time; leave it out for no limit")
        if [self.budget, self.fit, self.max_loss].count(None) != 2:
            raise OptionError("give one of size, fit (a memory) and max-loss: --size 3.5bpw, for example")
        if self.budget is not None:
            Budget.parse(self.budget)
        if self.fit is not None and not Budget.parse(self.fit).is_bytes:
            raise OptionError(f"fit = {self.fit} is no number of bytes; write 8GiB, for example")
        if self.max_loss is not None and not abs(self.max_loss) < float("inf"):
            raise OptionError(f"max-loss = {self.max_loss} is no limit; give nats per token, 0.1 for example")

    def limit(self) -> Limit | None:
        """When to end the search early, counted from now on; None for no limit."""
        if self.forwards is None and self.minutes is None:
            return None
        forwards, minutes = (math.inf if value is None else value for value in (self.forwards, self.minutes))
        return Limit(forwards, minutes)
