"""The run's name: the same for the same config on every rank, at every restart, whatever the clock says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from trainer.config.schema import TrainConfig
from trainer.config.suggestions import conf_dir

MAX_SLUG_LENGTH = 40

# What does not change the result: where it is written, how it is watched, started and saved.
_LEFT_OUT_SECTIONS = ("log", "launch", "checkpoint", "compare")
_LEFT_OUT_KEYS = (
    *(("run", "name"), ("run", "dir"), ("run", "overwrite")),
    *(("data", "cache_dir"), ("data", "workers"), ("data", "max_refused")),
)


def run_name(config: TrainConfig) -> str:
    """``run.name``, or ``{model}-{method}-{8 hex digits of the keys that change the result}``."""
    if config.run.name:
        return config.run.name
    slug = re.sub(r"[^a-z0-9]+", "-", Path(config.model.name_or_path).name.lower()).strip("-")[:MAX_SLUG_LENGTH]
    return f"{slug or 'model'}-{method_label(config)}-{_digest(config)}"


def method_label(config: TrainConfig) -> str:
    """The option of ``method`` that gives it (``full``, ``lora``, ``qlora`` for 4 bits, ``qlora_8bit``, ``dora``, …).

    What has no option of its own for a quantised base says its bits: ``ia3_4bit``.
    """
    method = config.method
    kind = "dora" if method.dora else "rslora" if method.rslora else method.name
    if kind == "lora":
        return {16: "lora", 8: "qlora_8bit", 4: "qlora"}[method.bits]
    return kind if method.bits == 16 else f"{kind}_{method.bits}bit"


def run_folder(config: TrainConfig) -> Path:
    """Where the run is written: ``run.dir / run_name``."""
    return Path(config.run.dir).expanduser() / run_name(config)


def _digest(config: TrainConfig) -> str:
    tree = dataclasses.asdict(config)
    for section in _LEFT_OUT_SECTIONS:
        del tree[section]
    for section, name in _LEFT_OUT_KEYS:
        del tree[section][name]
    for name in ("path", "validation", "template"):
        tree["data"][name] = _portable(tree["data"][name])
    tree["method"]["adapter"] = _portable(tree["method"]["adapter"])
    text = json.dumps(tree, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _portable(path: object) -> object:
    """Paths in the checkout relative to it, so that a recipe has the same name in every checkout."""
    root = conf_dir().parent
    if isinstance(path, list):
        return [_portable(item) for item in path]
    if isinstance(path, dict):
        return {key: _portable(value) if key == "path" else value for key, value in path.items()}
    if isinstance(path, str) and Path(path).is_relative_to(root):
        return str(Path(path).relative_to(root))
    return path
