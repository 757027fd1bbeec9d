"""Read a config file: a run's own ``config.yaml``, which is complete, or one's own with a few keys and options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.messages import config_error, nearest, one_line
from trainer.config.suggestions import (
    NULLABLE_GROUPS,
    config_fields,
    groups,
    is_key,
    sections,
    unknown_key,
    unknown_option,
)
from trainer.config.taken import TAKEN
from trainer.errors import ConfigError

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 50


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What a config file says.

    Attributes:
        path: of the file.
        tree: its sections with their keys, interpolations untouched.
        choices: its options of groups, such as ``method: qlora``.
        lines: in which line a key stands, counted from 1, by dotted key.
        taken: what nulls of a run's own file stood for (``trainer.config.taken``).
    """

    path: Path
    tree: dict[str, Any]
    choices: dict[str, str | None]
    lines: dict[str, int]
    taken: Any = None

    @property
    def is_complete(self) -> bool:
        """Return whether it is a run's own, maybe of another version, and needs nothing of ``conf/``: it chooses no
        group and has most of the keys."""
        named = sum(len(body) for body in self.tree.values() if isinstance(body, Mapping))
        return not self.choices and named > len(config_fields()) / 2

    def values(self) -> Iterator[tuple[str, Any]]:
        """Yield ``(dotted key, value)``.

        Raises:
            ConfigError: the schema lacks a section or key; names the line.
        """
        try:
            yield from flatten(self.tree)
        except ConfigError as error:
            raise self.located(error) from error

    def located(self, error: ConfigError) -> ConfigError:
        """Return an error about a key with the file and line in which it stands."""
        line = self.lines.get(error.what)
        place = f"{self.path}:{line}" if line else str(self.path)
        return ConfigError(f"{place}: {error.what}", value=error.value, reason=error.reason, hint=error.hint)


def read_config_file(path: Path) -> ConfigFile:
    """Read a config file.

    Raises:
        ConfigError: it is not there, cannot be read, or chooses an option that a group does not have.
    """
    if not path.is_file():
        raise config_error("config file", path, "there is no such file", "--config runs/NAME/config.yaml")
    try:
        text = path.read_text(encoding="utf-8")
        _check_size(text)
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        lines = _find_lines(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        reason = one_line(error).split(", column")[0]
        raise config_error("config file", path, f"cannot be read as YAML ({reason})", "fix that line") from error
    if not isinstance(tree, dict) or not tree:
        raise config_error("config file", path, "must hold sections such as model and method", "`afina config > FILE`")
    taken = tree.pop(TAKEN, None)
    found = ConfigFile(path, cast(dict[str, Any], tree), {}, lines, taken)
    try:
        found.choices.update(_take_choices(found.tree))
    except ConfigError as error:
        raise found.located(error) from error
    return found


def flatten(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of every key in ``tree``; a key that the schema lacks is an error."""
    for section, body in tree.items():
        if section not in sections():
            raise _unknown_section(str(section), body)
        if not isinstance(body, Mapping):
            raise config_error(section, body, "must be a section with keys", f"write its keys below {section}:")
        for name, value in body.items():
            if not is_key(f"{section}.{name}"):
                raise unknown_key(f"{section}.{name}", value)
            yield f"{section}.{name}", value


def _unknown_section(section: str, body: object) -> ConfigError:
    if section == "defaults":
        return config_error(section, ..., "is not read here", "choose an option as in `method: qlora`, beside the keys")
    if section in groups():
        option = groups()[section][-1]
        return config_error(section, ..., "is chosen by its name", f"such as `{section}: {option}`")
    if is_key(section):
        parent, _, name = section.partition(".")
        hint = f"write `{parent}: {{{name}: {one_line(body)}}}`"
        return config_error(section, body, "a key stands below its section", hint)
    hint = nearest(section, [*sections(), *groups()]) or f"the sections are {', '.join(sections())}"
    return config_error(section, ..., "there is no such section", hint)


def _take_choices(tree: dict[str, Any]) -> dict[str, str | None]:
    """Take the options of groups out of ``tree``."""
    found: dict[str, str | None] = {}
    for group in groups():
        value = tree.get(group, {})
        if isinstance(value, Mapping) or (value is None and group not in NULLABLE_GROUPS):
            continue
        if value is not None and value not in groups()[group]:
            raise unknown_option(group, value)
        found[group] = tree.pop(group)
    return found


def _check_size(text: str) -> None:
    """Refuse what would grow: a few lines of aliases to aliases are gigabytes once they are read.

    Raises:
        ValueError: says why.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it is longer than {MAX_CHARACTERS} characters")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1} refers to another by *{event.anchor}: write it out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"line {event.start_mark.line + 1} is nested too deep")


def _find_lines(text: str) -> dict[str, int]:
    """Return the line of every section and key, counted from 1."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    lines: dict[str, int] = {}
    for section, body in root.value if isinstance(root, yaml.MappingNode) else []:
        lines[str(section.value)] = section.start_mark.line + 1
        for key, _ in body.value if isinstance(body, yaml.MappingNode) else []:
            lines[f"{section.value}.{key.value}"] = key.start_mark.line + 1
    return lines
