"""Check what is sent to a hub: a name with a secret in it would be sent, and stand in the hub's log."""

from __future__ import annotations

from pathlib import Path

from trainer.config.file_trust import texts_in
from trainer.config.messages import config_error
from trainer.config.schema import TrainConfig
from trainer.redaction import redact


def check_secrets(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` where the name of a model or data set holds a secret; files may be called so."""
    model, data = config.model, config.data
    sent = {"model.name_or_path": model.name_or_path, "model.revision": model.revision, "data.path": data.path}
    sent |= {"data.validation": data.validation, "data.subset": data.subset, "data.split": data.split}
    for name, value in sent.items():
        for _, text in texts_in(value):
            if redact(text, name) != text and not Path(text).exists():
                reason = "is no file here, and holds a secret, which would be sent to the hub"
                raise config_error(name, text, reason, "a token belongs into HF_TOKEN, or hf auth login")
