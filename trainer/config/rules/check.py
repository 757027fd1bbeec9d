"""Check a configuration: each key within its limits, and the rules that need more than one key.

Every rule raises one :class:`ConfigError` with the value, the reason and a hint. Where a flag would silently do
nothing, it is refused: the user meant something by it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.dataset_spec import TEMPLATE_SUFFIXES, TEMPLATES, check_columns, is_template_file
from trainer.config.messages import as_typed, config_error, in_shell, listing, nearest, one_line
from trainer.config.rules.compare import check_compare
from trainer.config.rules.evaluation import check_monitor
from trainer.config.rules.groups import check_groups
from trainer.config.rules.launch import check_launch
from trainer.config.rules.matrix import Cell, check_cell
from trainer.config.rules.method import check_method
from trainer.config.rules.model import check_model
from trainer.config.rules.optimizers import check_optimizer
from trainer.config.rules.schedule import check_schedule
from trainer.config.rules.secrets import check_secrets
from trainer.config.rules.sweep import check_sweep
from trainer.config.rules.tokens import check_tokens
from trainer.config.rules.tracking import check_tracking
from trainer.config.schema import METRICS, DataConfig, TrainConfig
from trainer.config.suggestions import ConfigField, config_fields, default_value
from trainer.errors import ConfigError
from trainer.redaction import redact

MAX_NAME_LENGTH = 128
# What transformers' apply_chat_template takes itself, or passes to the template.
RENDER_ARGUMENTS = frozenset(
    ("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding")
    + ("continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs")
    + ("return_assistant_tokens_mask", "processor_kwargs")
)

# DeepSpeed keys that afina writes, and the key of ours that decides each.
_OURS = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim.*",
    "scheduler": "schedule.*",
    "fp16.enabled": "model.dtype",
    "bf16.enabled": "model.dtype",
    "bfloat16.enabled": "model.dtype",
    "amp": "model.dtype",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer.device": "zero.offload_optimizer",
    "zero_optimization.offload_param.device": "zero.offload_params",
    "zero_optimization.cpu_offload": "zero.offload_optimizer",
    "zero_optimization.cpu_offload_params": "zero.offload_params",
    "zero_allow_untested_optimizer": "nothing: it is always set right",
    "zero_force_ds_cpu_optimizer": "nothing: it is always set right",
}

_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least", operator.ge),
    "gt": ("greater than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}


def check(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` for the first rule that ``config`` breaks."""
    _limits(config)
    check_compare(config.compare)
    for check_section in (check_model, check_secrets, _method, check_tokens, _data, _batch, check_schedule):
        check_section(config)
    for check_section in (check_groups, _zero, _zero_extra, check_optimizer, _evaluation, _generation, check_tracking):
        check_section(config)
    for check_section in (check_launch, _run, check_sweep):
        check_section(config)


def _limits(config: TrainConfig) -> None:
    for name, spec in config_fields().items():
        section, _, entry = name.partition(".")
        value = getattr(getattr(config, section), entry)
        if isinstance(value, float) and not math.isfinite(value):
            raise config_error(name, value, "must be a finite number", f"{name}={_example(spec)}")
        if value is not None:
            _within(name, value, spec)


def _within(name: str, value: Any, spec: ConfigField) -> None:
    limits: Mapping[str, Any] = spec.field.metadata
    if "choices" in limits and value not in limits["choices"]:
        choice = _nearest_choice(value, limits["choices"])
        raise config_error(name, value, f"must be {listing(limits['choices'])}", f"{name}={choice}")
    for limit, (words, holds) in _BOUNDS.items():
        if limit in limits and not holds(value, limits[limit]):
            # An open bound is not itself allowed, so the default is shown instead.
            hint = limits[limit] if limit in ("ge", "le") else _example(spec)
            raise config_error(name, value, f"must be {words} {limits[limit]}", f"{name}={one_line(hint)}")


