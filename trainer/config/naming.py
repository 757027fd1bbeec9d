"""Name runs: the same name for the same config on every rank, at every restart, at any time."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from trainer.config.identity import result_fields
from trainer.config.schema import TrainConfig
from trainer.config.suggestions import config_fields, default_value

MAX_SLUG_LENGTH = 40


def run_name(config: TrainConfig) -> str:
    """Return ``run.name``, or ``{model}-{method}-{8 hex digits of the fields that change the result}``."""
    if config.run.name:
        return config.run.name
    slug = re.sub(r"[^a-z0-9]+", "-", Path(config.model.name_or_path).name.lower()).strip("-")[:MAX_SLUG_LENGTH]
    return f"{slug or 'model'}-{method_label(config)}-{_digest(config)}"


def method_label(config: TrainConfig) -> str:
    """Return the option of ``method`` that gives it: ``full``, ``lora``, ``qlora`` (4 bits), ``qlora_8bit``, ``dora``…

    What has no option of its own for a quantised base gets its bits: ``ia3_4bit``.
    """
    method = config.method
    kind = "dora" if method.dora else "rslora" if method.rslora else method.name
    kind = kind if method.target_parameters is None else "experts"
    if kind == "lora":
        return {16: "lora", 8: "qlora_8bit", 4: "qlora"}[method.bits]
    return kind if method.bits == 16 else f"{kind}_{method.bits}bit"


def run_folder(config: TrainConfig) -> Path:
    """Return the run folder: ``run.dir / run_name``."""
    return Path(config.run.dir).expanduser() / run_name(config)


def _digest(config: TrainConfig) -> str:
    fields = config_fields()
    counted = {
        name: value
        for name, value in result_fields(config).items()
        if not (fields[name].field.metadata["newer"] and value == default_value(fields[name].field))
    }
    text = json.dumps(counted, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
