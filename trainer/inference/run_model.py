"""A finished run's model for use: one base in memory, and the adapters that may be put on it by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.config import TrainConfig, find_adapter, load
from trainer.config.dataset_spec import is_template_file
from trainer.config.messages import config_error
from trainer.distributed import process_group as distributed
from trainer.errors import CheckpointError
from trainer.methods import AdapterSwitcher, is_adapter
from trainer.models.embedded import resolve
from trainer.models.loading import compute_dtype, load_model, load_tokenizer
from trainer.silence import silence_libraries

BASE = "base"  # the name of the base alone


@dataclass(slots=True)
class Loaded:
    """A run's model, ready for inference, and what it was trained with.

    Attributes:
        config: the run's.
        switch: the base with what is on it; its ``adapters`` are all that may be.
        tokenizer: the run's.
        world: this process.
        asked: names of what was asked for, the run's own (or the base in its place) first.
        notes: what the user should know of the adapters asked for.
    """

    config: TrainConfig
    switch: AdapterSwitcher
    tokenizer: Any
    world: distributed.World
    asked: list[str]
    notes: list[str]

    @property
    def model(self) -> Any:
        """What answers now."""
        return self.switch.model


def load_run(
    run: Path,
    overrides: Sequence[str] = (),
    *,
    adapter: bool = True,
    adapters: Sequence[str] = (),
    bits: int | None = None,
    device_map: str | None = None,
    with_data: bool = True,
) -> Loaded:
    """The base model of a run with its final adapter on it, or its fully trained model.

    Args:
        run: a run folder.
        overrides: laid over the run's own config.yaml.
        adapter: without it the base model answers as it was before training.
        adapters: others that may be put on the same base: ``NAME=DIR``, or ``base`` for the base alone.
        bits: hold the base in so many bits; ``None``: as in training.
        device_map: handed to transformers (``auto`` spreads the base over the devices); ``None``: one device.
        with_data: false: the run's data may be gone.

    Raises:
        CheckpointError: the run has no final adapter or model, or it does not fit.
        ConfigError: an override or one of ``adapters`` cannot be used.
    """
    silence_libraries()
    config = run_config(run, overrides, with_data)
    choices, first = _choices(run, config, adapter, adapters)
    base, place = _load_base(run, config, choices, bits, device_map)
    switch = AdapterSwitcher(base, choices, place)
    switch.use(first)
    asked = [first, *(name for name in named_adapters(adapters, own_name(run)) if name != first)]
    trained = run / ("model" if config.method.name == "full" else "adapter")
    if adapter or _own_template(run):
        tokenizer = load_tokenizer(str(trained), dataclasses.replace(config.model, revision=None))
    else:
        tokenizer = load_tokenizer(_base_folder(config), config.model)
    notes = _notes(config, adapters)
    return Loaded(config, switch, tokenizer, distributed.from_environment(), asked, notes)


def _choices(
    run: Path, config: TrainConfig, adapter: bool, adapters: Sequence[str]
) -> tuple[dict[str, Path | None], str]:
    """What may be on the base, by name, and what is at first."""
    is_full = config.method.name == "full"
    trained = run / ("model" if is_full else "adapter")
    is_there = (trained / "config.json").exists() or is_adapter(trained)
    if adapter and not is_there:
        raise CheckpointError(str(trained), reason="is not there: the run has not finished", hint="train it to its end")
    own = own_name(run)
    others = named_adapters(adapters, own)
    if is_full and adapter:
        if others:
            reason = f"belongs on a base as it was, and {own} has trained all of its weights"
            raise config_error("--adapter", adapters[0], reason, "name the run of an adapter as RUN")
        return {own: None}, own
    mine: dict[str, Path | None] = {own: trained} if is_there and not is_full else {}
    return {**mine, BASE: None, **others}, own if adapter else BASE


def run_config(run: Path, overrides: Sequence[str], with_data: bool = True) -> TrainConfig:
    """A run's configuration for its use: what it started from and would resume from does not matter any more.

    Raises:
        ConfigError: an override cannot be used.
    """
    for typed in overrides:
        if typed.startswith("method.adapter="):
            hint = f"--adapter NAME={typed.partition('=')[2]}"
            raise config_error("method.adapter", typed.partition("=")[2], "is what training starts from", hint)
    past = ["method.adapter=null", "checkpoint.resume=auto", *_own_template(run)]
    return load([*past, *overrides], run / "config.yaml", with_data)


def own_name(run: Path) -> str:
    """What a run's own adapter is called: by its folder."""
    name = run.resolve().name
    return name if name != BASE else "run"


