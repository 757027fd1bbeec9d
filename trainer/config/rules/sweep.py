"""Check the ``sweep`` group."""

from __future__ import annotations

from trainer.config.messages import as_typed, config_error, listing, nearest
from trainer.config.schema import LOWER_IS_BETTER, TrainConfig

DEFAULT_REDUCTION = 3


def check_sweep(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` for the first rule that the group breaks."""
    sweep = config.sweep
    if sweep.parallel != "auto" and (isinstance(sweep.parallel, bool) or not isinstance(sweep.parallel, int)):
        raise config_error("sweep.parallel", sweep.parallel, "must be auto or a whole number", "sweep.parallel=2")
    if sweep.parallel != "auto" and sweep.parallel < 1:
        raise config_error("sweep.parallel", sweep.parallel, "must be at least 1", "sweep.parallel=1")
    if config.launch.kind == "slurm" and sweep.parallel != "auto":
        reason = "is of one machine, and under Slurm each trial is a job"
        raise config_error("sweep.parallel", sweep.parallel, reason, f"launch.array_parallel={sweep.parallel}")
    _check_fuse(config)
    for multiple in sweep.alpha_over_rank:
        if not multiple > 0:
            reason = "must be multiples of method.r, greater than 0"
            raise config_error("sweep.alpha_over_rank", multiple, reason, as_typed("sweep.alpha_over_rank", [1, 2, 4]))
    if sweep.sampler == "grid" and sweep.trials is not None:
        reason = "a grid has as many trials as combinations"
        raise config_error("sweep.trials", sweep.trials, reason, "sweep.sampler=random or sweep.trials=null")
    _check_metric(config)
    _check_stopping(config)


def _check_fuse(config: TrainConfig) -> None:
    fuse = config.sweep.fuse
    if fuse in ("auto", "off"):
        return
    if isinstance(fuse, bool) or not isinstance(fuse, int):
        raise config_error("sweep.fuse", fuse, "must be auto, off or a whole number", "sweep.fuse=8")
    if fuse < 1:
        raise config_error("sweep.fuse", fuse, "must be at least 1", "sweep.fuse=off")
    if config.launch.kind == "slurm":
        reason = "is of trials that one process trains, and under Slurm each trial is a job"
        raise config_error("sweep.fuse", fuse, reason, "sweep.fuse=auto, or launch=torchrun inside one job")


def _check_metric(config: TrainConfig) -> None:
    metric = config.sweep.metric
    scored = [name for name in config.eval.metrics if name != "loss"]
    allowed = (*(LOWER_IS_BETTER if "loss" in config.eval.metrics else ()), *scored, "train_loss")
    if metric is not None and metric not in allowed:
        hint = f"sweep.metric={nearest(metric, allowed) or allowed[0]}, or name it in eval.metrics"
        raise config_error("sweep.metric", metric, f"must be {listing(allowed)}", hint)


def _check_stopping(config: TrainConfig) -> None:
    sweep = config.sweep
    if sweep.early_stopping == "none":
        for name, value, neutral in (
            ("reduction_factor", sweep.reduction_factor, DEFAULT_REDUCTION),
            ("min_steps", sweep.min_steps, None),
        ):
            if value != neutral:
                hint = f"sweep.early_stopping=asha or sweep.{name}={'null' if neutral is None else neutral}"
                raise config_error(f"sweep.{name}", value, "has no effect while sweep.early_stopping is none", hint)
        return
    if sweep.min_steps is None:
        reason = "needs the updates before the first choice"
        raise config_error("sweep.early_stopping", "asha", reason, "sweep.min_steps=20")
    if sweep.sampler == "tpe":
        reason = "tpe learns from trials that have ended, and asha ends few"
        raise config_error("sweep.early_stopping", "asha", reason, "sweep.sampler=random or sweep.early_stopping=none")
