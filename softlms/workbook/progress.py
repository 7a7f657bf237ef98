"""Progress of running notebooks: bars on a terminal, else a plain line when a notebook starts and ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

__all__ = ["Progress", "clock", "say"]


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours if there are any.

    Examples
    --------
    >>> clock(61.4), clock(3700)
    ('1:01', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def say(console: Console, text: str) -> None:
    """Print a plain line, regardless of the console's width."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


class Progress:
    """Receives events from the driver and shows them to the user.

    Parameters
    ----------
    console : Console
    seconds : mapping
        Every notebook that will run, and its approximate time. The estimates adapt to this machine: if notebooks take
        twice their time, the others are expected to as well.
    jobs : int
        Notebooks at a time.
    """

    def __init__(self, console: Console, seconds: Mapping[str, float], jobs: int) -> None:
        self._console, self._seconds, self._jobs = console, seconds, jobs
        self._waiting = list(seconds)
        self._running: dict[str, float] = {}  # when each started
        self._cells: dict[str, float] = {}  # share of cells done
        self._took = self._expected = 0.0  # seconds of all that succeeded
        self._ended = 0
        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[note]}"))
        self._bars = Bars(TimeElapsedColumn(), *columns, console=console, disable=not console.is_terminal)
        self._all = self._bars.add_task(f"{len(seconds)} notebooks", total=len(seconds), note="")
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, name: str) -> None:
        """Report that a notebook starts."""
        self._waiting.remove(name)
        self._running[name], self._cells[name] = time.monotonic(), 0.0
        self._tasks[name] = self._bars.add_task(name, total=None, note="kernel starts")
        self.tick()
        if not self._console.is_terminal:
            number, total = len(self._seconds) - len(self._waiting), len(self._seconds)
            say(self._console, f"{name}: started, {number} of {total}; {self.time_left()}")

    def cell(self, name: str, number: int, total: int) -> None:
        """Report that a cell of a notebook starts."""
        self._cells[name] = (number - 1) / total
        self._bars.update(self._tasks[name], completed=number - 1, total=total, note=f"cell {number} of {total}")
        self.tick()

    def end(self, name: str, seconds: float, error: str | None) -> None:
        """Report that a notebook ended."""
        del self._running[name]
        self._ended += 1
        if not error:
            self._took += seconds
            self._expected += self._seconds[name]
        self._bars.remove_task(self._tasks.pop(name))
        self.tick()
        ending = f"failed after {clock(seconds)}: {error}" if error else f"done after {clock(seconds)}"
        say(self._console, f"{name}: {ending}")

    def tick(self) -> None:
        """Update the displayed time."""
        self._bars.update(self._all, completed=self._ended, note=f"{self._ended} ended; {self.time_left()}")

    def time_left(self) -> str:
        """The remaining time, in words."""
        passed = {name: time.monotonic() - started for name, started in self._running.items()}
        late = {name: seconds for name, seconds in passed.items() if seconds > self._seconds[name]}
        expected = self._expected + sum(self._seconds[name] for name in late)
        pace = (self._took + sum(late.values())) / expected if expected else 1.0
        left = [self._seconds[name] * pace for name in self._waiting]
        for name, seconds in passed.items():
            if (rest := self._seconds[name] * pace - seconds) <= 0:  # it is late: its cells are a better estimate
                done = self._cells[name]
                rest = seconds / done - seconds if done else seconds
            left.append(rest)
        return f"about {clock(max([sum(left) / self._jobs, *left]))} left"
