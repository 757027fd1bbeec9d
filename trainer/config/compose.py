"""From what the user typed to one checked :class:`TrainConfig`. No torch: a mistake is told in well under a second."""

from __future__ import annotations

import copy
import dataclasses
import glob
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.dataset_spec import TEMPLATES, is_glob, is_hub_id, is_template_file, parse_dataset_specs
from trainer.config.messages import HIDDEN, is_secret_key, nearest, one_line, redact, wrong
from trainer.config.overrides import split
from trainer.config.rules import check as rules
from trainer.config.schema import TrainConfig
from trainer.config.suggestions import (
    FREE,
    ConfigField,
    conf_dir,
    config_fields,
    default_value,
    groups,
    is_key,
    sections,
    unknown_key,
)
from trainer.errors import ConfigError

PRIMARY = "train"


def load(overrides: Sequence[str] = (), config_file: Path | None = None, with_data: bool = True) -> TrainConfig:
    """The checked configuration that ``overrides`` ask for.

    Args:
        overrides: Hydra overrides as typed. They win over every file.
        config_file: a run's ``config.yaml``; it takes the place of ``conf/``, so groups cannot be chosen on top of it.
        with_data: false leaves ``data.path`` and ``.validation`` unlooked for: no row will be read.

    Returns:
        the resolved configuration; the paths of ``data.path``, ``.validation``, ``.template`` and ``method.adapter``
        absolute.

    Raises:
        ConfigError: one line that names the value, the rule it breaks and the cure.
    """
    choices, values = split(overrides)
    if config_file is None:
        tree = _compose(choices)
    else:
        _refuse_groups(choices, config_file)
        tree = _read(config_file)
    cfg = copy.deepcopy(_schema())
    for name, value in [*_flatten(tree), *values]:
        _assign(cfg, name, value)
    config = _resolve(cfg)
    rules.check(config)
    if config.method.adapter is not None:
        config.method.adapter = str(find_adapter("method.adapter", config.method.adapter))
    if with_data:
        config.data.path = _found(config)
    if with_data and isinstance(config.data.validation, str):
        config.data.validation = find_data("data.validation", config.data.validation)
    if is_template_file(config.data.template):
        config.data.template = _find_template(config.data.template)
    return config


def sources(overrides: Sequence[str] = ()) -> dict[str, str]:
    """The file each group was taken from: ``{"train": "…/conf/train.yaml", "model": "…/conf/model/tiny.yaml"}``."""
    chosen = _compose(split(overrides)[0], with_hydra=True)["hydra"]["runtime"]["choices"]
    files = {PRIMARY: str(conf_dir() / f"{PRIMARY}.yaml")}
    for group in groups():
        if chosen.get(group):
            files[group] = str(conf_dir() / group / f"{chosen[group]}.yaml")
    return files


def find_data(name: str, path: str) -> str:
    """The absolute path of data: a file, folder or glob, from the working directory, else beside ``conf/`` (where the
    demo's data is). A hub id (``owner/name``, with no folder ``owner`` here) stays as it is.

    Raises:
        ConfigError: nothing is there.
    """
    for whole in _places(path):
        if os.path.exists(whole) or (is_glob(path) and any(glob.iglob(whole, recursive=True))):
            return whole
    if is_hub_id(path) and not Path(path).parent.is_dir():
        return path
    if is_glob(path):
        raise wrong(name, path, f"matches no file (looked from {Path.cwd()})", f"{name}='FOLDER/*.jsonl'")
    raise _no_file(name, path, f"{name}=PATH/TO/FILE.jsonl")


