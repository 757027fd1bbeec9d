from __future__ import annotations

from dataclasses import asdict
from typing import Any

from trainer.config.method import METHODS
from trainer.config.schema import TrainConfig


def run_identity(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    means = METHODS[config.method.name].keys | {"name"}
    method = {name: value for name, value in asdict(config.method).items() if name in means - {"dropout"}}
    return {
        "model.name_or_path": config.model.name_or_path,
        "model.revision": config.model.revision,
        "batch.global_size": config.batch.global_size,
        "run.seed": config.run.seed,
        "data": data_fingerprint,
        **{f"method.{k}": v for k, v in method.items()},
    }
