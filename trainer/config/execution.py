"""The sections that say how a run is saved, sampled from, logged and launched; see ``schema.py``.

No field here changes what a run's weights end as, so each is marked ``changes_result=False``.
"""

# ruff: noqa: RUF009 - key() returns a dataclass field, made for each class.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.config.fields import key
from trainer.distributed.rendezvous import RENDEZVOUS_SECONDS


@dataclass(slots=True)
class CheckpointConfig:
    """When the state is saved, and whether a run is resumed from it. A saved run trains on as if it had not been."""

    every_steps: int = key(
        100,
        "save every so many steps; 0: only before evaluations, at the end and when asked to stop",
        ge=0,
        changes_result=False,
    )
    every_minutes: float = key(
        0.0,
        "save after so many minutes without a checkpoint, by rank 0's clock; 0: not by time",
        ge=0,
        changes_result=False,
    )
    every_epoch: bool = key(False, "save at the end of each pass over the data", changes_result=False)
    keep: int = key(2, "complete checkpoints that are kept; older ones are deleted", ge=1, changes_result=False)
    resume: str = key(
        "auto",
        "auto: from the newest good checkpoint of the run; strict: from the newest, an error if it is corrupt; never; "
        "or a checkpoint folder",
        changes_result=False,
    )
    trust_pickle: bool = key(
        False,
        "read checkpoints of method=full by version 0.1, which are pickles; only your own; counts when typed",
        changes_result=False,
        grants=True,
    )


@dataclass(slots=True)
class FaultConfig:
    """What is done when something fails."""

    timeout_seconds: int = key(
        1800,
        "a rank whose stage of a step (data, forward and backward, reduce, update, evaluate) lasts longer ends the run "
        "and names the rank that is waited for; saving is not counted",
        ge=10,
        changes_result=False,
    )
    non_finite: str = key(
        "stop",
        "what a loss or gradient that is not finite does; stop: the run ends, saved as it was before; skip: the step's "
        "update is left out, at most 8 in a row; rewind: also those since the newest checkpoint before it, whose state "
        "is restored",
        choices=("stop", "skip", "rewind"),
        changes_result=False,
    )


@dataclass(slots=True)
class GenerateConfig:
    """How answers are sampled, after training and for scores: no weight depends on it."""

    max_new_tokens: int = key(64, "longest answer in tokens", ge=1, changes_result=False)
    temperature: float = key(
        1.0, "below 1 sharper, above 1 more varied; only with do_sample", gt=0, changes_result=False
    )
    top_p: float = key(
        1.0, "sample from the smallest set with this probability; only with do_sample", gt=0, le=1, changes_result=False
    )
    do_sample: bool = key(False, "sample; false takes the likeliest token each time (greedy)", changes_result=False)


@dataclass(slots=True)
class LogConfig:
    """What is logged and where: it only reports."""

    every_steps: int = key(1, "a line of metrics every so many steps", ge=1, changes_result=False)
    trackers: list[str] = key(
        ["wandb"],
        'where metrics go beside metrics.jsonl: any of wandb, tensorboard and mlflow; "log.trackers=[wandb,mlflow]"',
        changes_result=False,
    )
    wandb: str = key(
        "auto",
        "Weights & Biases; auto: online when a key is set, else offline",
        choices=("auto", "online", "offline", "off"),
        changes_result=False,
    )
    project: str = key(
        "afina",
        "W&B project, MLflow experiment; at this default, $WANDB_PROJECT and $MLFLOW_EXPERIMENT_NAME count",
        changes_result=False,
    )
    entity: str | None = key(None, "W&B team or user; null: the key's own", changes_result=False)
    group: str | None = key(None, "W&B group, MLflow tag, for runs that belong together", changes_result=False)
    name: str | None = key(None, "name in W&B and MLflow; null: $WANDB_NAME (W&B), else run.name", changes_result=False)
    tags: list[str] = key([], "tags in W&B and MLflow", changes_result=False)


