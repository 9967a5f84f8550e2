"""Configuration: a frozen dataclass per stage, filled from defaults < TOML recipe < `--set key=value` and options.

A recipe is flat: one table per stage (`[extract]`, `[distill]`, `[vqa]`, `[demo]`). An unknown key is an error with a suggestion.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from kdstore.address import is_address, redacted
from kdstore.errors import ConfigError, UnknownName
from kdstore.jsonfile import digest_of

C = TypeVar("C")


def read_recipe(path: Path | str | None, sections: set[str]) -> dict[str, dict[str, Any]]:
    """Read a TOML recipe; raises ConfigError for a missing file, bad TOML or a table that is none of `sections`."""
    if path is None:
        return {}
    try:
        recipe = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"Cannot read the recipe {path}: {getattr(e, 'strerror', e)}.", "Give the path of a TOML file.") from e
    for name, table in recipe.items():
        if name not in sections:
            raise UnknownName.of(f"table in {path}", name, sections)
        if not isinstance(table, dict):
            raise ConfigError(f"'{name}' in {path} is not a table.", f"Write [{name}] and its settings below it.")
    return recipe


def make_config(cls: type[C], *layers: dict[str, Any], where: str = "the options", hint: str = "") -> C:
    """Build `cls` from settings of rising precedence, leaving out None; raises ConfigError for a wrong name or type, or a missing setting.

    `hint` tells where all names stand.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name not in known:
                raise UnknownName.of(f"setting in {where}", name, known, hint)
            if value is not None:
                values[name] = _typed(name, value, hints[name], where)
    needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]  # type: ignore[arg-type]
    if needed:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in needed)
        raise ConfigError(f"{options} is needed.", f"Give it as an option, or as '{needed[0]} = ...' in a recipe.")
    return cls(**values)


def parse_set(pairs: list[str] | None) -> dict[str, Any]:
    """Parse `key=value` options, the value as TOML and, failing that, as text."""
    settings: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair} has no '='.", "Write --set key=value.")
        try:
            settings[name.strip()] = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            settings[name.strip()] = text.strip()
    return settings


def check_at_least_one(config: Any, *names: str) -> None:
    """Raise ConfigError for a setting of these that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"'{name}' must be at least 1, found {getattr(config, name)}.", f"Correct {name}.")


def as_dict(config: Any) -> dict[str, Any]:
    """Return a config as JSON-able settings (tuples as lists), without what is secret in addresses."""
    return {k: [*map(_shown, v)] if isinstance(v, tuple) else _shown(v) for k, v in dataclasses.asdict(config).items()}


def _shown(value: Any) -> Any:
    return redacted(value) if isinstance(value, str) and is_address(value) else value


def config_digest(config: Any, leave_out: tuple[str, ...] = ()) -> str:
    """Digest of the settings that decide a result; `leave_out` names those that do not (device, workers, ...)."""
    return digest_of({k: v for k, v in as_dict(config).items() if k not in leave_out})


def _typed(name: str, value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is tuple and isinstance(value, list | tuple):
            item = typing.get_args(option)[0]
            return tuple(_typed(name, v, item, where) for v in value)
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin in (int, str, bool) and type(value) is origin:
            return value
    wanted = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    quoted = f"""--set '{name}="{value}"'"""  # a version such as 2016 is a number to TOML
    hint = f'Put it in quotes: {name} = "{value}" in a recipe, or {quoted}.' if str in options and type(value) in (int, float) else f"Correct {name}."
    raise ConfigError(f"'{name}' in {where} must be {wanted}, found {value!r}.", hint)
