"""Compose one checked :class:`TrainConfig` from what was typed. No torch: a mistake is refused in under a second."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.compat.hydra import forget_initialization
from trainer.config.config_file import ConfigFile, flatten, read_config_file
from trainer.config.dataset_spec import is_template_file
from trainer.config.file_trust import refuse_calls, take_no_grants
from trainer.config.messages import as_typed, config_error
from trainer.config.overrides import split
from trainer.config.paths import absolute_data_path, find_adapter, find_template, find_validation
from trainer.config.rules import check as rules
from trainer.config.rules.tracking import check_trackers_installed
from trainer.config.schema import TrainConfig
from trainer.config.suggestions import (
    FREE,
    ConfigField,
    conf_dir,
    config_fields,
    default_value,
    groups,
)
from trainer.config.taken import HEADING, TAKEN, repeated
from trainer.errors import ConfigError
from trainer.redaction import redact_all

PRIMARY = "train"


def load(
    overrides: Sequence[str] = (),
    config_file: Path | None = None,
    with_data: bool = True,
    only_to_compare: bool = False,
) -> TrainConfig:
    """Compose, convert and check the configuration that ``overrides`` ask for.

    Args:
        overrides: Hydra overrides as typed. They win over every file.
        config_file: a run's ``config.yaml``, which takes the place of ``conf/``, so that groups cannot be chosen on
            top of it; or one with a few keys and options of groups, which starts from ``conf/``.
        with_data: ``False`` does not look up ``data.path`` and ``.validation``: no row will be read.
        only_to_compare: nothing is done with it: what the file would grant is kept as it stands there.

    Returns:
        the resolved configuration; the paths of ``data.path``, ``.validation``, ``.template`` and ``method.adapter``
        absolute.

    Raises:
        ConfigError: one line that names the value, the reason it is refused and a hint.
    """
    choices, values = split(overrides)
    cfg = copy.deepcopy(_schema())
    if config_file is None:
        _assign_all(cfg, flatten(_compose(choices)))
    else:
        file = read_config_file(config_file)
        refuse_calls(file.tree, config_file)
        if not only_to_compare:
            take_no_grants(file.tree, config_file, {name for name, _ in values})
        _assign_file(cfg, file, choices)
    _assign_all(cfg, values)
    config = _resolve(cfg)
    rules.check(config)
    if with_data and not only_to_compare:
        check_trackers_installed(config)
    if config.method.adapter is not None:
        config.method.adapter = str(find_adapter("method.adapter", config.method.adapter))
    if with_data:
        config.data.path = absolute_data_path(config)
    if with_data and isinstance(config.data.validation, str):
        config.data.validation = find_validation(config.data.validation)
    if is_template_file(config.data.template):
        config.data.template = find_template(config.data.template)
    return config


def read_values(config_file: Path) -> dict[str, Any]:
    """Read a config file as ``{dotted key: value}``, just as it stands there: nothing is resolved or checked.

    Raises:
        ConfigError: it cannot be read.
    """
    tree = read_config_file(config_file).tree
    bodies = ((name, body) for name, body in tree.items() if isinstance(body, Mapping))
    return {f"{section}.{key}": value for section, body in bodies for key, value in body.items()}


def sources(overrides: Sequence[str] = (), config_file: Path | None = None) -> dict[str, str]:
    """Return the file of each group: ``{"train": "…/conf/train.yaml", "model": "…/conf/model/tiny.yaml"}``.

    A ``config_file`` comes last, as ``"on top"``; one that is complete is ``"all"`` there is.
    """
    choices: dict[str, str | None] = {}
    if config_file is not None:
        file = read_config_file(config_file)
        if file.is_complete:
            return {"all": str(config_file)}
        choices.update(file.choices)
    chosen = _compose({**choices, **split(overrides)[0]}, with_hydra=True)["hydra"]["runtime"]["choices"]
    files = {PRIMARY: str(conf_dir() / f"{PRIMARY}.yaml")}
    for group in groups():
        if chosen.get(group):
            files[group] = str(conf_dir() / group / f"{chosen[group]}.yaml")
    return files | ({"on top": str(config_file)} if config_file else {})


def to_yaml(config: TrainConfig, taken: Mapping[str, Any] | None = None) -> str:
    """Return the complete configuration as YAML, secrets redacted. :func:`load` reads it back to an equal one.

    Args:
        config: all of it.
        taken: by dotted key, what its null, auto and short names stand for in the run that is made with it.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(redact_all(dataclasses.asdict(config))))
    return text + HEADING + yaml.safe_dump({TAKEN: dict(taken)}, sort_keys=False) if taken else text


def _compose(choices: Mapping[str, str | None], with_hydra: bool = False) -> dict[str, Any]:
    """Compose ``conf/`` with these choices, as plain dicts, not to be changed by the caller."""
    typed = (f"~{group}" if option is None else f"{group}={option}" for group, option in choices.items())
    return _composed(tuple(typed), with_hydra)


@cache  # five times the time of a copy
def _schema() -> DictConfig:
    """Return every key with its type and default; not to be changed by the caller."""
    return cast(DictConfig, OmegaConf.structured(TrainConfig))


