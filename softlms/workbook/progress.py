"""What a user sees while notebooks run: bars on a terminal, else one plain line when a notebook starts and ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

__all__ = ["Progress", "clock", "say", "time_left"]


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    Examples
    --------
    >>> clock(61.4), clock(3700)
    ('1:01', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def time_left(waiting: Mapping[str, float | None], running: Mapping[str, float | None], jobs: int) -> str:
    """What is left of a batch in words, from seconds that each notebook still needs; None: not known.

    Notebooks of which nothing is known are named, and what the others need is the least.

    Examples
    --------
    >>> time_left({"03": 60.0}, {"01": 30.0, "02": 90.0}, jobs=2)
    'about 1:30 left'
    >>> time_left({"03": None, "04": None}, {"01": 30.0}, jobs=1)
    'more than 0:30 left, not known for 03 and 1 more'
    """
    needed = {**running, **waiting}
    seconds = [value for value in needed.values() if value is not None]
    left = clock(max([sum(seconds) / jobs, *seconds]))
    if unknown := [name for name, value in needed.items() if value is None]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        return f"{f'more than {left} left,' if seconds else 'time left'} not known for {unknown[0]}{more}"
    return f"about {left} left"


def say(console: Console, text: str) -> None:
    """A plain line, however wide the console is."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


class Progress:
    """Told by the driver what happens, tells the user.

    Parameters
    ----------
    console : Console
    seconds : mapping
        Every notebook that will run, and how long it took before, here or elsewhere; None where that is not known.
    jobs : int
        So many run at a time.
    """

    def __init__(self, console: Console, seconds: Mapping[str, float | None], jobs: int) -> None:
        self._console, self._seconds, self._jobs = console, seconds, jobs
        self._waiting = dict(seconds)
        self._running: dict[str, float] = {}  # when each started
        self._done: dict[str, float] = {}  # of each that runs, the share of its cells
        self._took = self._expected = 0.0  # of those that ended: another machine has another pace
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
        """A notebook starts."""
        del self._waiting[name]
        self._running[name], self._done[name] = time.monotonic(), 0.0
        self._tasks[name] = self._bars.add_task(name, total=None, note="kernel starts")
        self.tick()
        if not self._console.is_terminal:
            number = len(self._seconds) - len(self._waiting)
            self._line(f"{name}: started, {number} of {len(self._seconds)}; {self._left()}")

    def cell(self, name: str, number: int, total: int) -> None:
        """A cell of a notebook starts."""
        note = f"cell {number} of {total}"
        self._done[name] = (number - 1) / total
        self._bars.update(self._tasks[name], completed=number - 1, total=total, note=note)
        self.tick()

    def end(self, name: str, seconds: float, error: str | None) -> None:
        """A notebook ended."""
        del self._running[name]
        self._ended += 1
        expected = self._seconds[name]
        if not error and expected is not None:
            self._took += seconds
            self._expected += expected
        self._bars.remove_task(self._tasks.pop(name))
        self.tick()
        self._line(f"{name}: {'failed' if error else 'done'} after {clock(seconds)}" + (f": {error}" if error else ""))

    def tick(self) -> None:
        """Time went by."""
        self._bars.update(self._all, completed=self._ended, note=f"{self._ended} ended; {self._left()}")

    def _left(self) -> str:
        running = {name: self._rest(name, started) for name, started in self._running.items()}
        return time_left({name: self._needs(name) for name in self._waiting}, running, self._jobs)

    def _needs(self, name: str) -> float | None:
        """Seconds of a whole notebook, at the pace of this machine so far."""
        seconds = self._seconds[name]
        return seconds and seconds * (self._took / self._expected if self._expected else 1)

    def _rest(self, name: str, started: float) -> float | None:
        """What a notebook still needs: by the time it should take, or past that by the cells that it has done."""
        passed, needs, done = time.monotonic() - started, self._needs(name), self._done[name]
        if needs is not None and needs > passed:
            return needs - passed
        return passed / done - passed if done else None

    def _line(self, text: str) -> None:
        say(self._console, text)
