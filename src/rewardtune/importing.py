"""What an import path of a run file names: "my_pkg.module:Object"."""

import importlib
import os
import sys
import traceback
from typing import Any

from .errors import ConfigError
from .spelling import nearest


def is_path(name: str) -> bool:
    """Whether `name` has the form "module:object"."""
    module, colon, attribute = name.partition(":")
    return bool(colon and module and attribute)


def by_path(path: str, what: str) -> Any:
    """The object of "module:object"; modules are also looked for in the current folder.

    what: of the errors, "reward" or "method". Raises ConfigError: also for whatever the module raises.
    """
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not see the folder it is called from
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a user's module raises while it is imported
        cure = _place(error)
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            cure = "; install the module or call the command from its folder"
        raise ConfigError(
            f"{what} '{path}': importing {module_name} failed ({type(error).__name__}: {error}){cure}"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{what} '{path}': {module_name} has no '{attribute}'{nearest(attribute, dir(module))}")
    return getattr(module, attribute)


def _place(error: BaseException) -> str:
    """` in FILE, line N`, in the user's own code where that is on the way to the error; "" where nothing is known."""
    if isinstance(error, SyntaxError) and os.path.exists(error.filename or ""):
        return f" in {error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)[1:]  # after by_path itself
    frames = [f for f in frames if os.path.exists(f.filename) and f.filename != importlib.__file__]
    others = (os.path.dirname(os.__file__), os.path.dirname(__file__))
    own = [f for f in frames if not f.filename.startswith(others) and "site-packages" not in f.filename]
    return "".join(f" in {f.filename}, line {f.lineno}" for f in (own or frames)[-1:])