@cache  # composing is most of the time of load(), and a sweep composes the same files for every run
def _composed(typed: tuple[str, ...], with_hydra: bool) -> dict[str, Any]:
    """Compose once for each set of choices. Makes no folder and leaves logging alone."""
    forget_initialization()
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="afina"):
        cfg = compose(PRIMARY, list(typed), return_hydra_config=with_hydra)
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))


def _refuse_groups(choices: Mapping[str, str | None], config_file: Path) -> None:
    for group, option in choices.items():
        example = next((key for key in config_fields() if key.startswith(f"{group}.")), "method.r")
        reason = f"a group cannot be chosen on top of {config_file}, which is complete"
        raise config_error(group, option, reason, f"set keys instead, such as {example}=VALUE")


def _on_top_of_conf(file: ConfigFile, choices: Mapping[str, str | None]) -> dict[str, Any]:
    """Return ``conf/`` with the file's keys on top; where an option was typed, what it changes wins over them.

    Raises:
        ConfigError: an option was typed that changes nothing, and the file does not leave it as it is.
    """
    below = dict(flatten(_compose(file.choices)))
    base = dict(flatten(_compose({**file.choices, **choices})))
    changed = {name for name in base | below if base.get(name) != below.get(name)}
    for group, option in choices.items():
        inside = next((name for name, _ in file.values() if name.startswith(f"{group}.")), None)
        if inside and not any(name.startswith(f"{group}.") for name in changed):
            reason = f"is what {file.path} starts from, and it sets {inside} on top"
            raise config_error(group, option, reason, f"leave it out, or set {inside}=VALUE")
    return {**base, **{name: value for name, value in file.values() if name not in changed}}


def _assign_file(cfg: DictConfig, file: ConfigFile, choices: Mapping[str, str | None]) -> None:
    """Set every key of a file, those that it leaves out as ``conf/`` has them unless it is complete."""
    if file.is_complete:
        _refuse_groups(choices, file.path)
        given = {**dict(file.values()), **dict(repeated(file.tree, file.taken))}
    else:
        given = _on_top_of_conf(file, choices)
    try:
        _assign_all(cfg, given.items())
    except ConfigError as error:
        raise file.located(error) from error


def _assign_all(cfg: DictConfig, given: Iterable[tuple[str, Any]]) -> None:
    for name, value in given:
        _assign(cfg, name, value)


def _assign(cfg: DictConfig, name: str, value: Any) -> None:
    """Set one key, converted to its type."""
    try:
        OmegaConf.update(cfg, name, value, merge=True, force_add=name.startswith(FREE))
    except OmegaConfBaseException as error:
        raise _type_error(name, value) from error
    except (TypeError, ValueError, AttributeError) as error:  # OmegaConf lets some through for a key below a value
        raise _type_error(name, value) from error


def _type_error(name: str, value: Any) -> ConfigError:
    if name.startswith(FREE):
        return config_error(
            name, value, "must be keys and values", f"for example {FREE}.zero_optimization.overlap_comm=true"
        )
    spec = config_fields()[name]
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    other = "keys and values" if typing.get_origin(spec.base) is dict else "a list such as [a, b]"
    kind = kinds.get(spec.base, other) + (" or null" if spec.optional else "")
    return config_error(name, value, f"must be {kind}", f"for example {as_typed(name, _example(spec, value))}")


def _example(spec: ConfigField, value: Any) -> Any:
    """Return a value of the right type: a list of what was typed, the default where it shows the type."""
    default = default_value(spec.field)
    if typing.get_origin(spec.base) is list and isinstance(value, (str, int, float)):
        return [value]
    if isinstance(default, list):
        return default or ["a", "b"]
    if default in (None, "???"):
        return {int: 16, float: 1.0}.get(spec.base, "VALUE")
    return default


def _resolve(cfg: DictConfig) -> TrainConfig:
    """Resolve interpolations, refuse missing values, convert to dataclasses."""
    for name, value in _unresolved(OmegaConf.to_container(cfg, resolve=False)):
        if "${now:" in value.replace(" ", ""):
            reason = "a clock differs between ranks and restarts"
            raise config_error(name, value, reason, "leave it out: run.name is made from the config")
        if "${hydra:" in value.replace(" ", ""):
            raise config_error(name, value, "Hydra only composes here; its own settings are not there", f"{name}=VALUE")
        try:
            OmegaConf.select(cfg, name)
        except OmegaConfBaseException as error:
            reason = (error.msg or str(error)).splitlines()[0]
            raise config_error(name, value, f"cannot be resolved ({reason})", f"{name}=VALUE") from error
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise config_error(
            "an interpolation", ..., f"cannot be resolved ({error})", "write the value itself"
        ) from error
    for name in sorted(OmegaConf.missing_keys(cfg)):
        example = "my.jsonl" if name == "data.path" else "VALUE"
        raise config_error(
            name, ..., f"must be given: {config_fields()[name].field.metadata['help']}", f"{name}={example}"
        )
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig), "the schema's root must come back as itself"
    return config


def _unresolved(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text that holds an interpolation, with its dotted key."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield from _unresolved(child, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list):
        for child in tree:
            yield from _unresolved(child, name)
    elif isinstance(tree, str) and "${" in tree:
        yield name, tree
