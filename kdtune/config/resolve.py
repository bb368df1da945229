"""Find an object by its dotted path."""

import importlib
import importlib.util
import inspect
from typing import Any

from kdtune._assets import did_you_mean
from kdtune.config.torchtune_keys import component_hint
from kdtune.errors import ConfigError


def resolve(dotted: str) -> Any:
    """Return the object at a dotted path, such as `torch.optim.AdamW`.

    Raises:
        ConfigError: the path is malformed, a module cannot be imported, or has no such name (with the nearest one).
    """
    parts = dotted.split(".") if isinstance(dotted, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{dotted!r} is not a dotted path; write one such as torch.optim.AdamW")
    if parts[0] == "torchtune":
        raise ConfigError(f"{dotted!r} is torchtune's; {component_hint(parts[-1])}")
    target: Any = _import(parts[0], dotted)
    for depth, part in enumerate(parts[1:], start=1):
        if inspect.ismodule(target) and not hasattr(target, part):
            module = ".".join(parts[: depth + 1])
            if _is_module(module):
                target = _import(module, dotted)
                continue
        try:
            target = getattr(target, part)
        except AttributeError:
            holder = ".".join(parts[:depth])
            hint = did_you_mean(part, _public_names(target))
            raise ConfigError(f"{dotted!r} cannot be found: {holder} has no {part!r}{hint}") from None
    return target


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _import(module: str, dotted: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing == module:
            raise ConfigError(
                f"{dotted!r} cannot be found: no module named {module!r}; "
                "it must be installed, or lie in the folder kdtune is started from"
            ) from error
        raise ConfigError(
            f"{dotted!r} cannot be imported: it needs {missing!r}, which is not installed; install it"
        ) from error
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"{dotted!r} cannot be imported: importing {module} raised {type(error).__name__}: {error}"
        ) from error


def _public_names(holder: Any) -> list[str]:
    return [name for name in dir(holder) if not name.startswith("_")]
