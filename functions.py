"""Functions of the user's, by the name under which worker processes import them."""

import importlib
import os
import sys
from pathlib import Path

from errors import ConfigError, message, nearest


def imported(flag, module, attribute):
    """A function of the user's, by name. flag: of which option, for errors. Raises ConfigError."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file of the user's hides one of ours
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(f"{flag} {module}:{attribute}: cannot import {module!r} "
                          f"({type(error).__name__}: {message(error)})") from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise ConfigError(f"{flag} {module}:{attribute}: {getattr(found, '__file__', module)} has "
                          f"no callable {attribute!r}{nearest(attribute, vars(found))}")
    return function


def import_name(function, called):
    """The name of a function, by which worker processes find it. called: how, for errors, such as
    "make_model(num_classes=..., in_channels=...)". Raises ConfigError."""
    module, main = getattr(function, "__module__", None), sys.modules["__main__"]
    name = getattr(function, "__qualname__", f"an object of the class {type(function).__name__}")
    if not callable(function) or getattr(sys.modules.get(module), name, None) is not function:
        raise ConfigError("it must be a function or class at the top level of a module, called as "
                          f"{called}, not {name}")
    if module == "__main__" and os.path.isfile(getattr(main, "__file__", "")):
        # Of a script, which is a module elsewhere; it is not to be carried out again here.
        script = main.__spec__.name if main.__spec__ else Path(main.__file__).stem
        if "." in script and not main.__spec__:
            raise ConfigError(f"{name} is in {Path(main.__file__).name}, which cannot be "
                              "imported: there must be no dot before .py")
        if sys.modules.setdefault(script, main) is main:
            module = script
    return f"{module}:{name}"
