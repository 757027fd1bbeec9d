"""Check the keys that monitor evaluations: best weights, early stopping, overfitting."""

from __future__ import annotations

from trainer.config.messages import as_typed, config_error, nearest, one_line
from trainer.config.schema import LOWER_IS_BETTER, METRICS, TrainConfig

MONITORED_METRICS = (*LOWER_IS_BETTER, *(name for name in METRICS if name != "loss"))


def check_monitor(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` where ``eval.best_metric``, ``patience`` or ``stop_on_overfit`` could do nothing."""
    eval_config = config.eval
    best = eval_config.best_metric
    if best is not None and best not in MONITORED_METRICS:
        hint = f"eval.best_metric={nearest(best, MONITORED_METRICS) or MONITORED_METRICS[0]}"
        raise config_error("eval.best_metric", best, f"must be among {', '.join(MONITORED_METRICS)}", hint)
    _evaluations_to_monitor(config)
    if best is not None:
        _scored("best_metric", best, best, eval_config.metrics)
    elif eval_config.patience is not None:
        _scored("patience", eval_config.patience, "eval_loss", eval_config.metrics)
    if eval_config.stop_on_overfit:
        if eval_config.overfit_gap is None:
            reason = "needs the gap at which to stop, and eval.overfit_gap is null"
            raise config_error(
                "eval.stop_on_overfit", True, reason, "eval.overfit_gap=0.5 or eval.stop_on_overfit=false"
            )
        _scored("stop_on_overfit", True, "eval_loss", eval_config.metrics)


def _evaluations_to_monitor(config: TrainConfig) -> None:
    """Check that there are held-out rows, and evaluations while there is still something to choose or stop."""
    eval_config, held_out = config.eval, config.data.validation
    for name, value in (
        ("best_metric", eval_config.best_metric),
        ("patience", eval_config.patience),
        ("stop_on_overfit", eval_config.stop_on_overfit or None),
    ):
        if value is None:
            continue
        neutral = f"eval.{name}={'false' if value is True else 'null'}"
        if held_out in (0, 0.0):
            reason = "there are no held-out rows to score (data.validation=0)"
            raise config_error(f"eval.{name}", value, reason, f"data.validation=0.1 or {neutral}")
        if not eval_config.every_steps and not eval_config.every_epoch:
            reason = "needs evaluations during training, and there is only the last one"
            raise config_error(
                f"eval.{name}", value, reason, f"eval.every_steps=50, eval.every_epoch=true or {neutral}"
            )


def _scored(name: str, value: object, metric: str, metrics: list[str]) -> None:
    needed = "loss" if metric in LOWER_IS_BETTER else metric
    if needed not in metrics:
        scored = one_line(metrics)
        reason = f"{metric} is not scored: eval.metrics is {scored}"
        hint = as_typed("eval.metrics", [*metrics, needed])
        raise config_error(f"eval.{name}", value, reason, hint)
