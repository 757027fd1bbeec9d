"""Find the files that a configuration names: data, saved adapters, chat templates."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

from trainer.config.dataset_spec import TEMPLATES, is_glob, is_hub_id, is_split_name, parse_dataset_specs
from trainer.config.messages import as_typed, config_error, nearest
from trainer.config.schema import TrainConfig
from trainer.config.suggestions import (
    conf_dir,
)
from trainer.errors import ConfigError


def find_data(name: str, path: str) -> str:
    """Return the absolute path of data: a file, folder or glob.

    It is looked for from the working directory, else beside ``conf/`` (where the demo's data is). A hub id
    (``owner/name``, with no folder ``owner`` here) stays as it is.

    Raises:
        ConfigError: nothing is there.
    """
    _refuse_address(name, path)
    for whole in _candidates(path):
        if os.path.exists(whole) or (is_glob(path) and any(glob.iglob(whole, recursive=True))):
            return whole
    if is_hub_id(path) and not Path(path).parent.is_dir():
        return path
    if is_glob(path):
        raise config_error(name, path, f"matches no file (looked from {Path.cwd()})", f"{name}='FOLDER/*.jsonl'")
    raise _missing_file(name, path, f"{name}=PATH/TO/FILE.jsonl")


def _refuse_address(name: str, path: str) -> None:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is None:
        return
    on_hub = re.search(r"(?:huggingface\.co/|hf://)datasets/([\w.-]+/[\w.-]+)", path)
    hint = f"{name}={on_hub[1]}" if on_hub else f"download it first (curl -LO, aws s3 cp …), then {name}=FILE"
    raise config_error(name, path, "is an address, and rows are read from files or from a hub id", hint)


def find_validation(validation: str) -> str:
    """Return the absolute path of held-out data; the name of a split of ``data.path`` stays as it is.

    Raises:
        ConfigError: nothing is there, and it is no word.
    """
    if is_split_name(validation) and not any(map(os.path.exists, _candidates(validation))):
        return validation
    return find_data("data.validation", validation)


def find_adapter(name: str, path: str) -> Path:
    """Return the absolute folder of a saved adapter: an adapter folder, a run's, or that of a run in ``runs/`` by name.

    Raises:
        ConfigError: none is there.
    """
    places = [Path(place) for place in (*_candidates(path), *_candidates(f"runs/{path}"))]
    for folder in (found for place in places for found in (place, place / "adapter")):
        if (folder / "adapter_config.json").is_file():
            return folder
    if whole := next((place / "model" for place in places if (place / "model" / "config.json").is_file()), None):
        reason = "is a run that trained all weights, so it has no adapter"
        raise config_error(name, path, reason, f"a new run on top of it: model.name_or_path={whole}")
    if any((place / "config.yaml").is_file() for place in places):
        raise config_error(
            name, path, "is a run that has not finished, so it has no adapter yet", "train it to its end"
        )
    near = nearest(Path(path).name, [run.parent.name for run in Path("runs").glob("*/adapter")], 0.8)
    reason = f"holds no adapter_config.json (looked from {Path.cwd()})"
    raise config_error(
        name, path, reason, f"did you mean runs/{near}?" if near else "the folder of a finished run, runs/NAME"
    )


def find_template(path: str) -> str:
    """Return the absolute path of a chat template of the user's own, looked for like data."""
    whole = next(filter(os.path.isfile, _candidates(path)), None)
    if whole is None:
        raise _missing_file("data.template", path, f"data.template={' | '.join(TEMPLATES)} or FILE.jinja")
    return whole


def _candidates(path: str) -> list[str]:
    given = Path(path).expanduser()
    return [os.path.normpath(place / given) for place in (Path.cwd(), conf_dir().parent)]


def _missing_file(name: str, path: str, hint: str) -> ConfigError:
    """Build the error for a path where nothing is; a file beside it with nearly that name is proposed."""
    given = Path(path).expanduser()
    beside = os.listdir(given.parent) if os.access(given.parent, os.R_OK) and given.parent.is_dir() else []
    near = nearest(given.name, beside, 0.8)
    if near:  # of one data set among several, its place in the list, which cannot be typed
        hint = f"{name}={given.parent / near}" if "[" in name else as_typed(name, str(given.parent / near))
    return config_error(name, path, f"there is no such file (looked from {Path.cwd()})", hint)


def absolute_data_path(config: TrainConfig) -> Any:
    """Return ``data.path`` in the form it was given, its paths absolute."""
    data = config.data
    specs = parse_dataset_specs(
        data.path, data.format, data.columns, data.split, data.revision, data.subset, data.text_unit
    )
    if isinstance(data.path, str):
        return find_data("data.path", data.path)
    found = [find_data(f"data.path[{i}]", spec.path) for i, spec in enumerate(specs)]
    return [
        path if isinstance(item, str) else {**item, "path": path} for path, item in zip(found, data.path, strict=True)
    ]
