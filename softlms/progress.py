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

    Examples
    --------
    >>> time_left({"03": 60.0}, {"01": 30.0, "02": 90.0}, jobs=2)
    'about 1:30 left'
    >>> time_left({"03": None, "04": None}, {"01": 30.0}, jobs=1)
    'time left not known for 03 and 1 more'
    """
    needed = {**running, **waiting}
    if unknown := [name for name, seconds in needed.items() if seconds is None]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        return f"time left not known for {unknown[0]}{more}"
    seconds = [value for value in needed.values() if value is not None]
    return f"about {clock(max([sum(seconds) / jobs, *seconds]))} left"


def say(console: Console, text: str) -> None:
    """A plain line, however wide the console is."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


class Progress:
    """Told by the driver what happens, tells the user.

    Parameters
    ----------
    console : Console
    seconds : mapping
        Every notebook that will run, and how long it took before; None where that is not known.
    jobs : int
        So many run at a time.
    """

    def __init__(self, console: Console, seconds: Mapping[str, float | None], jobs: int) -> None:
        self._console, self._seconds, self._jobs = console, seconds, jobs
        self._waiting = dict(seconds)
        self._running: dict[str, float] = {}  # when each started
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
        self._running[name] = time.monotonic()
        self._tasks[name] = self._bars.add_task(name, total=None, note="kernel starts")
        self.tick()
        if not self._console.is_terminal:
            number = len(self._seconds) - len(self._waiting)
            self._line(f"{name}: started, {number} of {len(self._seconds)}; {self._left()}")

    def cell(self, name: str, number: int, total: int) -> None:
        """A cell of a notebook starts."""
        note = f"cell {number} of {total}"
        self._bars.update(self._tasks[name], completed=number - 1, total=total, note=note)
        self.tick()

    def end(self, name: str, seconds: float, error: str | None) -> None:
        """A notebook ended."""
        del self._running[name]
        self._ended += 1
        self._bars.remove_task(self._tasks.pop(name))
        self.tick()
        self._line(f"{name}: {'failed' if error else 'done'} after {clock(seconds)}" + (f": {error}" if error else ""))

    def tick(self) -> None:
        """Time went by."""
        self._bars.update(self._all, completed=self._ended, note=f"{self._ended} ended; {self._left()}")

    def _left(self) -> str:
        running = {name: self._rest(name, started) for name, started in self._running.items()}
        return time_left(self._waiting, running, self._jobs)

    def _rest(self, name: str, started: float) -> float | None:
        took = self._seconds[name]
        passed = time.monotonic() - started
        return took - passed if took is not None and took > passed else None

    def _line(self, text: str) -> None:
        say(self._console, text)
