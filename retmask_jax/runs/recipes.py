"""Recipes: configs by name or path, locked, with overrides from the command line."""

import ast
import difflib
import importlib.util
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path to a .py file, or the name of one shipped in `retmask_jax.configs`."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"config file {name} does not exist")
        return path
    folder = _shipped()
    path = folder / f"{name}.py"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
        raise ValueError(f"there is no config named {name!r}{_hint(name, known)}; shipped are {', '.join(known)}")
    return path


def load_recipe(name: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """The locked ConfigDict of a recipe with overrides (("train.steps", "10"), ...) applied.

    Raises ValueError for an unknown recipe or key, a value of another type than the key has, and a file that does not run
    or makes no such config, with the line where it fails.
    """
    path = find_recipe(name)
    config = _made_by(path)
    _check_keys(path, config)
    for key, text in overrides:
        _override(config, key, text)
    return config.lock()


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values."""
    return json.loads(json.dumps(config.to_dict(), default=lambda value: value.to_dict()))


def _shipped() -> Path:
    """The folder `configs`: next to the package in a clone, inside it when installed."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _made_by(path: Path) -> ConfigDict:
    """What get_config() of a file gives; ValueError, with the line, for whatever goes wrong in it."""
    try:
        module = _module(path)
        config = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:
        frames = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename) == path.resolve()
        ]
        lines = [error.lineno] if isinstance(error, SyntaxError) else frames
        at = f", line {lines[-1]}" if lines else ""
        words = " ".join(str(getattr(error, "msg", error)).split())
        raise ValueError(f"config file {path}{at}: {type(error).__name__}: {words}") from error
    if config is None:
        raise ValueError(f"config file {path} has no function get_config() that returns a config")
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"config file {path}: get_config() gives a {type(config).__name__}, not an ml_collections.ConfigDict"
        )
    return config


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"retmask_recipe_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None  # since it is a .py file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_keys(path: Path, config: ConfigDict) -> None:
    """ValueError where a config lacks a key of the default one, or has a key that nothing reads."""
    default = _module(_shipped() / "default.py")
    whole = default.get_config()
    known, made, task = list(flat(whole)), flat(config), list(default.task(""))
    lacking = next((key for key in known if key not in made), None)
    if lacking:
        raise ValueError(
            f"config file {path} makes no {lacking!r}: begin with retmask_jax.configs.default.get_config()"
        )
    for key in made:
        section, *names = key.split(".")
        if section == "tasks":
            good, near = names[1:] and names[1] in task, [f"tasks.{names[0]}.{name}" for name in task]
        else:
            own = section == "pretrain" or section == "suites" and names[0] not in whole.suites
            good, near = key in known or own or _is_free(whole, key), known
        if not good:
            raise ValueError(f"config file {path} sets {key!r}, which nothing reads{_key_hint(key, near)}")


def _is_free(default, key: str) -> bool:
    """Whether a key stands in a section that is empty by default, which takes any."""
    for part in key.split("."):
        if part not in default:
            return not default
        default = default[part]
    return False


def _override(config, key: str, text: str) -> None:
    *parents, last = key.split(".")
    node = config
    for part in (*parents, last):
        if not hasattr(node, "keys") or part not in node:
            raise ValueError(f"there is no config key {key!r}{_key_hint(key, list(flat(config)))}")
        parent, node = node, node[part]
    with parent.unlocked():
        parent[last] = _parse(key, text, node)


def _parse(key: str, text: str, current: Any) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if current is None:
        return value
    if hasattr(current, "items") and not current and isinstance(value, dict):
        return type(current)(value, allow_dotted_keys=True)  # a name of a model or a task may have a dot
    if isinstance(current, str):
        return text
    if isinstance(current, float) and type(value) is int:
        return float(value)
    if isinstance(current, tuple):
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if type(value) is not type(current) and value is not None:
        raise ValueError(f"config key {key} is of type {type(current).__name__} (now {current!r}), got {text!r}")
    return value


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Every value of a config by its key, such as "train.steps"; ValueError for a name that is no text."""
    values = {}
    for name, value in config.items():
        if not isinstance(name, str):
            raise ValueError(f"config section {prefix[:-1]} has the key {name!r}: names are text")
        values |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return values


def _key_hint(key: str, known: Sequence[str]) -> str:
    """The closest key; else one of the same last name, in another section."""
    elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return _hint(key, known) or (f" (did you mean {elsewhere[0]!r}?)" if elsewhere else "")


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
