"""Every key of the configuration, typed and documented. No torch, no Hydra: plain dataclasses.

A field made with :func:`key` carries its own documentation, its own limits and whether it changes the result, so the
sentence a user reads in ``afina config --keys``, the check that refuses a wrong value and the run's default name cannot
drift apart. The ``method`` group is in ``method.py``, the optimizer's sections are in ``optimization.py``, those that
never change a result in ``execution.py``. Rules that need more than one key are in ``rules/``.
"""

# ruff: noqa: RUF009 - key() returns a dataclass field, made for each class.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.config.dataset_spec import FORMATS, TEXT_UNITS
from trainer.config.execution import (
    CheckpointConfig,
    CompareConfig,
    FaultConfig,
    GenerateConfig,
    LaunchConfig,
    LogConfig,
    SweepConfig,
)
from trainer.config.fields import key
from trainer.config.method import MethodConfig
from trainer.config.optimization import OptimConfig, ScheduleConfig, ZeroConfig

KERNELS: tuple[str, ...] = ("varlen", "lora", "swiglu", "rope", "rms_norm")
GRADIENT_CHECKPOINTING = (False, True, "selective")


@dataclass(slots=True)
class ModelConfig:
    """The base model, how it is held in memory, and what its forward does in training.

    Kernels and gradient checkpointing compute the same products in another order, and ``trust_remote_code`` only
    permits: they do not change the result.
    """

    name_or_path: str = key("smollm2_135m", "a name of `afina fetch`, a local folder, or a hub id")
    revision: str | None = key(None, "branch, tag or commit of a hub model; pin it for repeatable runs")
    dtype: str = key(
        "auto",
        "16-bit type of the forward and backward; auto: bf16 where the hardware has it, else fp16 on GPU, fp32 on CPU",
        choices=("auto", "bf16", "fp16", "fp32"),
        resume_may_change=True,
    )
    attention: str = key(
        "auto",
        "attention kernel; auto: sdpa where the model has it",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
        changes_result=False,
    )
    gradient_checkpointing: Any = key(
        False,
        "recompute activations in the backward; true: all of a layer, about 30 % slower, far less memory; selective: "
        "all but dense linear layers, whose results are kept",
        changes_result=False,
    )
    kernels: Any = key(
        "auto",
        f"fused kernels; auto: those for the device that hold when verified at start-up; none: PyTorch's and PEFT's "
        f"own; or a list of {', '.join(KERNELS)}",
        changes_result=False,
    )
    compile: bool = key(
        False, "compile the decoder layers with torch.compile, which takes minutes at the start", changes_result=False
    )
    neftune_alpha: float | None = key(
        None,
        "NEFTune (Jain et al., 2023): noise on token embeddings in training, up to alpha / sqrt(tokens * width) of a "
        "row; 5 to 15 are usual; null: none",
        gt=0,
        resume_may_change=True,
        newer=True,
    )
    new_tokens: Any = key(
        None,
        "tokens that the tokenizer gets, [word, <|tool|>], trained by method.trainable_tokens; <|…|> are special "
        "(control tokens), all others plain (read wherever a row has them), or say so: {text: <tool>, special: true}",
        newer=True,
    )
    trust_remote_code: bool = key(
        False,
        "run Python code that comes with the model; only for sources you trust; counts when typed",
        changes_result=False,
        grants=True,
    )


@dataclass(slots=True)
class DataConfig:
    """Where the examples come from and how they become tokens.

    How many processes do it, where its result is cached and how many unusable rows are put up with do not change the
    tokens. A checkpoint is bound to the tokens themselves, by their fingerprint.
    """

    path: Any = key(
        "???",
        "a file, folder, glob or hub id; or a list of them, each alone or as {path: …, weight: …, rows: …, format: …}",
    )
    format: str = key("auto", "shape of a row; auto recognises it by its fields", choices=FORMATS)
    columns: dict[str, str] = key({}, "names of your columns, ours to yours: {instruction: question, output: answer}")
    text_unit: str = key(
        "line",
        "what a row of a .txt file is: line (blank ones are left out), paragraph (blank lines between) or file",
        choices=TEXT_UNITS,
        newer=True,
    )
    split: str = key("train", "which split of a dataset that has several; files of a folder tell theirs by name")
    subset: str | None = key(None, "which subset of a hub id that has several (main in openai/gsm8k)")
    revision: str | None = key(None, "commit, tag or branch of a hub id; pin it for repeatable runs")
    template: str = key(
        "chat",
        "chat: the model's own chat template; alpaca: 'Below is an instruction…'; alpaca_short: without that preamble; "
        "plain: prompt and answer put together as they are; or a FILE.jinja, a chat template of your own",
    )
    alpaca_role: str = key(
        "user",
        "chat template only; user: instruction, blank line, input in one user turn; system: instruction as system turn",
        choices=("user", "system"),
    )
    template_kwargs: dict[str, Any] = key(
        {}, "more variables that the chat template reads: {enable_thinking: false}", newer=True
    )
    control_tokens: str = key(
        "text",
        "what a control token is (<|im_start|>) that stands in a row: text, so many characters; or parse, the token "
        "itself, for rows that are rendered already: their own turns say what is in the loss",
        choices=("text", "parse"),
        newer=True,
    )
    max_length: int = key(1024, "longest example in tokens, answer and end token included", ge=8)
    on_too_long: str = key(
        "error",
        "an example longer than max_length: error stops, drop leaves it out, truncate cuts a prompt from its left (a "
        "text at its end), split makes pieces of it and loses nothing",
        choices=("error", "drop", "truncate", "split"),
    )
    train_on: str = key(
        "completion",
        "tokens in the loss (the loss mask); completion: the row's answer (in a chat every assistant turn); assistant: "
        "every assistant turn, history too; last_assistant: the last one only; all: everything",
        choices=("completion", "assistant", "last_assistant", "all"),
    )
    validation: Any = key(0.1, "held-out rows: a number, a share below 1, a split of data.path, or a path; 0: none")
    group_by: str | None = key(
        None,
        "rows that stay on one side of the split; null: those that begin with the same user turn; a column (id, "
        "document): those with one value in it; row: none, each row by itself",
        newer=True,
    )
    max_rows: int | None = key(None, "use only so many training rows, chosen by run.seed", ge=1)
    max_refused: Any = key(
        0, "rows that may be unusable before it is an error: a whole number, or a share below 1", changes_result=False
    )
    workers: int | None = key(
        None, "processes that tokenise; null: one a CPU core for files over 8 MB, else one", ge=1, changes_result=False
    )
    cache_dir: str | None = key(
        None, "folder of the prepared tokens; null: the user's cache folder", changes_result=False
    )


