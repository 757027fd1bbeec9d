"""Load a finished run's model for inference: one base in memory, and the adapters that may be put on it by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.config import TrainConfig, find_adapter, load, read_values
from trainer.config.dataset_spec import is_template_file
from trainer.config.messages import config_error
from trainer.data.templates.template import Template
from trainer.distributed import process_group as distributed
from trainer.errors import CheckpointError
from trainer.evaluation.generator import Generator, TokenCounter
from trainer.inference.find_base import find_base, warn_of_other_base
from trainer.kernels.rms_norm import patch_rms_norms
from trainer.methods import AdapterSwitcher, is_adapter
from trainer.models.end_tokens import restore_base_eos
from trainer.models.loading import compute_dtype, load_model, load_tokenizer
from trainer.silence import silence_libraries
from trainer.tracking.counter import ProgressCounter

BASE = "base"  # the name of the base alone


@dataclass(slots=True)
class RunModel:
    """Hold a run's model, ready for inference, with its config and tokenizer.

    Attributes:
        config: the run's.
        switcher: the base with the adapter that is on it; its ``adapters`` are all that may be.
        tokenizer: the run's.
        world: this process.
        requested: names of the adapters asked for, the run's own (or the base in its place) first.
        notes: what the user should know of the adapters asked for.
    """

    config: TrainConfig
    switcher: AdapterSwitcher
    tokenizer: Any
    world: distributed.World
    requested: list[str]
    notes: list[str]

    @property
    def model(self) -> Any:
        """Return the base with the adapter that is on it now."""
        return self.switcher.model

    def answer(self, prompt: str, input: str = "", name: str | None = None) -> str:
        """Answer one prompt, in the template of training, as ``afina generate``; the ``generate`` keys say how.

        Args:
            prompt: the instruction.
            input: what the instruction is about, as in an Alpaca row.
            name: of the adapter that answers; ``None``: the one that is on the base.
        """
        config = self.config
        template = Template.from_config(self.tokenizer, config.data)
        model = self.model if name is None else self.switcher.use(name)
        torch.manual_seed(config.run.seed)
        end_ids, opening_ids = template.end_ids(), template.opening_ids()
        generator = Generator(model, self.tokenizer, config.generate, end_ids, model.device, opening_ids=opening_ids)
        ids = template.encode_prompt(prompt, input)
        with ProgressCounter("generating", config.generate.max_new_tokens, "tokens") as counter:
            answer = generator.answer([ids], TokenCounter(counter.advance))[0]
        return generator.decode(answer).strip()


def load_run(
    run: Path,
    overrides: Sequence[str] = (),
    *,
    adapter: bool = True,
    adapters: Sequence[str] = (),
    bits: int | None = None,
    device_map: str | None = None,
    with_data: bool = True,
) -> RunModel:
    """Load the base model of a run with its final adapter on it, or its fully trained model.

    Args:
        run: a run folder.
        overrides: laid over the run's own config.yaml.
        adapter: without it the base model answers as it was before training.
        adapters: others that may be put on the same base: ``NAME=DIR``, or ``base`` for the base alone.
        bits: hold the base in so many bits; ``None``: as in training.
        device_map: passed to transformers (``auto`` spreads the base over the devices); ``None``: one device.
        with_data: false: the run's data may be gone.

    Raises:
        CheckpointError: the run has no final adapter or model, or it does not fit.
        ConfigError: an override or one of ``adapters`` cannot be used.
    """
    silence_libraries()
    config = load_run_config(run, overrides, with_data)
    choices, first = _find_adapters(run, config, adapter, adapters)
    base, place = _load_base(run, config, choices, bits, device_map)
    switcher = AdapterSwitcher(base, choices, place)
    switcher.use(first)
    requested = [first, *(name for name in parse_adapters(adapters, run_adapter_name(run)) if name != first)]
    if adapter or _saved_template_override(run):
        model_config = dataclasses.replace(config.model, revision=None, new_tokens=None)
        saved = _run_model_dir(run, config)
        tokenizer = restore_base_eos(load_tokenizer(str(saved), model_config), saved)
    else:
        tokenizer = load_tokenizer(find_base(run, config), config.model)
    notes = _describe_differences(config, adapters)
    return RunModel(config, switcher, tokenizer, distributed.from_environment(), requested, notes)


def load_run_config(run: Path, overrides: Sequence[str], with_data: bool = True) -> TrainConfig:
    """Load a run's config for inference: neither what it started from nor where it was tracked matters any more.

    Raises:
        ConfigError: an override cannot be used.
    """
    for typed in overrides:
        if typed.startswith("method.adapter="):
            hint = f"--adapter NAME={typed.partition('=')[2]}"
            raise config_error("method.adapter", typed.partition("=")[2], "is what training starts from", hint)
    defaults = ["method.adapter=null", "checkpoint.resume=auto", "log.trackers=[]", *_saved_template_override(run)]
    return load([*defaults, *overrides], run / "config.yaml", with_data)


def run_adapter_name(run: Path) -> str:
    """Return the name of a run's own adapter: its folder's."""
    name = run.resolve().name
    return name if name != BASE else "run"


def parse_adapters(given: Sequence[str], own: str) -> dict[str, Path | None]:
    """Parse ``--adapter NAME=DIR`` into folders by name; ``base`` has none.

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