def _example(spec: ConfigField) -> str:
    """Return the default; it keeps every limit of its own key."""
    return one_line(default_value(spec.field))


def _nearest_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        return nearest(value, choices) or choices[0]
    return min(choices, key=lambda choice: abs(choice - value))


def _method(config: TrainConfig) -> None:
    check_method(config.method)
    cell = Cell(config.method, config.zero.stage, bool(config.model.gradient_checkpointing), config.batch.packing)
    check_cell(cell)


def _template_kwargs(data: DataConfig) -> None:
    given = data.template_kwargs
    example = in_shell("data.template_kwargs", "{enable_thinking: false}")
    if not isinstance(given, dict) or not all(isinstance(name, str) and name.isidentifier() for name in given):
        raise config_error("data.template_kwargs", one_line(given), "must map names to values", example)
    if taken := [name for name in given if name in RENDER_ARGUMENTS]:
        reason = "is what a row is rendered by, not a variable of the template's own"
        raise config_error("data.template_kwargs", taken[0], reason, example)
    if given and data.template != "chat" and not is_template_file(data.template):
        reason = f"needs a chat template, and data.template is {data.template}"
        hint = f"data.template=chat or {as_typed('data.template_kwargs', {})}"
        raise config_error("data.template_kwargs", one_line(given), reason, hint)


def _data(config: TrainConfig) -> None:
    data = config.data
    own = is_template_file(data.template)
    if data.template not in TEMPLATES and not own:
        reason = f"must be {', '.join(TEMPLATES)}, or a file ending in {listing(TEMPLATE_SUFFIXES)}"
        hint = f"data.template={nearest(data.template, TEMPLATES) or TEMPLATES[0]}"
        raise config_error("data.template", data.template or "''", reason, hint)
    if data.alpaca_role == "system" and data.template != "chat" and not own:
        reason = f"needs a chat template, and data.template is {data.template}"
        raise config_error("data.alpaca_role", data.alpaca_role, reason, "data.template=chat or data.alpaca_role=user")
    check_columns("data.columns", data.columns)
    _template_kwargs(data)
    _max_refused(data.max_refused)
    _validation(data.validation)


def _max_refused(value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value < 0 or (isinstance(value, float) and not 0 < value < 1):
        reason = "must be a whole number of rows, at least 0, or a share between 0 and 1"
        whole = round(value) if number and value > 0 else 0
        raise config_error("data.max_refused", value, reason, f"data.max_refused={whole} for rows, or 0.01 for a share")


def _validation(held_out: Any) -> None:
    reason = "must be a whole number of rows, a share between 0 and 1, or a path"
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float, str)) or held_out == "":
        raise config_error("data.validation", held_out, reason, "data.validation=0.1, or 0 to hold out none")
    if isinstance(held_out, int) and held_out < 0:
        raise config_error("data.validation", held_out, reason, "data.validation=0 holds out none")
    if isinstance(held_out, float) and not 0 < held_out < 1:
        whole = abs(round(held_out)) if math.isfinite(held_out) else 0
        raise config_error("data.validation", held_out, reason, f"data.validation={whole} for rows, or 0.1 for a share")


def _batch(config: TrainConfig) -> None:
    batch = config.batch
    if batch.micro_size is not None and batch.micro_size > batch.global_size:
        reason = f"cannot be more than batch.global_size, which is {batch.global_size}"
        raise config_error("batch.micro_size", batch.micro_size, reason, f"batch.micro_size={batch.global_size}")
    if batch.micro_size is None and batch.micro_tokens < config.data.max_length:
        reason = f"cannot hold one example of data.max_length={config.data.max_length} tokens"
        hint = f"batch.micro_tokens={config.data.max_length}, a smaller data.max_length, or batch.micro_size=1"
        raise config_error("batch.micro_tokens", batch.micro_tokens, reason, hint)


