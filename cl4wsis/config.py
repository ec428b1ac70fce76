"""Settings read from TOML: ``extends``, dotted overrides, and errors that name the nearest known field.

Every settings class derives from :class:`Settings`: frozen, and closed against unknown fields. A file may name one
other file to start from: ``extends = "base.toml"``, relative to itself, or ``extends = "own-data/base"``, which comes
with the package. Any field can be set from outside with a dotted path (``recipe.base.epochs=5``).
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from cl4wsis.errors import ConfigError

SettingsT = TypeVar("SettingsT", bound="Settings")

_PACKAGE_FOLDER = Path(__file__).resolve().parent


class Settings(BaseModel):
    """Base of all settings: immutable, closed against unknown fields, described by docstrings under the fields.

    The docstrings stay in the source: collecting them would cost every start of the runtime more than all the rest of
    its settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def config_folder() -> Path:
    """Return the folder of the plans that come with the package: inside a wheel, or beside it in a checkout."""
    installed = _PACKAGE_FOLDER / "configs"
    return installed if installed.is_dir() else _PACKAGE_FOLDER.parent / "configs"


def find_config(name: str | Path) -> Path:
    """Resolve a plan given as a file or as the name of one that comes with the package.

    Args:
        name: a path, or a name such as ``shapes`` or ``animals7/4-3``.

    Raises:
        ConfigError: neither exists; the message lists the plans that come with the package.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = config_folder() / f"{name}.toml"
    if shipped.is_file():
        return shipped
    files = (file for file in config_folder().rglob("*.toml") if file.stem != "base" and file.parent.name != "presets")
    known = sorted(str(file.relative_to(config_folder()).with_suffix("")) for file in files)
    raise ConfigError(
        f"no plan '{name}': neither a file nor one of the plans that come with cl4wsis ({', '.join(known)})"
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file and everything it extends, the extending file winning key by key.

    Raises:
        ConfigError: the file cannot be read or parsed, or extends itself.
    """
    return _read_toml(path, ())


def _read_toml(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in readers:
        chain = " -> ".join(p.name for p in (*readers, resolved))
        raise ConfigError(f"{path}: 'extends' runs in a circle: {chain}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # a byte order mark may come first
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from error
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: 'extends' must be the name of one file, found {parent!r}")
    shipped = config_folder() / f"{parent}.toml"
    file = shipped if not parent.endswith(".toml") and shipped.is_file() else path.parent / parent
    if not file.is_file():
        known = sorted(str(p.relative_to(config_folder()).with_suffix("")) for p in config_folder().rglob("*.toml"))
        near = difflib.get_close_matches(parent.lower().removesuffix(".toml"), known, n=1, cutoff=0.5)
        all_known = f"give a file relative to this one, or one that comes with cl4wsis ({', '.join(known)})"
        hint = f"did you mean '{near[0]}', which comes with cl4wsis?" if near else all_known
        raise ConfigError(f"{path}: extends '{parent}', but there is no file {file}; {hint}")
    return merge(_read_toml(file, (*readers, resolved)), tables)


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Combine two nested tables; values of ``top`` win, tables are merged key by key."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Turn ``["a.b=1", "a.c=text"]`` into nested tables; values are TOML, and bare words are strings.

    Raises:
        ConfigError: an assignment has no ``=``, or no field before it.
    """
    tables: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set {assignment}: expected FIELD=VALUE, for example recipe.base.epochs=5")
        value: Any
        try:
            value = tomllib.loads(f"value = {text.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        for part in reversed(parts):
            value = {part: value}
        tables = merge(tables, value)
    return tables


def build_settings(settings_class: type[SettingsT], tables: Mapping[str, Any], source: str) -> SettingsT:
    """Check nested tables against a settings class.

    Args:
        settings_class: what the tables should become.
        tables: nested tables as read from TOML.
        source: name of the file or option, for messages.

    Raises:
        ConfigError: one line per problem, each with the dotted path of the field.
    """
    try:
        return settings_class.model_validate(tables)
    except ValidationError as error:
        problems = [_describe_problem(settings_class, item) for item in error.errors()]
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems)) from error


def _describe_problem(settings_class: type[BaseModel], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    models = _models_at(settings_class, location[:-1])
    field = ".".join(_without_tags(settings_class, location))
    if item["type"] == "extra_forbidden":
        known = sorted({name for model in models for name in model.model_fields})
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        if near:
            return f"unknown field '{field}'; did you mean '{field[: -len(location[-1])]}{near[0]}'?"
        return f"unknown field '{field}'; known here: {', '.join(known) or 'nothing'}"
    if item["type"] == "missing":
        return f"field '{field}' is missing"
    prefix = f"field '{field}': " if field else ""
    found = "" if item["type"].startswith("value_error") else f" (found {item['input']!r})"
    return f"{prefix}{item['msg'].removeprefix('Value error, ')}{found}"


def _is_tag(models: list[type[BaseModel]], part: str) -> bool:
    """Tell whether a part of a location is the tag of a union member rather than a field."""
    return any("kind" in m.model_fields and part in get_args(m.model_fields["kind"].annotation) for m in models)


def _models_at(settings_class: type[BaseModel], location: list[str]) -> list[type[BaseModel]]:
    """List the models that may stand at a location; union members are told apart by their tag."""
    models = [settings_class]
    for part in location:
        if _is_tag(models, part):
            models = [m for m in models if _is_tag([m], part)]
        elif not part.isdigit():
            models = [
                found for m in models if part in m.model_fields for found in _models_in(m.model_fields[part].annotation)
            ]
    return models


def _without_tags(settings_class: type[BaseModel], location: list[str]) -> list[str]:
    return [part for i, part in enumerate(location) if not _is_tag(_models_at(settings_class, location[:i]), part)]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
