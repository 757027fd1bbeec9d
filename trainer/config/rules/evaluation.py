"""What must hold of the keys that watch the evaluations: best weights, early stop, overfitting."""

from __future__ import annotations

from trainer.config.messages import nearest, one_line, wrong
from trainer.config.schema import LOWER_IS_BETTER, METRICS, TrainConfig

WATCHABLE = (*LOWER_IS_BETTER, *(name for name in METRICS if name != "loss"))


def check_watch(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` where ``eval.best_metric``, ``patience`` or ``stop_on_overfit`` could do nothing."""
    keys = config.eval
    best = keys.best_metric
    if best is not None and best not in WATCHABLE:
        hint = f"eval.best_metric={nearest(best, WATCHABLE) or WATCHABLE[0]}"
        raise wrong("eval.best_metric", best, f"must be among {', '.join(WATCHABLE)}", hint)
    _something_to_watch(config)
    if best is not None:
        _scored("best_metric", best, best, keys.metrics)
    elif keys.patience is not None:
        _scored("patience", keys.patience, "eval_loss", keys.metrics)
    if keys.stop_on_overfit:
        if keys.overfit_gap is None:
            reason = "needs the gap at which to stop, and eval.overfit_gap is null"
            raise wrong("eval.stop_on_overfit", True, reason, "eval.overfit_gap=0.5 or eval.stop_on_overfit=false")
        _scored("stop_on_overfit", True, "eval_loss", keys.metrics)


def _something_to_watch(config: TrainConfig) -> None:
    """Held-out rows, and evaluations while there is still something to choose or stop."""
    keys, held_out = config.eval, config.data.validation
    for name, value in (
        ("best_metric", keys.best_metric),
        ("patience", keys.patience),
        ("stop_on_overfit", keys.stop_on_overfit or None),
    ):
        if value is None:
            continue
        neutral = f"eval.{name}={'false' if value is True else 'null'}"
        if held_out in (0, 0.0):
            reason = "there are no held-out rows to score (data.validation=0)"
            raise wrong(f"eval.{name}", value, reason, f"data.validation=0.1 or {neutral}")
        if not keys.every_steps and not keys.every_epoch:
            reason = "needs evaluations during training, and there is only the last one"
            raise wrong(f"eval.{name}", value, reason, f"eval.every_steps=50, eval.every_epoch=true or {neutral}")


def _scored(name: str, value: object, metric: str, metrics: list[str]) -> None:
    needed = "loss" if metric in LOWER_IS_BETTER else metric
    if needed not in metrics:
        scored = one_line(metrics)
        reason = f"{metric} is not scored: eval.metrics is {scored}"
        hint = f"eval.metrics={one_line([*metrics, needed])}"
        raise wrong(f"eval.{name}", value, reason, hint)
