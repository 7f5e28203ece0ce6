"""Functions by name, ours and the user's: worker processes import the user's by name."""

import importlib
import os
import sys
from pathlib import Path

from errors import ConfigError, message, nearest


def find(name, known, flag, kind, others):
    """The function called by a name of the dict `known` or as package.module:function.

    flag, kind, others: for errors, the option, what it names, and the other names that are
    accepted. Raises ConfigError."""
    module, _, attribute = name.partition(":")
    if name in known:
        return known[name]
    if not module or not attribute:
        raise ConfigError(f"{flag}: no {kind} is called {name!r}{nearest(name, known)}; accepted "
                          f"are {', '.join(known)}{others}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that the user's files do not hide ours
    try:
        found = importlib.import_module(module)
    except Exception as error:  # the user's module can raise anything
        raise ConfigError(f"{flag} {module}:{attribute}: cannot import {module!r} "
                          f"({type(error).__name__}: {message(error)})") from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise ConfigError(f"{flag} {module}:{attribute}: {getattr(found, '__file__', module)} has "
                          f"no callable {attribute!r}{nearest(attribute, vars(found))}")
    return function


def import_name(function, called):
    """The name module:function by which worker processes find a function. called: how it is called,
    for errors, such as "fitness(logits, labels)". Raises ConfigError."""
    module, main = getattr(function, "__module__", None), sys.modules["__main__"]
    name = getattr(function, "__qualname__", f"an object of the class {type(function).__name__}")
    if not callable(function) or getattr(sys.modules.get(module), name, None) is not function:
        raise ConfigError("it must be a function or class at the top level of a module, called as "
                          f"{called}, not {name}")
    if module == "__main__" and os.path.isfile(getattr(main, "__file__", "")):
        # Workers import the script under its file's name. Register it, so that this process does
        # not carry it out a second time.
        script = main.__spec__.name if main.__spec__ else Path(main.__file__).stem
        if "." in script and not main.__spec__:
            raise ConfigError(f"{name} is in {Path(main.__file__).name}, which cannot be "
                              "imported: there must be no dot before .py")
        if sys.modules.setdefault(script, main) is main:
            module = script
    return f"{module}:{name}"
