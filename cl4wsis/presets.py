"""Presets: named ways in which the later steps of a plan learn, laid over the recipe of any plan.

A preset is a TOML file with a ``recipe`` table, like part of a plan. ``reset`` may list fields of the recipe that go
back to their defaults first (``reset = ["semantic.optimizer.inherited_lr"]``). Step 0 is the plan's own, so that all
presets of a run start from the same network; a preset may change how a network learns, not what it is.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl4wsis.config import config_folder, merge, read_toml
from cl4wsis.errors import ConfigError
from cl4wsis.recipe import LEARNING_FIELDS, NetworkSettings, Recipe

_FOLDER = "presets"


def shipped_presets() -> dict[str, str]:
    """Return the presets that come with the package, each with the comment that opens its file."""
    files = sorted((config_folder() / _FOLDER).glob("*.toml"))
    return {file.stem: _opening_comment(file) for file in files}


def find_preset(name: str) -> Path:
    """Resolve a preset given as a TOML file or as the name of one that comes with the package.

    Raises:
        ConfigError: neither exists; the message names the nearest known preset and lists them all.
    """
    shipped = config_folder() / _FOLDER / f"{name}.toml"
    if shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    known = list(shipped_presets())
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    raise ConfigError(f"no preset '{name}'{hint} Known are {', '.join(known)}; or give a TOML file")


def preset_name(name: str) -> str:
    """Return the name under which the steps of a preset stand in a run: for a file, its name without the ending."""
    return find_preset(name).stem


def apply_preset(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Lay a preset over the recipe of a plan.

    Args:
        recipe: resolved, as nested tables: a preset that sets one field of a table keeps the others.
        name: of a preset, or its file.

    Returns:
        The recipe with the preset's fields on top, its name among them.

    Raises:
        ConfigError: there is no such preset, or it sets what is not a preset's to set.
    """
    path = find_preset(name)
    content = read_toml(path)
    reset = content.pop("reset", [])
    _check_content(content, reset, path)
    for field in reset:
        recipe = merge(recipe, _default_of(field, path))
    return merge(recipe, {**content.get("recipe", {}), "preset": path.stem})


def _check_content(content: Mapping[str, Any], reset: Any, path: Path) -> None:
    foreign = sorted(set(content) - {"recipe"})
    if foreign:
        raise ConfigError(
            f"{path}: a preset holds a table 'recipe' and a list 'reset', found {', '.join(foreign)}; "
            "set these in the plan"
        )
    if not isinstance(reset, list) or not all(isinstance(field, str) for field in reset):
        raise ConfigError(f"{path}: 'reset' must be a list of fields of the recipe, found {reset!r}")
    recipe = content.get("recipe", {})
    if not isinstance(recipe, Mapping):
        raise ConfigError(f"{path}: 'recipe' must be a table with fields of the recipe, found {recipe!r}")
    network = recipe.get("network", {})
    if not isinstance(network, Mapping):
        raise ConfigError(f"{path}: 'recipe.network' must be a table with fields of the network, found {network!r}")
    fixed = [f"network.{field}" for field in network if field in _fields_of_step_0()]
    fixed += [field for field in ("seed", "preset") if field in recipe]
    if fixed:
        raise ConfigError(
            f"{path}: recipe.{fixed[0]} cannot be set by a preset: all presets of a run share step 0; "
            f"set it in the plan, or with --set recipe.{fixed[0]}=..."
        )


def _fields_of_step_0() -> set[str]:
    """Name the fields of the network's settings that describe the network itself."""
    return set(NetworkSettings.model_fields) - set(LEARNING_FIELDS)


def _default_of(field: str, path: Path) -> dict[str, Any]:
    """Return the default of a field of the recipe, given by dotted path, as nested tables."""
    value: Any = Recipe().model_dump(mode="json")
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(f"{path}: 'reset' names '{field}', which is no field of the recipe")
        value = value[part]
    for part in reversed(field.split(".")):
        value = {part: value}
    tables: dict[str, Any] = value
    return tables


def _opening_comment(file: Path) -> str:
    """Read the lines of comment at the top of a file."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)
