"""What an import path of a run file names: "my_pkg.module:Object"."""

import importlib
import os
import sys
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
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ConfigError(
            f"{what} '{path}': importing {module_name} failed ({type(error).__name__}: {error}); "
            "install the module or call the command from its folder"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{what} '{path}': {module_name} has no '{attribute}'{nearest(attribute, dir(module))}")
    return getattr(module, attribute)