@dataclass(slots=True)
class BatchConfig:
    """How many examples make an update, and how they are cut into device forwards.

    The gradient of a global batch is the same however it is cut, so micro-batch sizes and packing do not change the
    result: they may be lowered when memory is short, and the run resumes.
    """

    global_size: int = key(16, "examples an update, over all devices; the only size that changes the result", ge=1)
    micro_size: int | None = key(
        None, "rows a device forward; null: as many as micro_tokens allow", ge=1, changes_result=False
    )
    micro_tokens: int = key(
        4096,
        "computed tokens (with padding) a device forward: lower it when memory is short",
        ge=8,
        changes_result=False,
    )
    packing: str = key(
        "auto",
        "trie: a shared prefix of rows is computed once, with the same gradient; auto: trie where it is verified",
        choices=("auto", "trie", "padded"),
        changes_result=False,
    )
    epochs: float = key(1.0, "passes over the training rows", gt=0, resume_may_change=True)
    max_steps: int | None = key(None, "stop after so many updates, whatever epochs says", ge=1, resume_may_change=True)


@dataclass(slots=True)
class EvalConfig:
    """Scores on the held-out rows.

    Evaluations look on and change no weight; only the fields that choose which weights a run ends with, and when,
    change the result: ``best_metric``, ``patience``, ``stop_on_overfit``. How often and on what they score counts as
    looking on, also where it decides which weights these have to choose from.
    """

    every_steps: int = key(0, "evaluate every so many steps; 0: only before and after", ge=0, changes_result=False)
    every_epoch: bool = key(False, "evaluate at the end of each pass over the data", changes_result=False)
    before: bool = key(True, "evaluate before the first step, so that the gain is seen", changes_result=False)
    max_rows: int | None = key(None, "use only the first so many held-out rows; null: all", ge=1, changes_result=False)
    metrics: list[str] = key(
        ["loss"],
        "any of loss (and perplexity), choice_accuracy (likeliest letter of a multiple choice), and of written answers "
        "exact_match, f1 (of words), rouge_l, chrf",
        changes_result=False,
    )
    best_metric: str | None = key(
        None,
        "end with the weights of the evaluation that is best by this metric (eval_loss, eval_perplexity, or one of "
        "metrics), saving a checkpoint at each new best; null: with the last weights",
        resume_may_change=True,
    )
    patience: int | None = key(
        None,
        "stop after so many evaluations in a row without a new best by best_metric (null: eval_loss)",
        ge=1,
        resume_may_change=True,
    )
    overfit_gap: float | None = key(
        0.5,
        "warn when eval_loss is more than this above the mean training loss since the evaluation before",
        gt=0,
        changes_result=False,
    )
    stop_on_overfit: bool = key(False, "end the run there", resume_may_change=True)
    batch_size: int = key(32, "rows a device that are generated at once", ge=1, changes_result=False)
    samples: int = key(3, "answers shown after each evaluation that writes any", ge=0, changes_result=False)


@dataclass(slots=True)
class RunConfig:
    """The run folder, its seed and determinism. Only the seed changes the result."""

    name: str | None = key(
        None, "folder name; null: model, method and a digest of the keys that change the result", changes_result=False
    )
    dir: str = key("runs", "where run folders are made", changes_result=False)
    seed: int = key(0, "seed of the split, the order, the adapters' start and dropout", ge=0)
    deterministic: bool = key(
        False,
        "on GPU, take deterministic kernels alone: the same run gives the same bits, slower (a CPU does always)",
        changes_result=False,
    )
    stop_at_step: int | None = key(
        None, "stop for now after so many updates, saved; null goes on bit by bit", ge=1, changes_result=False
    )
    overwrite: bool = key(
        False, "start from step 0; the old folder is moved aside; counts when typed", changes_result=False, grants=True
    )


@dataclass(slots=True)
class TrainConfig:
    """The whole configuration of a run. `config.yaml` in a run folder is one of these, resolved."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    log: LogConfig = field(default_factory=LogConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    run: RunConfig = field(default_factory=RunConfig)


METRICS = ("loss", "choice_accuracy", "exact_match", "f1", "rouge_l", "chrf")
LOWER_IS_BETTER = ("eval_loss", "eval_perplexity")  # what `loss` is called in metrics.jsonl; of all others, higher is
