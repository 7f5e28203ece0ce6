"""The errors that a user can mend: each message is clear lines that say what was wrong and what is accepted."""

import difflib


class ConfigError(Exception):
    """A config that cannot be run, one line a mistake."""


class DataError(Exception):
    """Data that cannot be used."""


class RunError(Exception):
    """A run's folder that cannot be used or written, or a run that cannot go on."""


def message(error):
    """What an error says, in one line."""
    return " ".join(str(error).split())


def nearest(name, names):
    """The words ", did you mean 'resnet32'?" for the nearest of the names, or nothing."""
    lower = {candidate.lower(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.lower(), lower, n=1)
    return f", did you mean {lower[matches[0]]!r}?" if matches else ""
