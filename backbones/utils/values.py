"""Checks of single values that a user gives, each naming the setting, what came and what is allowed."""

import math
from typing import Any

from .errors import UserError, shown

MOST = 1000  # items of a list, such as blocks of a network


def int_tuple(name: str, value: Any, largest: int = MOST) -> tuple[int, ...]:
    """``value`` as a tuple; raises UserError naming it unless it is a list of integers, of at most ``largest`` each."""
    if not isinstance(value, list | tuple | range):
        raise UserError(f"{name} is {shown(value)}; it must be a list of integers.")
    if len(value) > MOST:
        raise UserError(f"{name} has {len(value)} values; it may have {MOST}.")
    values = tuple(value)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise UserError(f"{name} is {shown(value)}; it must be a list of integers.")
    if max(values, default=0) > largest:
        raise UserError(f"{name} is {shown(value)}; its values may be at most {largest}.")
    return values


def check_positive(name: str, value: Any, largest: int) -> None:
    """Raises UserError naming ``value`` unless it is an integer from 1 to ``largest``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {shown(value)}; it must be a positive integer.")
    if value > largest:
        raise UserError(f"{name} is {shown(value)}; it may be at most {largest}.")


def check_rate(name: str, value: Any) -> None:
    """Raises UserError naming ``value`` unless it is a number from 0 to 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise UserError(f"{name} is {shown(value)}; it must be between 0 and 1.")


def check_bool(name: str, value: Any) -> None:
    """Raises UserError naming ``value`` unless it is a bool."""
    if not isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}; it must be true or false.")


def finite(value: Any) -> float:
    """``value`` as a float; raises ValueError for NaN and infinity as for what is no number."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number
