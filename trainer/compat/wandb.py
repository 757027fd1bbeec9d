"""wandb: an internal setting that keeps the launch command out of a run's metadata; the records of its files."""

from __future__ import annotations

from typing import Any

from trainer.compat import reach


@reach(
    "wandb.Settings.x_disable_meta",
    upstream="https://github.com/wandb/wandb/pull/9113 (lists it among internal settings)",
    until="wandb can leave `args` alone out of its metadata",
)
def without_metadata(hidden: bool) -> dict[str, bool]:
    """Return the settings with which wandb records no metadata of its own: it holds the command as it was typed.

    Args:
        hidden: the command holds a secret.
    """
    return {"x_disable_meta": hidden}


@reach("wandb.proto.wandb_internal_pb2.Record", until="wandb offers a reader of its `.wandb` files")
def parse_record(content: bytes) -> Any:
    """Parse one record of a `.wandb` file, a protobuf ``Record``: with it a resumed run finds what W&B has already.

    Args:
        content: the whole record, serialized.
    """
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    record.ParseFromString(content)
    return record
