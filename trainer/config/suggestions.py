"""List what may be typed, every key, group and option, and suggest the nearest one to a mistake."""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config.messages import config_error, in_shell, listing, nearest, one_line
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError

FREE = "zero.extra"  # the one key whose own keys are DeepSpeed's, not ours
NULLABLE_GROUPS = ("rank", "sweep", "experiment", "debug")  # Hydra has no `group=null`; these may be left out

# Names that users of other trainers bring along, by their last part.
_ALIASES = {
    "lr": "optim.learning_rate",
    "batch_size": "batch.global_size",
    "size": "batch.global_size",
    "per_device_train_batch_size": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size",
    "lora_r": "method.r",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "num_train_epochs": "batch.epochs",
    "output_dir": "run.dir",
    "model_name_or_path": "model.name_or_path",
    "load_in_4bit": "method.bits",
    "max_seq_length": "data.max_length",
}


class Key(NamedTuple):
    """One key of the configuration, for ``afina config --keys`` and ``docs/config.md``."""

    name: str
    type: str
    default: Any
    help: str
    limits: str
    changes_result: bool
    resume_may_change: bool


class ConfigField(NamedTuple):
    """A key's dataclass field with its resolved type: ``base`` is without ``| None``, for which ``optional`` stands."""

    field: dataclasses.Field[Any]
    base: Any
    optional: bool

    @property
    def changes_result(self) -> bool:
        """Return whether another value gives another result; see :func:`trainer.config.fields.key`."""
        return bool(self.field.metadata["changes_result"])

    @property
    def resume_may_change(self) -> bool:
        """Return whether a run may be resumed from a checkpoint that was written with another value."""
        return bool(self.field.metadata["resume_may_change"])


@cache
def config_fields() -> dict[str, ConfigField]:
    """Return every dotted key of the schema, in the schema's order."""
    found: dict[str, ConfigField] = {}
    sections = typing.get_type_hints(TrainConfig)
    for section in dataclasses.fields(TrainConfig):
        hints = typing.get_type_hints(sections[section.name])
        for entry in dataclasses.fields(sections[section.name]):
            parts = typing.get_args(hints[entry.name])
            optional = isinstance(hints[entry.name], types.UnionType) and type(None) in parts
            base = next(part for part in parts if part is not type(None)) if optional else hints[entry.name]
            found[f"{section.name}.{entry.name}"] = ConfigField(entry, base, optional)
    return found


def default_value(entry: dataclasses.Field[Any]) -> Any:
    """Return a field's default; a list or dict is a new one."""
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return entry.default


def keys() -> list[Key]:
    """Return every key, in the schema's order."""
    table = []
    for name, spec in config_fields().items():
        kind = getattr(spec.base, "__name__", str(spec.base)) if spec.base in (int, float, str, bool) else "any"
        kind = {"list": "list", "dict": "dict"}.get(getattr(typing.get_origin(spec.base), "__name__", ""), kind)
        text = f"{kind} | null" if spec.optional else kind
        marks = spec.changes_result, spec.resume_may_change
        table.append(Key(name, text, default_value(spec.field), spec.field.metadata["help"], _limits(spec), *marks))
    return table


def _limits(spec: ConfigField) -> str:
    """Format a field's limits: ``a, b or c``; ``≥ 0, < 1``; or nothing."""
    limits = spec.field.metadata
    if "choices" in limits:
        return listing(limits["choices"])
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return ", ".join(f"{sign} {limits[name]}" for name, sign in signs.items() if name in limits)


def conf_dir() -> Path:
    """Return the folder of ``train.yaml`` and the groups: inside the package in a wheel, else the checkout's."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """Return each group of ``conf/`` with its options."""
    folders = sorted(path for path in conf_dir().iterdir() if path.is_dir())
    found = {folder.name: tuple(sorted(file.stem for file in folder.glob("*.yaml"))) for folder in folders}
    return {name: options for name, options in found.items() if options}


def is_key(name: str) -> bool:
    """Return whether ``name`` is a key that can be set; anything below ``zero.extra`` is."""
    return name in config_fields() or name.startswith(FREE + ".")


def sections() -> tuple[str, ...]:
    """Return the schema's sections, those without a group too."""
    return tuple(section.name for section in dataclasses.fields(TrainConfig))