def _find_adapters(
    run: Path, config: TrainConfig, adapter: bool, adapters: Sequence[str]
) -> tuple[dict[str, Path | None], str]:
    """Return the folders of all adapters that may be on the base, by name, and the name of the first to be."""
    is_full = config.method.name == "full"
    run_model_dir = _run_model_dir(run, config)
    is_there = (run_model_dir / "config.json").exists() or is_adapter(run_model_dir)
    if adapter and not is_there:
        reason = "is not there: the run has not finished"
        raise CheckpointError(str(run_model_dir), reason=reason, hint="train it to its end")
    own = run_adapter_name(run)
    others = parse_adapters(adapters, own)
    if is_full and adapter:
        if others:
            reason = f"belongs on a base as it was, and {own} has trained all of its weights"
            raise config_error("--adapter", adapters[0], reason, "name the run of an adapter as RUN")
        return {own: None}, own
    run_adapter: dict[str, Path | None] = {own: run_model_dir} if is_there and not is_full else {}
    return {**run_adapter, BASE: None, **others}, own if adapter else BASE


def _run_model_dir(run: Path, config: TrainConfig) -> Path:
    """Return the folder with a run's final weights: of its adapter, or of all weights."""
    return run / ("model" if config.method.name == "full" else "adapter")


def _describe_differences(config: TrainConfig, given: Sequence[str]) -> list[str]:
    """Describe where an adapter's own run had another base or another layout of its prompts."""
    notes = []
    for text in given:
        name, _, folder = text.partition("=")
        config_file = find_adapter("--adapter", folder).parent / "config.yaml" if folder else None
        if config_file is None or not config_file.is_file():
            continue
        trained_with = read_values(config_file)
        for key, own in (
            ("model.name_or_path", config.model.name_or_path),
            ("model.revision", config.model.revision),
            ("model.new_tokens", config.model.new_tokens),
            ("data.template", config.data.template),
            ("data.alpaca_role", config.data.alpaca_role),
            ("data.template_kwargs", config.data.template_kwargs or None),
        ):
            other = trained_with.get(key) or None
            if other != own and not is_template_file(str(other)):
                notes.append(f"{name} was trained with {key}={other}; here it is {own}")
    return notes


def _load_base(
    run: Path, config: TrainConfig, choices: dict[str, Path | None], bits: int | None, device_map: str | None
) -> tuple[Any, Callable[[Any], Any]]:
    """Load the base (or a fully trained model, which has none), and return it with what moves an adapter to it."""
    is_full = BASE not in choices
    device = distributed.from_environment().device
    method = dataclasses.replace(config.method, bits=config.method.bits if bits is None else bits)
    dtype = compute_dtype(config.model.dtype, device, zero_stage=2)
    folder = str(_run_model_dir(run, config)) if is_full else find_base(run, config)
    warn_of_other_base(folder, choices)
    own = dataclasses.replace(config.model, revision=None, new_tokens=None)  # a trained model has them
    model_config = own if is_full else config.model
    base: Any = load_model(folder, model_config, method, dtype, device, zero_stage=0, device_map=device_map)
    patch_rms_norms(base)

    def place(model: Any) -> Any:
        return model.to(device) if device_map is None and method.bits == 16 else model

    return place(base).eval(), place


def _saved_template_override(run: Path) -> list[str]:
    """Return what to override when a finished run was trained with a chat template from a file: the tokenizer that it
    saved carries that template, so the file may be gone by now."""
    template = read_values(run / "config.yaml").get("data.template")
    saved = any((run / name / "tokenizer_config.json").exists() for name in ("adapter", "model"))
    return ["data.template=chat"] if saved and is_template_file(str(template)) else []