def find_adapter(name: str, path: str) -> Path:
    """The absolute folder of a saved adapter: of an adapter folder, of a run's, or of a run in ``runs/`` by its name.

    Raises:
        ConfigError: none is there.
    """
    places = [Path(place) for place in (*_places(path), *_places(f"runs/{path}"))]
    for folder in (found for place in places for found in (place, place / "adapter")):
        if (folder / "adapter_config.json").is_file():
            return folder
    if whole := next((place / "model" for place in places if (place / "model" / "config.json").is_file()), None):
        reason = "is a run that trained all weights, so it has no adapter"
        raise wrong(name, path, reason, f"a new run on top of it: model.name_or_path={whole}")
    if any((place / "config.yaml").is_file() for place in places):
        raise wrong(name, path, "is a run that has not finished, so it has no adapter yet", "train it to its end")
    near = nearest(Path(path).name, [run.parent.name for run in Path("runs").glob("*/adapter")], 0.8)
    reason = f"holds no adapter_config.json (looked from {Path.cwd()})"
    raise wrong(name, path, reason, f"did you mean runs/{near}?" if near else "the folder of a finished run, runs/NAME")


def _find_template(path: str) -> str:
    """The absolute path of a chat template of the user's own, looked for like data."""
    whole = next(filter(os.path.isfile, _places(path)), None)
    if whole is None:
        raise _no_file("data.template", path, f"data.template={' | '.join(TEMPLATES)} or FILE.jinja")
    return whole


def _places(path: str) -> list[str]:
    given = Path(path).expanduser()
    return [os.path.normpath(place / given) for place in (Path.cwd(), conf_dir().parent)]


def _no_file(name: str, path: str, hint: str) -> ConfigError:
    """The error for a path where nothing is; a file beside it with nearly that name is proposed."""
    given = Path(path).expanduser()
    beside = os.listdir(given.parent) if os.access(given.parent, os.R_OK) and given.parent.is_dir() else []
    near = nearest(given.name, beside, 0.8)
    hint = f"{name}={given.parent / near}" if near else hint
    return wrong(name, path, f"there is no such file (looked from {Path.cwd()})", hint)


def _found(config: TrainConfig) -> Any:
    """``data.path`` in the form it was given, its paths absolute."""
    data = config.data
    parts = parse_dataset_specs(data.path, data.format, data.columns, data.split, data.revision, data.subset)
    if isinstance(data.path, str):
        return find_data("data.path", data.path)
    found = [find_data(f"data.path[{i}]", part.path) for i, part in enumerate(parts)]
    return [
        path if isinstance(item, str) else {**item, "path": path} for path, item in zip(found, data.path, strict=True)
    ]


def to_yaml(config: TrainConfig) -> str:
    """The complete configuration as YAML, secrets redacted. :func:`load` reads it back to an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(_redacted(dataclasses.asdict(config))))


def _redacted(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _redacted(child, str(key)) for key, child in value.items()}
    if isinstance(value, list):
        return [_redacted(child, name) for child in value]
    if isinstance(value, str):
        return HIDDEN if value and is_secret_key(name) else redact(value)
    return value


def _compose(choices: Mapping[str, str | None], with_hydra: bool = False) -> dict[str, Any]:
    """What ``conf/`` gives for these choices, as plain dicts, not to be changed by the caller."""
    typed = (f"~{group}" if option is None else f"{group}={option}" for group, option in choices.items())
    return _composed(tuple(typed), with_hydra)


@cache  # five times the time of a copy
def _schema() -> DictConfig:
    """Every key with its type and default; not to be changed by the caller."""
    return cast(DictConfig, OmegaConf.structured(TrainConfig))


@cache  # composing is most of the time of load(), and a sweep composes the same files for every run
def _composed(typed: tuple[str, ...], with_hydra: bool) -> dict[str, Any]:
    """Makes no folder and leaves logging alone."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="afina"):
        cfg = compose(PRIMARY, list(typed), return_hydra_config=with_hydra)
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))


def _refuse_groups(choices: Mapping[str, str | None], config_file: Path) -> None:
    for group, option in choices.items():
        example = next((key for key in config_fields() if key.startswith(f"{group}.")), "method.r")
        reason = f"a group cannot be chosen on top of {config_file}, which is complete"
        raise wrong(group, option, reason, f"set keys instead, such as {example}=VALUE")