def unknown_key(name: str, value: object) -> ConfigError:
    """Build the error for a key that does not exist, with the nearest one that does."""
    reason = "there is no such key"
    if name in sections():
        first = next(key for key in config_fields() if key.startswith(name + "."))
        return config_error(name, value, "is a section, not a key", f"set its keys one by one, such as {first}=VALUE")
    group, slash, option = name.partition("/")
    if slash and group in groups():
        return config_error(
            name, value, "a group is chosen by its name", f"{group}={nearest(option, groups()[group]) or 'OPTION'}"
        )
    parent, _, entry = name.rpartition(".")
    if parent in config_fields() and typing.get_origin(config_fields()[parent].base) is dict:
        return config_error(
            name, value, f"{parent} is set as a whole", in_shell(parent, f"{{{entry}:{one_line(value)}}}")
        )
    guesses = _guesses(name)
    if len(guesses) == 1 and guesses[0] in groups():
        chosen = _nearest_option(one_line(value), groups()[guesses[0]])
        return config_error(name, value, "there is no such group", f"{guesses[0]}={chosen or 'OPTION'}")
    if len(guesses) == 1:
        return config_error(name, value, reason, f"did you mean {in_shell(guesses[0], one_line(value))}")
    if guesses:
        return config_error(name, value, reason, f"did you mean {listing(guesses)}")
    section = name.split(".")[0]
    inside = [key for key in config_fields() if key.startswith(section + ".")]
    if inside:
        return config_error(name, value, reason, f"the keys of {section} are {listing(inside)}")
    return config_error(
        name, value, reason, f"the groups are {', '.join(groups())}; `afina config --keys` lists every key"
    )


def _guesses(name: str) -> list[str]:
    """Return keys or groups that ``name`` may stand for; several when its last part is in several sections."""
    section, dot, last = name.rpartition(".")
    first, _, rest = name.removeprefix("zero.").partition(".")
    if name.startswith("zero.") and rest and nearest(first, ["extra"], 0.8):
        return [f"{FREE}.{rest}"]
    close = nearest(name, config_fields(), 0.85) if dot else nearest(name, groups(), 0.75)
    if close and last not in _ALIASES:
        return [close]
    if last in _ALIASES:
        return [_ALIASES[last]]
    by_last: dict[str, list[str]] = {}
    for key in config_fields():
        by_last.setdefault(key.rpartition(".")[2], []).append(key)
    if last.lower() in by_last:
        return by_last[last.lower()]
    if section in sections():
        inside = {key.rpartition(".")[2]: key for key in config_fields() if key.startswith(section + ".")}
        close = nearest(last, inside, 0.5)
        return [inside[close]] if close else []
    close = nearest(name, config_fields())
    if close:
        return [close]
    close = nearest(last, by_last)
    return by_last[close] if close else []


def _nearest_option(word: str, options: tuple[str, ...]) -> str | None:
    """Return the option most like ``word``; a number finds the one that ends in the nearest: ``2`` is ``stage2``."""
    numbered = [option for option in options if option[-1].isdigit()]
    if word.isdigit() and numbered:
        return min(numbered, key=lambda option: abs(int(option[-1]) - int(word)))
    begins = [option for option in options if word and option.startswith(word.lower())]
    return nearest(word, options) or (begins[0] if begins else None)


def unknown_option(group: str, value: object) -> ConfigError:
    """Build the error for an option that a group does not have, with the nearest one and all of them."""
    options, word = groups()[group], one_line(value)
    if group == "rank" and word.isdigit():
        return config_error(
            "rank", value, f"must be one of {', '.join(options)}", f"a rank as a number is method.r={word}"
        )
    near = _nearest_option(word, options)
    reason = f"must be one of {', '.join(options)}" + (" or null" if group in NULLABLE_GROUPS else "")
    return config_error(group, value, reason, f"{group}={near}" if near else f"for example {group}={options[-1]}")
