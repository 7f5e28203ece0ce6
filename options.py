"""A dataclass as the options of a command line: each field declares its help, its bounds, and its group."""

import argparse
import difflib
import sys
from dataclasses import field, fields
from typing import get_args, get_origin, get_type_hints


class ConfigError(Exception):
    """One line for each thing that is wrong with a config."""


def nearest(name, names):
    """The words ", did you mean 'resnet32'?" for the nearest of the names, or nothing."""
    lower = {candidate.lower(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.lower(), lower, n=1)
    return f", did you mean {lower[matches[0]]!r}?" if matches else ""


def message(error):
    """What an error says, in one line."""
    return " ".join(str(error).split())


def option(group, default, help, **facts):
    """A field that is an option. facts: choices; the bounds low and high (inclusive), above and below (exclusive);
    otherwise (in words, what None stands for); runtime (True where the value cannot change the result, so that a
    resumed run may have another)."""
    return field(default=default, metadata={"group": group, "help": help, **facts})


def flag(f):
    return "--" + f.name.replace("_", "-")


def kind_of(f, config_class):
    """The type of a field's value, apart from None: bool, int, float, str or tuple."""
    declared = get_type_hints(config_class)[f.name]
    kinds = [t for t in get_args(declared) if t is not type(None)] or [declared]
    return get_origin(kinds[0]) or kinds[0]


def mistakes(config):
    """A line for each field whose value is not as the field declares."""
    return [line for f in fields(config) if (line := mistake(f, kind_of(f, type(config)), getattr(config, f.name)))]


def mistake(f, kind, value):
    if value is None and f.default is None:
        return None
    if choices := f.metadata.get("choices"):
        return None if isinstance(value, str) and value in choices else (
            f"{flag(f)} must be one of {', '.join(choices)}, not {value!r}{nearest(str(value), choices)}")
    if kind is bool or kind is str:
        if value == "":
            return f"{flag(f)} must not be empty"
        return None if isinstance(value, kind) else f"{flag(f)} must be a {kind.__name__}, not {value!r}"
    bounds = [(f.metadata[key], text, holds) for key, text, holds in BOUNDS if key in f.metadata]
    if kind is tuple and not isinstance(value, tuple | list):
        return f"{flag(f)} must be a tuple or list of numbers, not {value!r}"
    for x in value if kind is tuple else [value]:
        number = is_number(x) and (kind is not int or isinstance(x, int))
        if not number or not all(holds(x, bound) for bound, _, holds in bounds):
            word = "a whole number" if kind is int else "a number"
            limits = " and ".join(f"{text} {bound}" for bound, text, _ in bounds)
            return f"{flag(f)} must be {f'{word} {limits}'.rstrip()}, not {x!r}"
    return None


def is_number(x):
    """Whether it is one of Python's, as JSON has them, that fits a float."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


BOUNDS = (("low", "at least", lambda x, bound: x >= bound), ("above", "above", lambda x, bound: x > bound),
          ("high", "at most", lambda x, bound: x <= bound),
          ("below", "below", lambda x, bound: x < bound))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line and exit code 2; a mistyped option is told the nearest that there is."""
        if message.startswith("unrecognized arguments:"):
            message += nearest(message.split()[2].split("=")[0], self._option_string_actions)
        self.exit(2, f"{self.prog.split()[-1]}: {message}\n")


def number_or_text(text):
    """As a number where it is one; what is not is told together with all other mistakes."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse(config_class, description, epilog, arguments):
    """The options that a command line gives, as a dict."""
    parser = Parser(prog="python epbt.py", usage="%(prog)s [OPTION ...]", description=description, epilog=epilog,
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for f in fields(config_class):
        group, kind = f.metadata["group"], kind_of(f, config_class)
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        default = f.metadata.get("otherwise") if f.default is None or f.default is False else f.default
        help = f.metadata["help"] + ("" if default is None else f" (default {default})")
        names = "{" + ",".join(f.metadata["choices"]) + "}" if "choices" in f.metadata else "NAME"
        number = dict(type=number_or_text, metavar="N" if kind is int else "X", nargs="*" if kind is tuple else None)
        switch = argparse.BooleanOptionalAction if f.default is None else "store_true"
        how = {bool: dict(action=switch), str: dict(metavar=names)}.get(kind, number)
        groups[group].add_argument(flag(f), default=argparse.SUPPRESS, help=help.replace("%", "%%"), **how)
    return vars(parser.parse_args(arguments))
