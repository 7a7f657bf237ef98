"""Settings that are numbers: each is checked before any work, and one that is out of range is named in one line."""

from __future__ import annotations

import math

__all__ = ["check_at_least_one", "check_positive", "check_share"]


def check_positive(most: float = math.inf, **values: float) -> None:
    """Each is above 0 and finite.

    Parameters
    ----------
    most : float
        The largest that is allowed.
    **values : float
        By the names that a message should give them.

    Raises
    ------
    ValueError
        One is not; NaN never is.
    """
    for name, value in values.items():
        if not (0 < value <= most and math.isfinite(value)):
            limit = "finite" if math.isinf(most) else f"at most {most:g}"
            raise ValueError(f"{name} must be positive and {limit}, got {value!r}.")


def check_at_least_one(**values: float) -> None:
    """ValueError unless each is a whole number from 1 on; see `check_positive`."""
    for name, value in values.items():
        if not (value >= 1 and value % 1 == 0):
            raise ValueError(f"{name} must be {'a whole number' if value >= 1 else 'at least 1'}, got {value!r}.")


def check_share(**values: float) -> None:
    """ValueError unless each is from 0 to 1; see `check_positive`."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a share, 0 to 1; got {value!r}.")
