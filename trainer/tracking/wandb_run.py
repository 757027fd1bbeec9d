"""Record a run in Weights & Biases, from rank 0: resumed under the same id after a restart, never delaying training."""

from __future__ import annotations

import importlib
import logging
import netrc
import os
import sys
import uuid
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.compat.wandb import without_metadata
from trainer.config.schema import TrainConfig
from trainer.files import write_atomically
from trainer.redaction import redact, redact_all
from trainer.tracking.external import first_line, project_name, redacted_config, run_bounded, unreachable
from trainer.tracking.files import strict
from trainer.tracking.wandb_file import find_wandb_files, read_steps

# wandb 0.31 waits 90 s for a server at the start and without end for uploads at the finish.
INIT_TIMEOUT_SECONDS = 5.0
FINISH_TIMEOUT_SECONDS = 15.0
# Beyond wandb's own limit: it has let a stuck service process through before.
GRACE_SECONDS = 5.0

logger = logging.getLogger(__name__)

_open: set[int] = set()
"""The runs of this process by ``id``: wandb's service process is theirs together, and goes with the last of them."""


class WandbRun:
    """Record a run in W&B. No method raises; the first problem is logged and ends W&B for this process.

    Args:
        config: the resolved configuration.
        folder: the run folder.
        model_info: what is recorded beside the config.
        records: what earlier lives of the run logged before the step it is resumed after, in the order of steps. A
            kill takes along what wandb's service process had not written or sent: that is logged once more, first.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        model_info: Mapping[str, Any],
        records: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._run: Any = None
        self._module: Any = None
        self._folder = folder
        self._delivered: Container[int] = ()
        mode = wanted_mode(config.log.wandb)
        if mode == "off":
            return
        try:
            earlier_files = find_wandb_files(folder)
            self._start(config, model_info, mode)
        except Exception as error:
            logger.info(f"W&B is off for this run: {first_line(error)}")
            return
        _open.add(id(self))
        self._catch_up(records, earlier_files)

    def log(self, record: Mapping[str, Any]) -> None:
        """Log one record under its own step. A step that an earlier life of the run delivered and that is done again
        is left out: W&B would have it twice."""
        if record["step"] in self._delivered:
            return
        values = {key: value for key, value in record.items() if key != "step"}
        self._send(lambda run: run.log(values, step=record["step"]))

    def alert(self, title: str, text: str) -> None:
        """Send an alert, by mail or as the user has it set; offline, when the run is synced. Like a record, it is
        handed to wandb's own process: nothing is waited for."""
        self._send(lambda run: run.alert(title, text, level="WARN"))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put the summary on the run and finish it, within ``FINISH_TIMEOUT_SECONDS + GRACE_SECONDS``."""
        run, module = self._run, self._module
        self._run = self._module = None
        _open.discard(id(self))
        if module is None:
            return

        def work() -> None:
            try:
                if run is not None:
                    flat = {key: value for key, value in summary.items() if key not in ("metrics", "error")}
                    run.summary.update(strict({**flat, **summary.get("metrics", {})}))
                    run.finish(exit_code=int(summary.get("status") == "failed"))
            finally:
                # Here and not at the exit of the process, where nothing would bound it.
                if not _open:
                    module.teardown()

        problem = run_bounded(work, FINISH_TIMEOUT_SECONDS + GRACE_SECONDS)
        # Without a run the problem was logged when it began.
        if problem and run is not None:
            logger.info(f"W&B did not finish ({problem}); `wandb sync {self._folder / 'wandb'}/*run-*` sends the rest")

    def _send(self, send: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:
            self._run = None
            logger.info(f"W&B stopped recording, training goes on: {first_line(error)}")

    def _catch_up(self, records: Iterable[Mapping[str, Any]], earlier_files: Iterable[Path]) -> None:
        """Log what W&B lacks of ``records``. Offline, it has what the `.wandb` files of earlier lives hold."""
        try:
            # Online the run that the server resumes starts after the last step that it has, or at 0.
            delivered = read_steps(earlier_files) if self._run.offline else range(self._run.starting_step)
        except Exception as error:
            logger.info(f"W&B does not get what a kill of this run may have lost: {first_line(error)}")
            return
        self._delivered = delivered
        for record in records:
            self.log(record)

    def _start(self, config: TrainConfig, model_info: Mapping[str, Any], mode: str) -> None:
        # Set before the import, which reads them: wandb's console lines would tear the bar, and its telemetry holds
        # the end of the process up by 12 s where the server does not answer.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = importlib.import_module("wandb")
        self._module = wandb
        base_url = str(wandb.setup().settings.base_url)
        key = api_key(base_url)
        if mode == "auto":
            mode = "online" if key else "offline"
        problem = None
        if mode == "online":
            problem = unreachable(base_url) if key else "there is no API key; `wandb login`, or set WANDB_API_KEY"
        settings = {
            "silent": True,
            "console": "off",
            "init_timeout": INIT_TIMEOUT_SECONDS,
            "finish_timeout": FINISH_TIMEOUT_SECONDS,
            "finish_timeout_raises": True,
            **without_metadata(hidden=any(redact(argument) != argument for argument in sys.argv)),
        }
        log = config.log
        arguments = {
            **redact_all(
                {
                    **names(config, self._folder),
                    "entity": log.entity,
                    "group": log.group,
                    "tags": list(log.tags) or None,
                    "config": {**redacted_config(config), "facts": strict(model_info)},
                }
            ),
            "dir": str(self._folder),
            "id": _run_id(self._folder),
            "resume": "allow",
            "reinit": "create_new",
        }
        if mode == "online" and not problem:
            try:
                self._run = wandb.init(mode="online", settings=wandb.Settings(api_key=key, **settings), **arguments)
                return
            except Exception as error:
                problem = first_line(error)
            # The service of the failed start still holds the run's id and refuses it to a second start.
            if not _open:
                run_bounded(wandb.teardown, GRACE_SECONDS)
        if problem:
            logger.info(f"W&B records this run offline: {problem}")
        self._run = wandb.init(mode="offline", settings=wandb.Settings(**settings), **arguments)


def names(config: TrainConfig, folder: Path) -> dict[str, str]:
    """Return project and display name: of the config; where that leaves its default, of ``WANDB_PROJECT`` and
    ``WANDB_NAME``. What ``WANDB_DIR`` asks for cannot be: it is said once."""
    given, log = os.environ, config.log
    if given.get("WANDB_DIR"):
        logger.info(f"WANDB_DIR is not taken: what W&B records is in {folder / 'wandb'}, where a resumed run finds it")
    name = log.name or given.get("WANDB_NAME") or config.run.name or folder.name
    return {"project": project_name(config, "WANDB_PROJECT"), "name": name}


def wanted_mode(setting: str) -> str:
    """Return ``auto``, ``online``, ``offline`` or ``off``. `WANDB_MODE` counts where `log.wandb` is auto."""
    if setting != "auto":
        return setting
    modes = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
    return modes.get(os.environ.get("WANDB_MODE", ""), "auto")


def api_key(base_url: str) -> str | None:
    """Return the key wandb itself would use without asking: `WANDB_API_KEY`, else the host's entry in ~/.netrc.

    Found by us because wandb asks on a terminal where it finds none, and a run must not wait for an answer.
    """
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    hosts = [urlsplit(base_url).netloc]
    if hosts[0].endswith((".wandb.ai", ".coreweave.com")):
        # Keys of the public service were filed under this name whatever the address in use is called today.
        hosts.append("api.wandb.ai")
    try:
        entries = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        return None
    found = [entry[2] for host in hosts if (entry := entries.authenticators(host))]
    return found[0] if found else None


def _run_id(folder: Path) -> str:
    """Return the W&B id of this run folder: made once and kept in it, so that a restart resumes the same W&B run."""
    path = folder / "wandb" / "run_id.txt"
    try:
        if known := path.read_text().strip():
            return known
    except OSError:
        pass
    fresh = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
    write_atomically(path, fresh.encode() + b"\n")
    return fresh
