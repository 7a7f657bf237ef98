"""Range checks of numeric settings, done before any work; a one-line error names the setting."""

from __future__ import annotations

import math

__all__ = ["check_at_least_one", "check_positive", "check_share"]


def check_positive(most: float = math.inf, **values: float) -> None:
    """Check that each value is above 0 and finite.

    Parameters
    ----------
    most : float
        The largest allowed value.
    **values : float
        Values by the names to use in messages.

    Raises
    ------
    ValueError
        A value is out of range, or NaN.
    """
    for name, value in values.items():
        if not (0 < value <= most and math.isfinite(value)):
            limit = "finite" if math.isinf(most) else f"at most {most:g}"
            raise ValueError(f"{name} must be positive and {limit}, got {value!r}.")


def check_at_least_one(**values: float) -> None:
    """Raise ValueError unless each is a whole number, at least 1; see `check_positive`."""
    for name, value in values.items():
        if not (value >= 1 and value % 1 == 0):
            raise ValueError(f"{name} must be {'a whole number' if value >= 1 else 'at least 1'}, got {value!r}.")


def check_share(**values: float) -> None:
    """Raise ValueError unless each is from 0 to 1; see `check_positive`."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a share, 0 to 1; got {value!r}.")
