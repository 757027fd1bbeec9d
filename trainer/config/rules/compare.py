"""Check the ``compare`` group and parse its methods."""

from __future__ import annotations

from trainer.config.messages import as_typed, config_error, listing, nearest, one_line
from trainer.config.schema import CompareConfig
from trainer.config.suggestions import config_fields, groups, is_key

CHOSEN = ("optim.learning_rate",)  # keys outside of `method` that a method may bring along


def parse_method(entry: str) -> tuple[str, list[str]]:
    """Parse ``"lora r=8"``: the option ``lora`` and the overrides ``["method.r=8"]``.

    Raises:
        ConfigError: there is no such option or key.
    """
    name = "compare.methods"
    option, *keys = entry.split() or [""]
    options = groups()["method"]
    if option not in options:
        near = nearest(option, options)
        rest = " ".join([near or "lora", *keys])
        raise config_error(name, entry or "''", f"must begin with one of {', '.join(options)}", as_typed(name, [rest]))
    overrides = []
    for text in keys:
        key, equals, value = text.partition("=")
        whole = key if "." in key else f"method.{key}"
        if not equals or not is_key(whole) or not (whole.startswith("method.") or whole in CHOSEN):
            inside = [each.removeprefix("method.") for each in config_fields() if each.startswith("method.")]
            reason = f"{text} is not a key of method with its value, nor {listing(CHOSEN)}=RATE"
            hint = as_typed(name, [f"{option} {nearest(key, inside) or 'r'}={value or 8}"])
            raise config_error(name, entry, reason, hint)
        overrides.append(f"{whole}={value}")
    return option, overrides


def check_compare(compare: CompareConfig) -> None:
    """Raise a :class:`ConfigError` for the first rule that the group breaks."""
    if not compare.methods:
        raise config_error("compare.methods", "[]", "must name a method", as_typed("compare.methods", ["lora", "full"]))
    for entry in compare.methods:
        parse_method(entry)
        if compare.methods.count(entry) > 1:
            raise config_error("compare.methods", entry, "is there twice", "name each method once")
    for multiple in compare.tune:
        if not multiple > 0:
            reason = "must be multiples of the method's own learning rate, greater than 0"
            raise config_error("compare.tune", one_line(multiple), reason, as_typed("compare.tune", [0.3, 1, 3]))
