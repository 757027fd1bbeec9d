"""Parse overrides in Hydra's grammar: choices of groups, values of keys, sweeps."""

from __future__ import annotations

import shlex
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from trainer.compat.hydra import overrides_parser
from trainer.config.messages import as_typed, config_error, in_shell
from trainer.config.suggestions import NULLABLE_GROUPS, config_fields, groups, is_key, unknown_key, unknown_option
from trainer.errors import ConfigError

_parser = cache(overrides_parser)


def parse(text: str) -> Override:
    """Parse one override as Hydra reads it.

    Raises:
        ConfigError: it is not ``key=value``, deletes a key, moves a package or is one of Hydra's own settings.
    """
    if text.startswith("~"):
        name = text[1:].split("=")[0]
        raise config_error(text, ..., "a key cannot be deleted", f"set it instead: {name}=null where it may be empty")
    name, equals, value = text.partition("=")
    if text.startswith("-"):
        raise config_error(text, ..., "an override has no dashes", f"{text.lstrip('-')}{'' if equals else '=VALUE'}")
    if not equals:
        hint = f"{name.strip()}=VALUE" if name.strip() else "remove it"
        raise config_error(repr(text), ..., "an override is key=value", hint)
    if not name.strip("+ "):
        raise config_error(text, ..., "an override is key=value", "write the key before the =, such as method.r=16")
    try:
        override: Override = _parser().parse_override(text)
    except (HydraException, ValueError) as error:
        if name.strip("+ ") not in groups() and not is_key(name.strip("+ ")):
            raise unknown_key(name.strip("+ "), value) from error
        hint = f"quote it: {as_typed(name, _as_list(value) if _takes_list(name) else value)}"
        raise config_error(text, ..., "the value is not in Hydra's grammar", hint) from error
    if override.package is not None:
        raise config_error(text, ..., "a group cannot be put elsewhere", in_shell(override.key_or_group, value))
    if override.key_or_group.split("/")[0].split(".")[0] == "hydra":
        raise config_error(text, ..., "Hydra only composes here; its own settings have no effect", "remove it")
    return override


def split(overrides: Sequence[str]) -> tuple[dict[str, str | None], list[tuple[str, Any]]]:
    """Sort overrides into choices of groups and values of keys; of two choices for a group the last one counts.

    Returns:
        ``{group: option or None}`` and ``[(dotted key, value)]`` in the order typed.

    Raises:
        ConfigError: an unknown group, option or key, or several values for one (a sweep).
    """
    choices: dict[str, str | None] = {}
    values: list[tuple[str, Any]] = []
    for text in overrides:
        override = parse(text)
        name = override.key_or_group
        if override.is_sweep_override():
            check_name(name, override)
            raise _several(text, name, override)
        if name in groups():
            choices[name] = _option(name, override)
        else:
            check_name(name, override)
            values.append((name, _value(name, override)))
    return choices, values


def check_name(name: str, override: Override) -> None:
    """Raise a :class:`ConfigError` for what is neither a group nor a key."""
    if name not in groups() and not is_key(name):
        raise unknown_key(name, override.get_value_string())


def _option(group: str, override: Override) -> str | None:
    value = override.value()
    if value is None and group in NULLABLE_GROUPS:
        return None
    if not isinstance(value, str) or value not in groups()[group]:
        raise unknown_option(group, override.get_value_string())
    return value


def _value(name: str, override: Override) -> Any:
    """Return the value; for a text key as typed, since the grammar reads a revision such as ``12345e7`` as a number."""
    value = override.value()
    if name in config_fields() and config_fields()[name].base is str and isinstance(value, (bool, int, float)):
        return override.get_value_string().strip()
    return value


def _several(text: str, name: str, override: Override) -> ConfigError:
    if _takes_list(name) and "[" not in override.get_value_string():
        listed = override.get_value_string()
        reason = "is several values, which a list holds in brackets"
        return config_error(name, listed, reason, as_typed(name, _as_list(listed)))
    sampler = "sweep.sampler=random " if override.is_interval_sweep() else ""
    hint = f"afina sweep {sampler}{shlex.quote(text)}"
    if name in config_fields() and config_fields()[name].base is Any:
        hint += f"; for a list: {in_shell(name, f'[{override.get_value_string()}]')}"
    return config_error(name, override.get_value_string(), "is several values, and a run has one", hint)


def _takes_list(name: str) -> bool:
    """Return whether a key holds a list and nothing else, so that commas cannot be those of a sweep."""
    return name in config_fields() and typing.get_origin(config_fields()[name].base) is list


def _as_list(text: str) -> list[str]:
    """Return what was meant as a list: its items, without brackets and quotes around them."""
    return [item.strip().strip("'\"") for item in text.strip().strip("[]").split(",")]


def is_sweep(overrides: Sequence[str]) -> bool:
    """Return whether any override gives several values: ``a,b``, ``choice(...)``, ``range(...)``."""
    return any(parse(text).is_sweep_override() for text in overrides)