def named_adapters(given: Sequence[str], own: str) -> dict[str, Path | None]:
    """Folders by name of ``--adapter NAME=DIR``; ``base`` has none.

    Raises:
        ConfigError: a name is taken, or no adapter is there.
    """
    found: dict[str, Path | None] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if text == BASE:
            found[BASE] = None
            continue
        if not equals or not name.strip() or not folder.strip():
            reason = f"must be a name and a folder, or {BASE}"
            raise config_error("--adapter", text, reason, f"--adapter {Path(text).name or 'NAME'}={text or 'DIR'}")
        if name in (BASE, own) or name in found or any(c.isspace() for c in name):
            taken = {BASE: "the base alone", own: "the run's own adapter"}.get(name, "another adapter")
            reason = "must hold no space" if any(c.isspace() for c in name) else f"is the name of {taken}"
            raise config_error("--adapter", name, reason, f"--adapter other={folder}")
        found[name] = find_adapter("--adapter", folder)
    return found


def _notes(config: TrainConfig, given: Sequence[str]) -> list[str]:
    """Where an adapter's own run was trained on another base or with another layout of its prompts."""
    notes = []
    for text in given:
        name, _, folder = text.partition("=")
        trained_by = find_adapter("--adapter", folder).parent / "config.yaml" if folder else None
        if trained_by is None or not trained_by.is_file():
            continue
        theirs = OmegaConf.load(trained_by)
        for key, own in (
            ("model.name_or_path", config.model.name_or_path),
            ("model.revision", config.model.revision),
            ("data.template", config.data.template),
            ("data.alpaca_role", config.data.alpaca_role),
        ):
            if (other := OmegaConf.select(theirs, key)) != own and not is_template_file(str(other)):
                notes.append(f"{name} was trained with {key}={other}; here it is {own}")
    return notes


def _load_base(
    run: Path, config: TrainConfig, choices: dict[str, Path | None], bits: int | None, device_map: str | None
) -> tuple[Any, Callable[[Any], Any]]:
    """The base (or, where that is no choice, a fully trained model), and what moves an adapter to where it is."""
    trained = BASE not in choices
    device = distributed.from_environment().device
    method = dataclasses.replace(config.method, bits=config.method.bits if bits is None else bits)
    dtype = compute_dtype(config.model.dtype, device, zero_stage=2)
    folder = str(run / "model") if trained else _base_folder(config)
    keys = dataclasses.replace(config.model, revision=None) if trained else config.model
    base: Any = load_model(folder, keys, method, dtype, device, zero_stage=0, device_map=device_map)

    def place(model: Any) -> Any:
        return model.to(device) if device_map is None and method.bits == 16 else model

    return place(base).eval(), place


def _base_folder(config: TrainConfig) -> str:
    return resolve(config.model.name_or_path, config.model.revision)


def _own_template(run: Path) -> list[str]:
    """What to override when a finished run was trained with a chat template from a file: the tokenizer that it saved
    carries that template, so the file may be gone by now."""
    config = OmegaConf.load(run / "config.yaml")
    saved = any((run / name / "tokenizer_config.json").exists() for name in ("adapter", "model"))
    return ["data.template=chat"] if saved and is_template_file(OmegaConf.select(config, "data.template")) else []
