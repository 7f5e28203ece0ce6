"""The errors that a user can mend, and helpers that write their one-line messages."""

import difflib
import re
import sys
from contextlib import contextmanager
from typing import Literal, get_args, get_origin

LEAST, MOST = sys.float_info.min, sys.float_info.max  # the positive numbers


def plain(text):
    """The text as one line that can be printed, drawn and written as UTF-8: with escapes for
    control characters and for bytes of file names that are not UTF-8."""
    unsafe = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(unsafe, lambda found: found[0].encode("unicode_escape").decode(), str(text))


def message(error):
    """An error's message in one line."""
    return plain(" ".join(str(error).split()))


def nearest(name, names):
    """The words ", did you mean 'resnet32'?" for the most similar name, or "" without one."""
    lower = {candidate.lower(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.lower(), lower, n=1)
    return f", did you mean {lower[matches[0]]!r}?" if matches else ""


def mistake(declared, value):
    """What a value must be, as "a number above 0, not -1", or None if it is right.

    declared: str, bool, Literal, a tuple, or Annotated[int or float, lowest, highest]."""
    kind, *arguments = get_origin(declared) or declared, *get_args(declared)
    near = ""
    if kind is tuple and isinstance(value, tuple):
        return next(filter(None, (mistake(arguments[0], x) for x in value)), None)
    if kind in (str, bool, tuple):
        right = isinstance(value, kind)
        wanted = {str: "text", bool: "True or False", tuple: "a tuple of numbers"}[kind]
    elif kind is Literal:
        right, near = value in arguments, nearest(str(value), arguments)
        wanted = f"one of {', '.join(arguments)}"
    else:
        number, low, high = arguments
        right = isinstance(value, (int, number)) and not isinstance(value, bool)
        right = right and low <= value <= high
        wanted = "a whole number" if number is int else "a number"
        wanted += " above 0" if low == LEAST else f" from {low} on"
        wanted += f" and at most {high:.0f}" if high < MOST else ""
    return None if right else f"{wanted}, not {value!r}{near}"


class ConfigError(Exception):
    """What is wrong with a config, one line for each mistake."""


class OneLine(Exception):
    """An error whose message is one line, even if it quotes several."""

    def __init__(self, text=""):
        super().__init__(message(text))


class DataError(OneLine):
    """What is wrong with the data, and what is accepted."""


class RunError(OneLine):
    """Why a run cannot start or go on, or its folder cannot be used."""


@contextmanager
def told(what, advice=""):
    """Turns any error within, also of other people's code, into a DataError."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
        raise DataError(f"{what}: {kind}{error}{advice}") from error
