"""Parse ``data.path`` in all its forms into dataset specs: one file, several, or a mixture with weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from trainer.config.messages import as_typed, config_error, in_grammar, nearest, one_line

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".text", ".arrow", ".gz", ".zst")
FORMATS = ("auto", "alpaca", "chat", "prompt_completion", "text", "multiple_choice")
TEXT_UNITS = ("line", "paragraph", "file")
FIELDS = frozenset(
    ["instruction", "input", "output", "system", "history", "messages", "conversations", "contents", "prompt"]
    + ["completion", "response", "text", "question", "options", "answer", "tools", "functions", "subject"]
)
# What `data.columns` maps: a row's fields, keys of its messages, and a column of true and false: which rows to keep.
COLUMNS = FIELDS | {"user", "assistant", "role", "content", "keep"}
TEMPLATES = ("chat", "alpaca", "alpaca_short", "plain")
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")


@dataclass(slots=True)
class DatasetSpec:
    """One dataset of the training data.

    Attributes:
        path: a file, a folder, a glob, a folder written by ``datasets.save_to_disk``, or a hub id ``owner/name``.
        format: shape of its rows.
        columns: our field names -> its column names (``{instruction: question}``).
        weight: how many times each of its training rows is used in a pass; 0.5 takes a seeded half, 2 takes each twice.
        rows: use exactly so many of its training rows instead, drawn by the seed, repeated when there are fewer.
        split: of a dataset that has several, of a folder or glob by the names of its files.
        revision: commit, tag or branch of a hub id.
        text_unit: what a row of a ``.txt`` file is.
        subset: of a hub id that has several (its configuration, ``main`` in ``openai/gsm8k``).
    """

    path: str
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0
    rows: int | None = None
    split: str = "train"
    revision: str | None = None
    subset: str | None = None
    text_unit: str = "line"


def is_glob(path: str) -> bool:
    """Return whether a path holds a wildcard."""
    return any(c in path for c in "*?[")


def is_hub_id(path: str) -> bool:
    """Return whether a path that is not on this machine may name a data set of the hub: ``owner/name``."""
    shaped = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path)
    return shaped is not None and not path.lower().endswith(DATA_SUFFIXES)


def is_split_name(validation: str) -> bool:
    """Return whether ``data.validation`` names a split of ``data.path``, and no file: one bare word."""
    return re.fullmatch(r"\w+", validation) is not None


def is_template_file(template: str) -> bool:
    """Return whether ``data.template`` names a file with a chat template of the user's own."""
    return template.lower().endswith(TEMPLATE_SUFFIXES)


def check_columns(name: str, columns: Any) -> None:
    """Refuse a mapping of columns that is none, or names a field that no format has.

    Raises:
        ConfigError: with the nearest field.
    """
    if not isinstance(columns, dict) or not all(isinstance(v, str) and v for v in columns.values()):
        raise config_error(
            name,
            one_line(columns),
            "must map our fields to your columns",
            _columns_as_typed(name, {"instruction": "question"}),
        )
    for key, column in columns.items():
        if key not in COLUMNS:
            near = nearest(str(key), sorted(COLUMNS))
            swapped = column if column in COLUMNS else None
            hint = _columns_as_typed(name, {swapped: key} if swapped else {near or "instruction": column})
            reason = f"{key} is no field of ours; they are {', '.join(sorted(COLUMNS))}"
            raise config_error(name, one_line(columns), reason, hint)


def _columns_as_typed(name: str, columns: dict[str, str]) -> str:
    """Return a mapping as it is typed; of one data set among several, as it stands in its entry of the list."""
    return f"columns: {in_grammar(columns)}" if "[" in name else as_typed(name, columns)


def parse_dataset_specs(
    path: Any,
    format: str,
    columns: dict[str, str],
    split: str,
    revision: str | None,
    subset: str | None = None,
    text_unit: str = "line",
) -> list[DatasetSpec]:
    """Parse ``data.path``; what a dataset does not set itself, the ``data`` group sets for all.

    Raises:
        ConfigError: it is not a path, a list of paths, or a list of ``{path: …, weight: …}``.
    """
    reason = "must be a path, a list of paths, or a list of {path: …, weight: …}"
    listed = path if isinstance(path, list) else [path]
    if not listed:
        raise config_error("data.path", "[]", reason, "data.path=my.jsonl")
    specs = []
    for number, item in enumerate(listed):
        name = f"data.path[{number}]" if isinstance(path, list) else "data.path"
        given = {"path": item} if isinstance(item, str) else item
        if not isinstance(given, dict):
            raise config_error(name, one_line(item), reason, "data.path=my.jsonl")
        inherited = {"format": format, "columns": columns, "split": split, "revision": revision, "subset": subset}
        inherited["text_unit"] = text_unit
        specs.append(_dataset_spec(name, given, inherited))
    return specs


def _dataset_spec(name: str, given: dict[str, Any], inherited: dict[str, Any]) -> DatasetSpec:
    known = [f.name for f in fields(DatasetSpec)]
    for key in given:
        if key not in known:
            near = nearest(str(key), known)
            hint = f"did you mean {near}" if near else f"one of {', '.join(known)}"
            raise config_error(f"{name}.{key}", one_line(given[key]), "there is no such key", hint)
    spec = DatasetSpec(**{**inherited, "path": "", **given})
    if not isinstance(spec.path, str) or not spec.path.strip():
        raise config_error(f"{name}.path", one_line(spec.path), "must be a path", f"{name}.path=my.jsonl")
    if spec.format not in FORMATS:
        hint = nearest(str(spec.format), FORMATS) or FORMATS[0]
        raise config_error(f"{name}.format", spec.format, f"must be one of {', '.join(FORMATS)}", f"format: {hint}")
    if spec.text_unit not in TEXT_UNITS:
        reason = f"must be one of {', '.join(TEXT_UNITS)}"
        raise config_error(f"{name}.text_unit", one_line(spec.text_unit), reason, f"text_unit: {TEXT_UNITS[0]}")
    check_columns(f"{name}.columns", spec.columns)
    number = isinstance(spec.weight, int | float) and not isinstance(spec.weight, bool)
    if not number or not 0 < spec.weight < float("inf"):
        raise config_error(f"{name}.weight", one_line(spec.weight), "must be a number above 0", "weight: 1")
    if spec.rows is not None and (isinstance(spec.rows, bool) or not isinstance(spec.rows, int) or spec.rows < 1):
        raise config_error(f"{name}.rows", one_line(spec.rows), "must be a whole number, at least 1", "rows: 1000")
    if spec.rows is not None and spec.weight != 1.0:
        raise config_error(f"{name}.rows", spec.rows, "and weight say the same thing twice", "give rows or weight")
    for key, example in (("split", "train"), ("revision", "main"), ("subset", "main")):
        value = getattr(spec, key)
        if not (isinstance(value, str) and value.strip()) and not (key != "split" and value is None):
            owner = f"{name}.{key}" if key in given else f"data.{key}"
            hint = f"{owner}={example}"
            raise config_error(owner, one_line(value) or "''", "must be a name", hint)
    spec.weight = float(spec.weight)
    return spec
