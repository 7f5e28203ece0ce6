"""The errors that people can mend, each in one line, and the words that such lines share."""

import difflib
import re
from contextlib import contextmanager


def plain(text):
    """The text in one line that can be printed, drawn and written as UTF-8: control characters,
    and bytes of a file's name that are no UTF-8, are escaped."""
    unsafe = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(unsafe, lambda found: found[0].encode("unicode_escape").decode(), str(text))


def message(error):
    """What an error says, in one line."""
    return plain(" ".join(str(error).split()))


def nearest(name, names):
    """The words ", did you mean 'resnet32'?" for the nearest of the names, or nothing."""
    lower = {candidate.lower(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.lower(), lower, n=1)
    return f", did you mean {lower[matches[0]]!r}?" if matches else ""


class ConfigError(Exception):
    """One line for each thing that is wrong with a config."""


class OneLine(Exception):
    """Its message is one line, whatever it quotes."""

    def __init__(self, text=""):
        super().__init__(message(text))


class DataError(OneLine):
    """What is wrong with the data, and what is accepted."""


class RunError(OneLine):
    """Why a run cannot start or go on, or its folder cannot be used."""


@contextmanager
def told(what, advice=""):
    """Whatever is raised within, also by other people's code, becomes a DataError."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
        raise DataError(f"{what}: {kind}{error}{advice}") from error
