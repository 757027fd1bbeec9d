"""wandb: an internal setting that keeps the launch command out of a run's metadata."""

from __future__ import annotations

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
