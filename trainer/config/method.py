"""The methods: which keys belong to which, which each needs, and the learning rate that suits it. No torch."""

# ruff: noqa: RUF009 - key() returns a dataclass field, made for each class.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.config.fields import key

T = TypeVar("T")


def default_alpha(rank: int) -> int:
    """Return the alpha of a LoRA kind where ``method.alpha`` is null."""
    return 2 * rank


@dataclass(slots=True)
class MethodConfig:
    """What is trained. A key without a meaning for the chosen method keeps its default; another value is refused."""

    name: str = key(
        "lora",
        "full: all weights; lora: low-rank adapters; adalora: lora with ranks found in training; ia3: scales; prompt "
        "and prefix: virtual tokens; bottleneck: small layers between the model's own",
        choices=("full", "lora", "adalora", "ia3", "prompt", "prefix", "bottleneck"),
    )
    r: int | None = key(None, "rank of the adapters; more rank, more trainable parameters", ge=1)
    alpha: float | None = key(None, "adapter scale is alpha / r; null means 2 * r (adalora: 2 * init_r)", gt=0)
    dropout: float = key(0.0, "share of adapter inputs dropped in training", ge=0, lt=1, resume_may_change=True)
    target_modules: Any = key(
        "all_linear",
        "attention_min (q, v), attention (q, k, v, o), all_linear (all linear layers but the head), a list of names, "
        "or a text with any of *+?|()[]{}^$\\: a regular expression of whole module names, as PEFT's; [] beside "
        "target_parameters: none",
    )
    exclude_modules: Any = key(
        None, "modules left out of target_modules: a list of names, or a regular expression as there", newer=True
    )
    target_parameters: Any = key(
        None,
        "lora: adapters on parameters that are no linear layers: experts (all stacks of experts), or a list of the "
        "ends of their names, [mlp.experts.down_proj]; slower: each forward adds them to whole stacks",
        newer=True,
    )
    layers: list[int] | None = key(None, "adapters in these layers only, counted from 0; null: in all")
    bias: str = key("none", "biases of the base that are trained too", choices=("none", "all", "lora_only"))
    rank_pattern: dict[str, int] = key({}, "other ranks for some modules: {q_proj: 32}")
    alpha_pattern: dict[str, float] = key({}, "other alphas for some modules: {q_proj: 64}")
    rslora: bool = key(False, "scale by alpha / sqrt(r), so that large ranks train as fast as small ones")
    dora: bool = key(
        False,
        "train the magnitude of each output's weights apart from their direction; slower: a norm at every forward",
    )
    adapter: str | None = key(
        None,
        "start from this saved adapter (a run or adapter folder, of the same method and shapes) in place of init; "
        "optimizer and schedule start from step 0",
    )
    init: str = key("default", "how trained tensors start; which starts there are depends on the method")
    seed: int | None = key(
        None, "of the random numbers that trained tensors start from; null: run.seed", ge=0, newer=True
    )
    trainable_tokens: Any = key(
        None,
        "lora: tokens whose own embeddings are trained too, of input and output: new (those of model.new_tokens), or a "
        "list of tokens; the adapter holds their rows alone",
        newer=True,
    )
    modules_to_save: list[str] | None = key(
        None,
        "lora: modules that are trained whole and saved with the adapter, [embed_tokens,lm_head]; tied ones stay tied",
        newer=True,
    )
    init_r: int | None = key(None, "adalora: rank of every adapter at the start", ge=1)
    target_r: int | None = key(None, "adalora: rank that the adapters have in the mean at the end", ge=1)
    tinit: int | None = key(None, "adalora: updates before the first rank is taken; null: 10 % of the run", ge=0)
    tfinal: int | None = key(None, "adalora: updates after the last rank is taken; null: 30 % of the run", ge=0)
    deltaT: int | None = key(
        None, "adalora: updates from one taking of ranks to the next; null: 20 takings in the run", ge=1
    )
    beta1: float | None = key(None, "adalora: decay of the mean importance of a rank", gt=0, lt=1)
    beta2: float | None = key(None, "adalora: decay of how much the importance moves", gt=0, lt=1)
    orth_reg_weight: float | None = key(None, "adalora: weight of the term that keeps A and B orthogonal", ge=0)
    virtual_tokens: int | None = key(None, "prompt, prefix: how many virtual tokens stand before every row", ge=1)
    init_text: str | None = key(None, "prompt: with init=text, the words that the virtual tokens start as")
    prefix_projection: bool | None = key(
        None, "prefix: train an MLP that makes the prefix; it is thrown away at the end"
    )
    encoder_hidden_size: int | None = key(None, "prefix: width of that MLP; null: the model's own", ge=1)
    feedforward_modules: list[str] | None = key(None, "ia3: targets whose input is scaled, not output; null: down ones")
    reduction_factor: int | None = key(None, "bottleneck: the model's width divided by the adapter's", ge=1)
    placement: str | None = key(
        None,
        "bottleneck: houlsby (behind attention and MLP) or pfeiffer (behind the MLP)",
        choices=("houlsby", "pfeiffer"),
    )
    activation: str | None = key(
        None, "bottleneck: what stands between its two layers", choices=("relu", "gelu", "silu", "tanh")
    )
    bits: int = key(16, "bits the frozen base is held in: 16, 8 (LLM.int8) or 4 (QLoRA)", choices=(16, 8, 4))
    quant_type: str = key("nf4", "4-bit data type", choices=("nf4", "fp4"))
    double_quant: bool = key(True, "quantise the 4-bit scales too: saves about 0.4 bit a weight")
    compute_dtype: str = key(
        "auto", "4-bit: dtype of products; auto: model.dtype", choices=("auto", "bf16", "fp16", "fp32")
    )
    quant_storage: str = key(
        "auto",
        "4-bit: dtype that holds the packed weights; auto: uint8, under ZeRO-3 model.dtype",
        choices=("auto", "uint8", "bf16", "fp16", "fp32"),
    )


