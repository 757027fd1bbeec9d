"""Hydra and OmegaConf: the grammar of overrides, and composing more than once in a process."""

from __future__ import annotations

from typing import Any

from trainer.compat import reach


@reach("hydra.core.override_parser.overrides_parser.OverridesParser", until="Hydra documents a parser of overrides")
def overrides_parser() -> Any:
    """Return Hydra's parser of overrides, without a configuration that they are for.

    Its ``parse_override(text)`` gives an ``Override`` (key, value, sweep) or raises a ``HydraException``.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


@reach(
    "hydra.core.global_hydra.GlobalHydra",
    upstream="https://github.com/hydra-ecosystem/hydra/issues/3364",
    until="initialize_config_dir can be entered where Hydra is initialised already",
)
def forget_initialization() -> None:
    """Let ``initialize_config_dir`` be entered whatever was initialised before in this process."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