def _read(config_file: Path) -> dict[str, Any]:
    """A run's ``config.yaml``, interpolations untouched."""
    if not config_file.is_file():
        raise wrong("config file", config_file, "there is no such file", "--config runs/NAME/config.yaml")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(config_file), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        reason = one_line(error).split(", column")[0]
        raise wrong("config file", config_file, f"cannot be read as YAML ({reason})", "mend that line") from error
    if not isinstance(tree, dict) or not tree:
        raise wrong("config file", config_file, "must hold sections such as model and method", "`afina config > FILE`")
    return cast(dict[str, Any], tree)


def _flatten(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """``(dotted key, value)`` of every key in ``tree``; a key that the schema lacks is an error."""
    for section, body in tree.items():
        if section not in sections():
            hint = nearest(str(section), sections()) or f"the sections are {', '.join(sections())}"
            raise wrong(str(section), ..., "there is no such section", hint)
        if not isinstance(body, Mapping):
            raise wrong(section, body, "must be a section with keys", f"write its keys below {section}:")
        for name, value in body.items():
            if not is_key(f"{section}.{name}"):
                raise unknown_key(f"{section}.{name}", value)
            yield f"{section}.{name}", value


def _assign(cfg: DictConfig, name: str, value: Any) -> None:
    """Set one key, converted to its type."""
    try:
        OmegaConf.update(cfg, name, value, merge=True, force_add=name.startswith(FREE))
    except OmegaConfBaseException as error:
        raise _wrong_type(name, value) from error
    except (TypeError, ValueError, AttributeError) as error:  # OmegaConf lets some through for a key below a value
        raise _wrong_type(name, value) from error


def _wrong_type(name: str, value: Any) -> ConfigError:
    if name.startswith(FREE):
        return wrong(name, value, "must be keys and values", f"for example {FREE}.zero_optimization.overlap_comm=true")
    leaf = config_fields()[name]
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    other = "keys and values" if typing.get_origin(leaf.base) is dict else "a list such as [a, b]"
    kind = kinds.get(leaf.base, other) + (" or null" if leaf.optional else "")
    return wrong(name, value, f"must be {kind}", f"for example {name}={_example(leaf)}")


def _example(leaf: ConfigField) -> str:
    """A value of the right type: the default where it shows the type."""
    default = default_value(leaf.field)
    if isinstance(default, list):
        return f"[{','.join(default or ['a', 'b'])}]"
    if default in (None, "???"):
        return {int: "16", float: "1.0"}.get(leaf.base, "VALUE")
    return one_line(default)


def _resolve(cfg: DictConfig) -> TrainConfig:
    """Interpolations replaced, nothing missing, as dataclasses."""
    for name, value in _unresolved(OmegaConf.to_container(cfg, resolve=False)):
        if "${now:" in value.replace(" ", ""):
            reason = "a clock differs between ranks and restarts"
            raise wrong(name, value, reason, "leave it out: run.name is made from the config")
        if "${hydra:" in value.replace(" ", ""):
            raise wrong(name, value, "Hydra only composes here; its own settings are not there", f"{name}=VALUE")
        try:
            OmegaConf.select(cfg, name)
        except OmegaConfBaseException as error:
            reason = (error.msg or str(error)).splitlines()[0]
            raise wrong(name, value, f"cannot be resolved ({reason})", f"{name}=VALUE") from error
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise wrong("an interpolation", ..., f"cannot be resolved ({error})", "write the value itself") from error
    for name in sorted(OmegaConf.missing_keys(cfg)):
        example = "my.jsonl" if name == "data.path" else "VALUE"
        raise wrong(name, ..., f"must be given: {config_fields()[name].field.metadata['help']}", f"{name}={example}")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig), "the schema's root must come back as itself"
    return config


def _unresolved(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text that holds an interpolation, with its dotted key."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield from _unresolved(child, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list):
        for child in tree:
            yield from _unresolved(child, name)
    elif isinstance(tree, str) and "${" in tree:
        yield name, tree
