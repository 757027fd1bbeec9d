"""The configuration: typed keys (``schema``), Hydra composition (``load``), checks (``rules``), identity and names."""

from trainer.config.compose import load, read_values, sources, to_yaml
from trainer.config.identity import changed_fields, changed_result_fields, result_fields, run_identity
from trainer.config.naming import method_label, run_folder, run_name
from trainer.config.overrides import is_sweep
from trainer.config.paths import find_adapter, find_data
from trainer.config.schema import METRICS, TrainConfig
from trainer.config.suggestions import Key, conf_dir, groups, keys
from trainer.config.sweep_axes import expand_sweep

__all__ = [
    "METRICS",
    "Key",
    "TrainConfig",
    "changed_fields",
    "changed_result_fields",
    "conf_dir",
    "expand_sweep",
    "find_adapter",
    "find_data",
    "groups",
    "is_sweep",
    "keys",
    "load",
    "method_label",
    "read_values",
    "result_fields",
    "run_folder",
    "run_identity",
    "run_name",
    "sources",
    "to_yaml",
]
