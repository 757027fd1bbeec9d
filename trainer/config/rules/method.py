"""Check the ``method`` group: only keys that the method has, all that it needs, and no two in conflict."""

from __future__ import annotations

import dataclasses

from trainer.config.messages import as_typed, config_error, listing, nearest
from trainer.config.method import METHODS, MethodConfig, given
from trainer.config.rules.targets import check_targets
from trainer.config.suggestions import default_value
from trainer.errors import ConfigError

TINIT_SHARE, TFINAL_SHARE, ALLOCATIONS = 0.1, 0.3, 20  # of a run of AdaLoRA whose times are not given


def check_method(method: MethodConfig) -> None:
    """Raise a :class:`ConfigError` for the first rule that the group breaks."""
    _only_its_own(method)
    _all_it_needs(method)
    if "target_modules" in METHODS[method.name].keys:
        check_targets(method)
    _layers(method.layers)
    _init(method)
    _adapter(method)
    _patterns(method)
    _adalora(method)
    _four_bits(method)


def _only_its_own(method: MethodConfig) -> None:
    info = METHODS[method.name]
    for field in dataclasses.fields(MethodConfig):
        neutral = default_value(field)
        value = getattr(method, field.name)
        if field.name == "name" or field.name in info.keys or value == neutral:
            continue
        owners = [name for name, other in METHODS.items() if field.name in other.keys]
        reason = f"has no meaning for {info.title} (method.name={method.name})"
        hint = f"{as_typed(f'method.{field.name}', neutral)}, or method={listing(owners)}"
        if field.name == "r" and method.name == "full":
            hint = "choose all of it with method=full and rank=null, or method=lora"
        elif field.name == "r":
            hint = f"choose it with rank=null, or method={listing(owners)}"
        raise config_error(f"method.{field.name}", value, reason, hint)


def _all_it_needs(method: MethodConfig) -> None:
    info = METHODS[method.name]
    for name, good in info.needs.items():
        if getattr(method, name) is None:
            raise config_error(f"method.{name}", None, f"{info.title} needs it", as_typed(f"method.{name}", good))


def _layers(layers: list[int] | None) -> None:
    if layers is None:
        return
    if not layers or min(layers) < 0 or len(set(layers)) < len(layers):
        hint = f"{as_typed('method.layers', [0, 1, 2])}, or null for all"
        raise config_error("method.layers", layers, "must be one or more layers, each once, counted from 0", hint)


def _init(method: MethodConfig) -> None:
    starts = METHODS[method.name].starts
    if method.init not in starts:
        reason = f"must be {listing(starts)} for {METHODS[method.name].title}"
        raise config_error(
            "method.init", method.init, reason, f"method.init={nearest(method.init, starts) or starts[0]}"
        )
    if method.name == "prompt" and (method.init == "text") != bool(method.init_text):
        if method.init == "text":
            raise config_error(
                "method.init_text", method.init_text, "method.init=text needs words", "method.init_text='…'"
            )
        raise config_error(
            "method.init_text", method.init_text, "is read with method.init=text only", "method.init=text"
        )
    if method.encoder_hidden_size is not None and not method.prefix_projection:
        reason = "is the width of an MLP that there is with method.prefix_projection=true only"
        hint = "method.encoder_hidden_size=null or method.prefix_projection=true"
        raise config_error("method.encoder_hidden_size", method.encoder_hidden_size, reason, hint)
    if method.init == "orthogonal":
        _orthogonal(method)
    if not changes_base(method):
        return
    if method.bits != 16:
        reason = f"takes its start out of the base's weights, which are held in {method.bits} bits"
        raise config_error("method.init", method.init, reason, "method.init=default or method.bits=16")
    if method.dora:
        reason = "changes the base's weights; it is saved as an adapter of twice the rank, which DoRA has no form for"
        raise config_error("method.init", method.init, reason, "method.init=default or method.dora=false")
    if method.rank_pattern or method.alpha_pattern:
        reason = "is saved as an adapter of twice the rank, for which patterns have no form"
        raise config_error(
            "method.init", method.init, reason, "method.init=default, or no rank_pattern and alpha_pattern"
        )


