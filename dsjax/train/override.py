"""An experiment from the command line: its function by name, its fields by path.

`find("experiments.pretrain_tiny_v3")` calls a function; `override(experiment,
"model.segments.1.feed_forward.top_k=4")` gives the experiment with one value replaced.
"""

import importlib
import inspect
import pkgutil
import sys
import types
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from dsjax.errors import UserError
from dsjax.train.experiment import Experiment
from dsjax.train.parse import elements, members, near, parse


def find(name: str) -> Experiment:
    """Calls the function at PACKAGE.FUNCTION; the current directory is searched first.

    Raises UserError, with near names, when there is no such module or function, and
    when the function returns no `Experiment`.
    """
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        raise UserError(f"experiment {name!r}: write PACKAGE.FUNCTION")
    module = _import(module_name)
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        here = [key for key, value in vars(module).items() if _is_experiment(value)]
        raise UserError(
            f"{module_name} has no function {function_name!r}{near(function_name, here)}"
        )
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise UserError(f"{name}: {error}") from None
    experiment = function()
    if not isinstance(experiment, Experiment):
        raise UserError(f"{name} returned a {type(experiment).__name__}, no Experiment")
    return experiment


def _import(name: str) -> types.ModuleType:
    """The module; a missing module that it imports itself is not the user's mistake."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        missing = error.name
    parent, _, last = missing.rpartition(".")
    places = (
        sys.modules[parent].__path__ if parent in sys.modules else [str(Path.cwd())]
    )
    names = [module.name for module in pkgutil.iter_modules(places)]
    raise UserError(f"no module {missing!r}{near(last, names)}")


def _is_experiment(value: Any) -> bool:
    """Whether something is a function that says that it returns an `Experiment`."""
    return inspect.isfunction(value) and (
        inspect.signature(value).return_annotation in (Experiment, "Experiment")
    )


def override(experiment: Experiment, setting: str) -> Experiment:
    """The experiment with "path.to.field=value". Raises UserError, naming the setting,
    for an unknown field and for a value that the field cannot have.
    """
    path, equals, text = setting.partition("=")
    if not equals:
        raise UserError(f"--set {setting}: write path.to.field=value")
    try:
        return _put(experiment, None, path.strip().split("."), text.strip())
    except UserError as error:
        raise UserError(f"--set {setting}: {error}") from None


def _put(value: Any, hint: Any, keys: list[str], text: str) -> Any:
    """`value` with `text` at the end of the path `keys`."""
    if not keys:
        return parse(text, hint)
    key, *rest = keys
    if isinstance(value, tuple):
        if not key.isdigit() or int(key) >= len(value):
            raise UserError(f"{key!r} is no index from 0 to {len(value) - 1}")
        place, item = int(key), _element(hint, int(key))
        new = _put(value[place], item, rest, text)
        return (*value[:place], new, *value[place + 1 :])
    if not is_dataclass(value):
        raise UserError(f"{value!r} has no field {key!r}")
    hints = get_type_hints(type(value))
    if key not in hints:
        known = near(key, hints)
        raise UserError(f"{type(value).__name__} has no field {key!r}{known}")
    return replace(value, **{key: _put(getattr(value, key), hints[key], rest, text)})


def _element(hint: Any, index: int) -> Any:
    """The type of a tuple's element, from the type of the tuple."""
    for kind in members(hint):
        if get_origin(kind) is tuple:
            return elements(kind, index + 1)[index]
    raise TypeError(f"{hint} is no tuple")
