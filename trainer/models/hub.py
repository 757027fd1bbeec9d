"""Refuse what would have to come from the hub where it cannot be reached, before anything heavy is imported."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from trainer.compat.hub import hub_hint, hub_obstacle, is_obstacle_asked_for, why_not_reached
from trainer.config.dataset_spec import is_glob, is_hub_id, parse_dataset_specs
from trainer.config.schema import DataConfig, TrainConfig
from trainer.errors import DataError, ModelError
from trainer.models.embedded import EMBEDDED

logger = logging.getLogger(__name__)


def check_hub(config: TrainConfig) -> None:
    """Raise at once for a model or a data set that is neither here nor cached, where the hub cannot be reached.

    Asks nothing of the network for a run that needs nothing of the hub. Loads no torch.

    Raises:
        ModelError: the model cannot be had.
        DataError: a data set cannot be had.
    """
    name, revision = config.model.name_or_path, config.model.revision
    if is_hub_model(name) and hub_obstacle() is not None and not _is_model_cached(name, revision):
        raise model_error(name)
    for key, path in _hub_data(config.data):
        if hub_obstacle() is not None and not _is_data_cached(path):
            reason = f"there is no such path on this machine, it is not cached, and {hub_obstacle()}"
            hint = f"correct the path; {hub_hint(key, path, 'hf download --repo-type dataset')}"
            raise DataError(key, value=path, reason=reason, hint=hint)


def is_hub_model(name_or_path: str) -> bool:
    """Return whether a model would be asked of the hub."""
    is_path = name_or_path.startswith(("/", "./", "../", "~"))
    return not is_path and name_or_path not in EMBEDDED and not Path(name_or_path).is_dir()


def model_error(name: str) -> ModelError:
    """Build the error for a model that is not cached, where the hub has not given it."""
    reason = f"is no folder here, is not cached, and {why_not_reached()}"
    return ModelError("model.name_or_path", value=name, reason=reason, hint=hub_hint("model.name_or_path", name))


@cache
def tell_of_cache(name: str) -> None:
    """Log, once, that what is used is what was cached: the hub may have another by now."""
    if hub_obstacle() is not None and not is_obstacle_asked_for():
        logger.info(f"{name} is taken from the cache: {hub_obstacle()}")


def _hub_data(data: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield the key and the id of each data set that is not on this machine."""
    given = [("data.path", data.path)]
    given += [("data.validation", data.validation)] if isinstance(data.validation, str) else []
    for key, path in given:
        for spec in parse_dataset_specs(path, data.format, data.columns, data.split, data.revision, data.subset):
            here = Path(spec.path).expanduser()
            if is_hub_id(spec.path) and not is_glob(spec.path) and not here.exists():
                yield key, spec.path


def _is_model_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:
        return True  # no name of the hub's: transformers says why


def _is_data_cached(name: str) -> bool:
    """Return whether the hub's cache or that of ``datasets`` has anything of a data set."""
    from huggingface_hub import constants

    prepared = os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")
    places = [
        Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}"),
        Path(prepared, name.replace("/", "___")),
    ]
    return any(place.is_dir() for place in places)