@dataclass(slots=True)
class LaunchConfig:
    """How `afina train` starts the job. Of this group `torchrun -m trainer.train` reads rendezvous_seconds alone, and
    `sbatch slurm/train.sbatch` that and max_requeues.

    One global batch gives the same update on any number of processes.
    """

    kind: str = key(
        "here",
        "here: this process; torchrun: one process a device; slurm: submitted with sbatch",
        choices=("here", "torchrun", "slurm"),
        changes_result=False,
    )
    nproc_per_node: int | None = key(None, "processes a node; null: one a GPU, or one", ge=1, changes_result=False)
    nodes: int = key(1, "nodes of the job", ge=1, changes_result=False)
    node_rank: int = key(0, "number of this node, from 0", ge=0, changes_result=False)
    master_address: str = key("127.0.0.1", "host of node 0, as the others reach it", changes_result=False)
    master_port: int = key(
        29500, "port on node 0; 0 picks a free one (one node only)", ge=0, le=65535, changes_result=False
    )
    rendezvous_seconds: int = key(
        RENDEZVOUS_SECONDS, "how long the nodes wait for each other at the start", ge=10, changes_result=False
    )
    gpus_per_node: int | None = key(None, "Slurm: GPUs of each node", ge=1, changes_result=False)
    cpus_per_node: int | None = key(None, "Slurm: cores of each node", ge=1, changes_result=False)
    memory: str | None = key(None, "Slurm: host memory of each node (120G; 0: all of it)", changes_result=False)
    time: str | None = key(None, "Slurm: time limit (04:00:00); null: the partition's", changes_result=False)
    partition: str | None = key(None, "Slurm: partition", changes_result=False)
    account: str | None = key(None, "Slurm: account that pays", changes_result=False)
    qos: str | None = key(None, "Slurm: quality of service", changes_result=False)
    constraint: str | None = key(None, "Slurm: features that the nodes must have", changes_result=False)
    sbatch_args: list[str] = key(
        [], "Slurm: more options of sbatch: \"launch.sbatch_args=['--reservation=mine']\"", changes_result=False
    )
    srun_args: list[str] = key(
        [],
        "Slurm: more options of srun, a container's: \"launch.srun_args=['--container-image=FILE']\"",
        changes_result=False,
    )
    setup: list[str] = key(
        [], "Slurm: shell lines before the job: \"launch.setup=['module load cuda/12.4']\"", changes_result=False
    )
    script: str | None = key(
        None, "Slurm: your own batch script, begun with `afina slurm-script`; null: ours", changes_result=False
    )
    warn_seconds: int | None = key(
        None,
        "Slurm: seconds before the time limit at which the run is asked to save; null: 120, or three saves of it",
        ge=10,
        changes_result=False,
    )
    max_requeues: int = key(
        100, "Slurm: how often a job is put back into the queue; 0: never", ge=0, changes_result=False
    )
    array_parallel: int | None = key(
        None, "Slurm: trials of a sweep that run at once; null: all", ge=1, changes_result=False
    )


@dataclass(slots=True)
class CompareConfig:
    """What `afina compare` puts side by side. No run by itself reads it."""

    methods: list[str] = key(
        [
            *("full", "lora r=8", "lora r=16", "lora r=32", "lora r=64", "qlora", "qlora_8bit", "dora"),
            *("adalora", "prefix", "prompt", "ia3", "bottleneck"),
        ],
        "options of method, each with keys of its own: \"compare.methods=[full,'lora r=8','qlora quant_type=fp4']\"",
        changes_result=False,
    )
    rows: int | None = key(
        None, "training rows, the same for each method; null: data.max_rows", ge=1, changes_result=False
    )
    tune: list[float] = key(
        [],
        "learning rates that are tried first, as multiples of the method's own: [0.3,1,3]; []: its own is taken",
        changes_result=False,
    )
    tune_rows: int = key(320, "training rows of such a try", ge=1, changes_result=False)


@dataclass(slots=True)
class SweepConfig:
    """Which trials `afina sweep` trains, and how. No run by itself reads it."""

    axes: dict[str, str] = key(
        {},
        "keys that are swept, each with its values in Hydra's grammar: {method.r: '8,16', method.alpha: '16,32'}; what "
        "is typed adds to them or replaces them",
        changes_result=False,
    )
    alpha_over_rank: list[float] = key(
        [], "sweep method.alpha, too, as these multiples of each trial's method.r: [1,2,4]", changes_result=False
    )
    sampler: str = key(
        "grid",
        "grid: every combination; random: so many drawn; tpe: each chosen by the results of those before it",
        choices=("grid", "random", "tpe"),
        changes_result=False,
    )
    trials: int | None = key(
        None, "trials that random draws or tpe chooses; null: 20 (grid has all)", ge=1, changes_result=False
    )
    metric: str | None = key(
        None,
        "what trials are ranked by: eval_loss, eval_perplexity, train_loss, or one of eval.metrics; null: their "
        "eval.best_metric, else eval_loss, else train_loss",
        changes_result=False,
    )
    seed: int = key(0, "seed of random, tpe and shuffle(…): the same trials again", ge=0, changes_result=False)
    parallel: Any = key(
        "auto",
        "trials at once, each on a device and a share of the cores; auto: one a GPU, one on a CPU",
        changes_result=False,
    )
    fuse: Any = key(
        "auto",
        "LoRA trials that one process trains together on one base; auto: at most 16 (tpe: none); off: each has a "
        "process of its own; or at most so many",
        changes_result=False,
    )
    early_stopping: str = key(
        "none",
        "asha: all trials are trained to a first step, of these the best part to a later one, and so on (successive "
        "halving); none: all to their end",
        choices=("none", "asha"),
        changes_result=False,
    )
    reduction_factor: int = key(
        3, "asha: one trial in so many goes on, so many times as far", ge=2, changes_result=False
    )
    min_steps: int | None = key(None, "asha: updates before the first choice", ge=1, changes_result=False)