@dataclass(frozen=True, slots=True)
class Method:
    """What is known of a method.

    Attributes:
        title: its name in messages.
        learning_rate: peak rate of AdamW when ``optim.learning_rate`` is null.
        keys: of ``method``, besides ``name``, that mean something.
        needs: of these, what must not be null, with a good value to suggest.
        starts: values of ``init``.
    """

    title: str
    learning_rate: float
    keys: frozenset[str]
    needs: dict[str, Any]
    starts: tuple[str, ...] = ("default",)


BASE = frozenset({"adapter", "bits", "quant_type", "double_quant", "compute_dtype", "quant_storage"})
TARGETS = frozenset({"target_modules", "exclude_modules", "layers"})
LORA = frozenset(
    [
        *("r", "alpha", "dropout", "bias", "rank_pattern", "alpha_pattern", "rslora", "dora", "init", "seed"),
        "target_parameters",
    ]
)
EMBEDDINGS = frozenset({"trainable_tokens", "modules_to_save"})
ADALORA_NEEDS = {"init_r": 12, "target_r": 8, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5}
BOTTLENECK_NEEDS = {"reduction_factor": 16, "placement": "houlsby", "activation": "relu"}

# LoRA does best at about ten times the rate of full fine-tuning (Biderman et al., 2024; Schulman et al., 2025). The
# others are the best or the next below it of the tries in benchmarks/methods.md, which are of a small model and few
# updates: larger models want smaller rates.
METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", 2e-5, frozenset({"bits"}), {}),
    "lora": Method(
        "LoRA",
        2e-4,
        LORA | TARGETS | EMBEDDINGS | BASE,
        {"r": 16},
        ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora"),
    ),
    "adalora": Method(
        "AdaLoRA",
        3e-3,
        TARGETS | BASE | {"alpha", "dropout", "seed", "tinit", "tfinal", "deltaT", *ADALORA_NEEDS},
        ADALORA_NEEDS,
    ),
    "ia3": Method("IA3", 3e-3, TARGETS | BASE | {"feedforward_modules"}, {}),
    "prompt": Method(
        "prompt tuning",
        1e-2,
        BASE | {"virtual_tokens", "init", "init_text", "seed"},
        {"virtual_tokens": 20},
        ("default", "vocab", "text"),
    ),
    "prefix": Method(
        "prefix tuning",
        3e-2,
        BASE | {"virtual_tokens", "prefix_projection", "encoder_hidden_size", "init", "seed"},
        {"virtual_tokens": 20, "prefix_projection": False},
        ("default", "zero"),
    ),
    "bottleneck": Method("bottleneck adapters", 1e-3, BASE | {"layers", "seed", *BOTTLENECK_NEEDS}, BOTTLENECK_NEEDS),
}

# Why a method leaves nothing that could be folded into the base.
NOT_MERGEABLE = {
    "bottleneck": "its layers are not linear, and no weight of the base can do what they do",
    "prompt": "its virtual tokens stand before the rows, and no weight of the base can do what they do",
    "prefix": "its keys and values stand before the rows, and no weight of the base can do what they do",
    "full": "there is no adapter: the folder model/ of the run is the trained model",
}


def initial_seed(method: MethodConfig, run_seed: int) -> int:
    """Return the seed of what is trained: ``method.seed``, or the run's where that is null."""
    return run_seed if method.seed is None else method.seed


def given(value: T | None) -> T:
    """Return a value that ``rules/method.py`` lets no method go without."""
    assert value is not None, "checked by rules/method.py"
    return value