def _zero(config: TrainConfig) -> None:
    zero = config.zero
    if zero.offload_params == "cpu" and zero.stage != 3:
        reason = f"parameters can wait in host memory at stage 3 only; zero.stage is {zero.stage}"
        raise config_error("zero.offload_params", "cpu", reason, "zero=stage3_offload or zero.offload_params=none")
    if zero.offload_optimizer == "cpu" and zero.stage == 0:
        reason = "needs split optimizer states, stage 1 or higher; zero.stage is 0"
        raise config_error(
            "zero.offload_optimizer", "cpu", reason, "zero=stage2_offload or zero.offload_optimizer=none"
        )


def _zero_extra(config: TrainConfig) -> None:
    """Refuse a raw DeepSpeed key that overrules what afina sets: whole, in part, or from above. It may only add."""
    for name, value in _flatten_tree(config.zero.extra):
        for ours, decided_by in _OURS.items():
            if name == ours or name.startswith(ours + ".") or ours.startswith(name + "."):
                hint = f"remove it; it is decided by {decided_by}"
                raise config_error(f"zero.extra.{name}", value, f"conflicts with {ours}, which afina sets itself", hint)


def _flatten_tree(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping) and value:
            yield from _flatten_tree(value, name)
        else:
            yield name, value


def _evaluation(config: TrainConfig) -> None:
    scores = config.eval
    if not scores.metrics:
        raise config_error(
            "eval.metrics",
            "[]",
            f"must name at least one of {', '.join(METRICS)}",
            as_typed("eval.metrics", ["loss"]),
        )
    for metric in scores.metrics:
        if metric not in METRICS:
            near = nearest(metric, METRICS) or METRICS[0]
            raise config_error(
                "eval.metrics", metric, f"must be among {', '.join(METRICS)}", as_typed("eval.metrics", [near])
            )
    check_monitor(config)
    if isinstance(config.data.validation, str) or config.data.validation > 0:
        return
    for name, value, neutral in (
        ("every_steps", scores.every_steps, 0),
        ("every_epoch", scores.every_epoch, False),
        ("metrics", scores.metrics, ["loss"]),
    ):
        if value != neutral:
            reason = "there are no held-out rows to score (data.validation=0)"
            hint = f"data.validation=0.1 or {as_typed(f'eval.{name}', neutral)}"
            raise config_error(f"eval.{name}", value, reason, hint)


def _generation(config: TrainConfig) -> None:
    generate = config.generate
    if generate.do_sample:
        return
    for name, value in (("temperature", generate.temperature), ("top_p", generate.top_p)):
        if value != 1.0:
            reason = "has no effect while generate.do_sample is false (greedy)"
            raise config_error(f"generate.{name}", value, reason, f"generate.do_sample=true or generate.{name}=1.0")


def _run(config: TrainConfig) -> None:
    name, resume = config.run.name, config.checkpoint.resume
    if name is not None and (not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) or len(name) > MAX_NAME_LENGTH):
        reason = (
            f"must be a plain folder name: letters, digits, . _ -, at most {MAX_NAME_LENGTH}, not starting with . or -"
        )
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", redact(name)).lstrip(".-")[:MAX_NAME_LENGTH]
        raise config_error("run.name", name if name else "''", reason, f"run.name={plain or 'my-run'}")
    if not config.run.dir.strip():
        raise config_error("run.dir", "''", "must be a folder", "run.dir=runs")
    if resume not in ("auto", "strict", "never") and not Path(resume).expanduser().is_dir():
        raise _no_checkpoint(resume)


def _no_checkpoint(resume: str) -> ConfigError:
    near = nearest(resume, ("auto", "strict", "never"))
    hint = f"checkpoint.resume={near}" if near else "checkpoint.resume=runs/NAME/checkpoints/step-NNNNNNNN"
    return config_error(
        "checkpoint.resume", resume, "must be auto, strict, never or a checkpoint folder that exists", hint
    )
