"""Reads the command line into a Config: tyro makes each field an option."""

import io
import os
import re
import sys
from contextlib import redirect_stderr
from dataclasses import replace

import tyro

from config import Config, flag
from errors import ConfigError, RunError, message
from records import read_config
from replay import replay_config


def command_line(arguments, description):
    """The Config of a command line. arguments: a list; None: those of this program.

    An option that is left out has the value of the run's folder with --resume, else the schedule's
    with --replay, else the data set's. Raises ConfigError, RunError."""
    arguments = sys.argv[1:] if arguments is None else arguments
    typed = [a for a in arguments if a not in ("-h", "--help")]
    first = parsed(Config(), typed)
    named = {name: getattr(first, name) for name in ("dataset", "preset", "method", "epochs")
             if any(a.split("=")[0] == f"--{name}" for a in typed)}
    start = {"dataset": "digits"}
    if first.replay:
        start = replay_config(first.replay, max(1, named.get("epochs", 1)))
    start, stored = Config(**start | named), {}
    if first.resume and not first.overwrite:
        out = folder_name(parsed(start, typed))
        stored = {name: x for name, x in read_config(out).items() if hasattr(start, name)}
        start = replace(start, **stored)
    config = parsed(start, arguments, description)
    if changed := [f"{flag(name)} {getattr(start, name)}, not {getattr(config, name)}"
                   for name in stored if getattr(config, name) != getattr(start, name)]:
        raise RunError(f"--resume goes on with the run in {out}, which has {', '.join(changed)}")
    return config


def parsed(start, arguments, description=None):
    """`start` with the options of a command line. Raises ConfigError: tyro's words in one line."""
    box = io.StringIO()
    # With tyro's pairs, --x and --no-x, a switch that is on can be typed again. Help shows --x.
    pairs = (tyro.conf.FlagCreatePairsOff,) if {"-h", "--help"} & set(arguments) else ()
    try:
        with redirect_stderr(box):
            return tyro.cli(Config, prog="epbt.py", default=start, args=arguments,
                            description=description, config=pairs)
    except SystemExit as end:
        if not end.code:  # after --help
            raise
    _, *parts = re.split("[-─]{9,}", re.sub("[│╭╮╰╯]", " ", box.getvalue()))
    raise ConfigError("; ".join(line for part in parts if (line := message(part))))


def folder_name(config):
    """The folder of a run: --out, or one named by method, data set and seed."""
    data = os.path.basename(os.path.normpath(config.dataset))
    return os.path.expanduser(config.out or f"runs/{config.method}-{data}-{config.seed}")
