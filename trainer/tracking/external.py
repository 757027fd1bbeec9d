"""What the trackers outside the run folder share: bounded waits, one line for an error, names, numbers, the config."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import yaml

from trainer.compat.hub import connect
from trainer.config import to_yaml
from trainer.config.execution import LogConfig
from trainer.config.schema import TrainConfig
from trainer.redaction import redact, redact_all
from trainer.tracking.files import strict


def run_bounded(work: Callable[[], object], seconds: float) -> str | None:
    """Run ``work`` for at most so long; return what went wrong, or None.

    A thread, since no call of a tracker's client can be cancelled.
    """
    problem = [f"no answer in {math.ceil(seconds)} s"]

    def target() -> None:
        try:
            work()
            problem.clear()
        except Exception as error:
            problem[:] = [first_line(error)]

    thread = threading.Thread(target=target, name="tracker-bounded", daemon=True)
    thread.start()
    thread.join(seconds)
    return problem[0] if problem else None


def first_line(error: Exception) -> str:
    """Return the first line of an error; of pydantic's, whose first one only counts, all of them."""
    text = str(error).strip().splitlines()
    said = " ".join(" ".join(text).split()) if type(error).__name__ == "ValidationError" else (text or [""])[0]
    return redact(f"{type(error).__name__}: {said}" if said else type(error).__name__)


def unreachable(base_url: str) -> str | None:
    """Return why no connection to the server can be made, or None. Behind a proxy only the client itself can tell.

    Asked first because a machine without a network answers this at once, and a client only when its time is up.
    """
    address = urlsplit(base_url)
    if not address.hostname or address.scheme in getproxies():
        return None
    problem = connect(address)
    return f"{address.hostname} cannot be reached ({problem})" if problem else None


def project_name(config: TrainConfig, variable: str) -> str:
    """Return ``log.project``; where that is left at its default, what a variable of the tracker's own says."""
    given = os.environ.get(variable) if config.log.project == LogConfig().project else None
    return given or config.log.project


def redacted_config(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as nested dicts, secrets redacted."""
    content: dict[str, Any] = yaml.safe_load(to_yaml(config))
    return content


def flat_config(config: TrainConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration by dotted keys, secrets redacted, and ``facts`` behind ``facts.``."""
    sections = {**redacted_config(config), "facts": redact_all(strict(facts))}
    return {f"{section}.{key}": value for section, body in sections.items() for key, value in body.items()}


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record, but its step. As in `metrics.jsonl`, one that is not finite is none."""
    values = strict({key: value for key, value in record.items() if key != "step"})
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
