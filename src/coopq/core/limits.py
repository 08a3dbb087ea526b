"""When a search is to end early, with the best that is measured by then."""

import math
import time
from dataclasses import dataclass, field


class Stopped(Exception):
    """A limit is reached, so what was asked for is not measured. Losses measured before are in the journal."""


@dataclass
class Limit:
    """How much a search may measure; the search has none without a limit.

    Attributes:
        forwards: Most forwards of the whole model over all calibration tokens, scores included.
        minutes: Most minutes from now on.
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
        """From now on the limit holds: what was measured first has to be measured, or there is no answer."""
        self._has_begun = True

    def _stop(self) -> None:
        self.is_reached = True
        raise Stopped(f"stopped after {self.text}")