def _adapter(method: MethodConfig) -> None:
    """Check that a saved adapter can be continued: it belongs on the base as it is, and holds no MLP of a prefix."""
    if method.adapter is None:
        return
    if not method.adapter.strip():
        raise config_error(
            "method.adapter", "''", "must be a run or adapter folder", "method.adapter=runs/NAME, or null"
        )
    if changes_base(method):
        reason = (
            f"belongs on the base as it is, and method.init={method.init} takes the start out of the base's weights"
        )
        hint = "method.init=default (an adapter that started so was saved with twice its rank: double method.r too)"
        raise config_error("method.adapter", method.adapter, reason, hint)
    if method.prefix_projection:
        reason = "holds the prefix that was made, not the MLP that made it (method.prefix_projection=true)"
        raise config_error(
            "method.adapter", method.adapter, reason, "method.prefix_projection=false trains the prefix itself"
        )


def _orthogonal(method: MethodConfig) -> None:
    """Refuse what PEFT cannot start so: it halves the ranks, and takes the dtype of the base's weights."""
    if method.bits != 16:
        reason = f"starts in the dtype of the base's weights, which are packed in {method.bits} bits"
        raise config_error("method.init", "orthogonal", reason, "method.init=default or method.bits=16")
    ranks = {"method.r": given(method.r)} | {f"method.rank_pattern.{k}": r for k, r in method.rank_pattern.items()}
    for key, rank in ranks.items():
        if rank % 2:
            reason = "must be even where method.init=orthogonal: one half of the ranks starts A, the other B"
            raise config_error(key, rank, reason, f"{key}={rank + 1}")


def changes_base(method: MethodConfig) -> bool:
    """Return whether the adapters' start is taken out of the base's weights."""
    return method.name == "lora" and method.init not in ("default", "gaussian", "orthogonal")


def _patterns(method: MethodConfig) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        for module, value in getattr(method, name).items():
            if not value > 0:
                hint = as_typed(f"method.{name}", {module: 16})
                raise config_error(f"method.{name}", {module: value}, "must be greater than 0 for every module", hint)


def _adalora(method: MethodConfig) -> None:
    if method.name != "adalora":
        return
    target = given(method.target_r)
    if target >= given(method.init_r):
        reason = f"must be less than method.init_r, which is {method.init_r}: ranks are taken, never given"
        raise config_error("method.target_r", target, reason, f"method.init_r={target * 3 // 2 + 1}")


def _four_bits(method: MethodConfig) -> None:
    if method.bits == 4:
        return
    neutral = MethodConfig()
    for name in ("compute_dtype", "quant_storage"):
        value = getattr(method, name)
        if value != getattr(neutral, name):
            reason = f"is of a base in 4 bits; method.bits is {method.bits}"
            raise config_error(f"method.{name}", value, reason, f"method.{name}=auto or method=qlora")


def adalora_times(method: MethodConfig, total_steps: int) -> tuple[int, int, int]:
    """Return AdaLoRA's ``tinit``, ``tfinal`` and ``deltaT`` in updates; what is null follows from the run's length.

    Args:
        method: checked, ``name`` is adalora.
        total_steps: updates of the whole run.

    Raises:
        ConfigError: no update is left in which ranks are taken.
    """
    tinit = int(TINIT_SHARE * total_steps) if method.tinit is None else method.tinit
    tfinal = int(TFINAL_SHARE * total_steps) if method.tfinal is None else method.tfinal
    between = total_steps - tfinal - tinit
    if between < 1:
        raise _no_time(method, tinit, tfinal, total_steps)
    delta = max(1, between // ALLOCATIONS) if method.deltaT is None else method.deltaT
    if delta > between:
        reason = f"leaves no taking of ranks between update {tinit} and {total_steps - tfinal}"
        raise config_error("method.deltaT", delta, reason, "method.deltaT=null")
    return tinit, tfinal, delta


def _no_time(method: MethodConfig, tinit: int, tfinal: int, total_steps: int) -> ConfigError:
    reason = f"with method.tfinal={tfinal} leaves none of the run's {total_steps} updates to take ranks in"
    hint = "method.tinit=null method.tfinal=null take 10 % and 30 % of the run, or train longer"
    return config_error("method.tinit", tinit, reason, hint)
