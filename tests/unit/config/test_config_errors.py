"""Every wrong input is refused in one line: the value, the reason, a hint; and before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.docs import bare_brackets
from trainer.config import expand_sweep, load, to_yaml
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]

# (overrides, what the message must hold: the value or the reason, and the hint)
WRONG: list[tuple[str, ...]] = [
    # unknown keys, groups and options: the nearest right one
    ("metod=lora", "metod=lora", "→ method=lora"),
    ("Method=lora", "no such group", "→ method=lora"),
    ("expermient=dmo", "no such group", "→ experiment=demo"),
    ("method.rr=8", "method.rr=8", "method.r=8"),
    ("METHOD.R=8", "no such key", "method.r=8"),
    ("model.r=8", "no such key", "method.r=8"),
    ("r=8", "no such key", "method.r=8"),
    ("lr=1e-4", "lr=1e-4", "optim.learning_rate=1e-4"),
    ("optim.lr=1e-4", "no such key", "optim.learning_rate=1e-4"),
    ("batch_size=4", "no such key", "batch.global_size=4"),
    ("name=x", "no such key", "method.name, optim.name, schedule.name, log.name or run.name"),
    ("data.pth=x", "no such key", "data.path=x"),
    ("method.r.x=3", "no such key", "method.r=3"),
    (".r=3", "no such key", "method.r=3"),
    ("zero.extras.foo.bar=1", "no such key", "zero.extra.foo.bar=1"),
    ("qqqqqq=zzz", "no such key", "the groups are data,"),
    ("+foo=3", "no such key", "afina config --keys"),
    ("batch=3", "is a section", "batch.global_size=VALUE"),
    ("method=lorra", "one of adalora, bottleneck", "→ method=lora"),
    ("model=llama", "one of llama2_7b", "→ model=llama"),
    ("model=null", "one of llama2_7b", "→"),
    ("model=[tiny]", "one of llama2_7b", "→ model=tiny"),
    ("method/lora=3", "chosen by its name", "method=lora"),
    ("zero=2", "zero=2", "→ zero=stage2"),
    ("zero=7", "stage3_offload", "→ zero=stage3"),
    ("rank=16", "large, medium, small, tiny", "method.r=16"),
    ("launch=slrm", "launch=slrm", "launch=slurm"),
    ("launch.kind=slrm", "must be here, torchrun", "launch.kind=slurm"),
    ("experiment=dmo", "or null", "→ experiment=demo"),
    # the grammar
    ("method.r", "key=value", "method.r=VALUE"),
    ("=3", "key=value", "before the ="),
    ("", "key=value", "remove it"),
    ("--method.r=8", "no dashes", "→ method.r=8"),
    ("~method.r", "cannot be deleted", "method.r=null"),
    ("model@method=tiny", "cannot be put elsewhere", "model=tiny"),
    ("hydra.run.dir=x", "Hydra only composes", "remove it"),
    ("hydra/launcher=x", "Hydra only composes", "remove it"),
    ("data.path=a b(c", "Hydra's grammar", "'data.path=\"a b(c\"'"),
    ("method.r=8,16", "several values", "afina sweep method.r=8,16"),
    ("method.r=range(1,4)", "several values", "afina sweep"),
    ("method.r=interval(1,8)", "several values", "afina sweep sweep.sampler=random 'method.r=interval(1,8)'"),
    ("method=lora,full", "several values", "afina sweep"),
    ("eval.metrics=loss,exact_match", "several values", "eval.metrics=[loss,exact_match]"),
    # types
    ("method.r=abc", "method.r=abc", "whole number"),
    ("method.r=8.5", "whole number or null", "method.r=16"),
    ("method.r=true", "method.r=true", "whole number"),
    ("method.r=[1,2]", "method.r=[1,2]", "whole number"),
    ("method.dropout=true", "a number", "method.dropout=0.0"),
    ("batch.epochs=two", "a number", "batch.epochs=1.0"),
    ("model.gradient_checkpointing=maybe", "false, true or selective", "model.gradient_checkpointing=false"),
    ("model.gradient_checkpointing=selektive", "false, true or selective", "model.gradient_checkpointing=selective"),
    ("model.kernels=non", "auto, none, or a list of varlen", "model.kernels=none"),
    ("model.kernels=[rmsnorm]", "auto, none, or a list of varlen", "model.kernels=[rms_norm]"),
    ("model.kernels=[]", "auto, none, or a list of varlen", "model.kernels=auto"),
    ("eval.metrics=loss", "a list", "eval.metrics=[loss]"),
    ("log.tags=a", "a list", "'log.tags=[a]'"),
    ("zero.extra=3", "keys and values", "zero.extra.zero_optimization"),
    ("data.path=null", "must be a path", "data.path=my.jsonl"),
    # limits
    ("method.r=0", "at least 1", "method.r=1"),
    ("method.dropout=1", "less than 1", "method.dropout=0.0"),
    ("method.bits=5", "16, 8 or 4", "method.bits=4"),
    ("method.name=lorra", "full, lora, adalora", "method.name=lora"),
    ("model.dtype=bfloat16", "auto, bf16, fp16 or fp32", "model.dtype=bf16"),
    ("log.wandb=of", "online, offline or off", "log.wandb=off"),
    ("zero.stage=5", "0, 1, 2 or 3", "zero.stage=3"),
    ("optim.learning_rate=nan", "finite", "optim.learning_rate=null"),
    ("optim.learning_rate=inf", "finite", "optim.learning_rate=null"),
    ("optim.learning_rate=0", "greater than 0", "optim.learning_rate=null"),
    ("generate.top_p=1.5", "at most 1", "generate.top_p=1"),
    ("launch.master_port=70000", "at most 65535", "launch.master_port=65535"),
    ("schedule.warmup_ratio=2", "at most 1", "schedule.warmup_ratio=1"),
    # interpolations
    ("run.name=${now:%H}", "clock", "run.name"),
    ("run.seed=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE", "run.seed=VALUE"),
    ("run.seed=${model.dtype}", "cannot be resolved", "run.seed=VALUE"),
    ("zero.stage=${zero.stage}", "cannot be resolved", "zero.stage=VALUE"),
    # the data
    ("data=alpaca", "data.path: must be given", "data.path=my.jsonl"),
    ("data.path=no/such.jsonl", "no/such.jsonl", "no such file"),
    ("data.path=nowhere.jsonl", "no such file", "PATH/TO/FILE.jsonl"),
    ("data.path='no/such/*.jsonl'", "matches no file", "FOLDER/*.jsonl"),
    ("data.path=[]", "a list of paths", "data.path=my.jsonl"),
    ("data.path=7", "must be a path", "data.path=my.jsonl"),
    ("data.path=[conf,nowhere.jsonl]", "data.path[1]=nowhere.jsonl", "no such file"),
    ("data.path=[{path:conf,wieght:2}]", "data.path[0].wieght=2", "did you mean weight"),
    ("data.path=[{path:conf,weight:0}]", "data.path[0].weight=0", "weight: 1"),
    ("data.path=[{path:conf,rows:0}]", "data.path[0].rows=0", "rows: 1000"),
    ("data.path=[{path:conf,rows:5,weight:2}]", "twice", "rows or weight"),
    ("data.path=[{path:conf,format:chatt}]", "data.path[0].format=chatt", "format: chat"),
    ("data.path=[{path:conf,columns:{quesion:q}}]", "data.path[0].columns", "columns: {question:q}"),
    ("data.path=[{weight:2}]", "data.path[0].path", "my.jsonl"),
    ("data.path=[conf] data.split=", "data.split", "data.split=train"),
    ("data.columns={instuction:q}", "no field of ours", "'data.columns={instruction:q}'"),
    ("data.columns={question:instruction,a:output}", "a is no field", "data.columns={output:a}"),
    ("data.columns=3", "data.columns=3", "data.columns"),
    ("data.template=alpacca", "chat, alpaca, alpaca_short, plain", "data.template=alpaca"),
    ("data.template=", "must be chat", "data.template=chat"),
    ("data.template=my.jinja", "no such file", "FILE.jinja"),
    ("data.template_kwargs={tools:1}", "not a variable", "data.template_kwargs={enable_thinking: false}"),
    ("data.template_kwargs=[a]", "must be keys and values", "data.template_kwargs={}"),
    ("data.template_kwargs={a-b:1}", "must map names to values", "data.template_kwargs={enable_thinking: false}"),
    ("data.template=alpaca data.template_kwargs={a:1}", "needs a chat template", "data.template=chat"),
    ("data.template=plain data.alpaca_role=system", "needs a chat template", "data.template=chat"),
    ("data.max_refused=-1", "at least 0", "data.max_refused=0"),
    ("data.max_refused=1.5", "a share between 0 and 1", "data.max_refused=2 for rows"),
    ("data.max_refused=true", "a whole number", "0.01"),
    ("data.max_refused=few", "a whole number", "0.01"),
    ("data.max_refused=null", "a whole number", "0.01"),
    ("data.validation=no_such.jsonl", "data.validation=no_such.jsonl", "no such file"),
    ("data.validation=-3", "data.validation=-3", "data.validation=0"),
    ("data.validation=1.5", "a share between 0 and 1", "data.validation=2"),
    ("data.validation=1.0", "a share between 0 and 1", "data.validation=1 for rows"),
    ("data.validation=true", "a whole number of rows", "data.validation=0.1"),
    ("data.validation=null", "a whole number of rows", "0 to hold out none"),
    ("data.validation=nan", "finite", "data.validation=0.1"),
    ("data.template=alpaca data.alpaca_role=system", "needs a chat template", "data.template=chat"),
    # rules between keys
    ("batch.micro_size=32", "batch.global_size, which is 16", "batch.micro_size=16"),
    ("batch.micro_tokens=512", "data.max_length=1024", "batch.micro_tokens=1024"),
    ("method.r=null", "LoRA needs it", "method.r=16"),
    ("method.name=adalora", "no meaning for AdaLoRA", "rank=null"),
    ("method=ia3 rank=tiny", "no meaning for IA3", "rank=null"),
    ("method=prompt method.target_modules=[q_proj]", "no meaning for prompt tuning", "method=lora, adalora or ia3"),
    ("method=prompt method.init=text", "needs words", "init_text"),
    ("method=prompt method.init_text=hello", "with method.init=text only", "method.init=text"),
    ("method=prompt method.init=vocap", "default, vocab or text", "method.init=vocab"),
    ("method=lora method.init=pisa", "for LoRA", "method.init=pissa"),
    ("method=qlora method.init=pissa", "held in 4 bits", "method.bits=16"),
    ("method=qlora method.init=orthogonal", "packed in 4 bits", "method.bits=16"),
    ("method.init=orthogonal method.r=5", "must be even", "method.r=6"),
    ("method.init=orthogonal method.rank_pattern={q_proj:3}", "must be even", "method.rank_pattern.q_proj=4"),
    ("method=dora method.init=olora", "twice the rank", "method.dora=false"),
    ("method.init=pissa method.rank_pattern={q_proj:4}", "twice the rank", "method.init=default"),
    ("method=adalora method.target_r=12", "less than method.init_r, which is 12", "method.init_r=19"),
    ("method=adalora method.beta1=null", "AdaLoRA needs it", "method.beta1=0.85"),
    ("method=adalora method.beta1=1", "less than 1", "method.beta1"),
    ("method=prefix method.encoder_hidden_size=64", "method.prefix_projection=true only", "prefix_projection=true"),
    ("method=bottleneck method.placement=houlsbi", "houlsby or pfeiffer", "method.placement=houlsby"),
    ("method=lora method.placement=houlsby", "no meaning for LoRA", "method=bottleneck"),
    ("method.layers=[1,1]", "each once", "method.layers=[0,1,2]"),
    ("method.layers=[-1]", "counted from 0", "method.layers=[0,1,2]"),
    ("method.compute_dtype=bf16", "base in 4 bits", "method=qlora"),
    ("method=full method.layers=[1]", "no meaning for full fine-tuning", "method.layers=null"),
    ("method.rank_pattern.q_proj=4", "set as a whole", "'method.rank_pattern={q_proj:4}'"),
    ("method.rank_pattern={q_proj:0}", "greater than 0", "'method.rank_pattern={q_proj:16}'"),
    ("method=full method.r=8", "method.name=full", "rank=null"),
    ("method=full rank=large", "method.r=64", "rank=null"),
    ("method.name=full", "method.r=16", "method=full"),
    ("method=full method.bits=4", "method.bits=4", "method=qlora"),
    ("method=full method.alpha=2", "method.alpha=2.0", "method.alpha=null"),
    ("method=full method.dropout=0.1", "method.dropout=0.1", "method.dropout=0.0"),
    ("method=full method.target_modules=attention", "no meaning", "method.target_modules=all_linear"),
    ("method.target_modules=atention", "attention_min, attention or all_linear", "method.target_modules=attention"),
    ("method.target_modules=q_proj", "a list of module names", "method.target_modules=[q_proj]"),
    ("method.target_modules=[]", "one or more", "method.target_modules=[q_proj,v_proj]"),
    ("method.target_modules='.*(q'", "no regular expression", "'method.target_modules="),
    ("method.target_modules=null method.target_parameters=experts", "or a list of module names", "[] for none"),
    ("method.exclude_modules=down_proj", "a list of one or more", "method.exclude_modules=[down_proj]"),
    ("method.exclude_modules=[]", "a list of one or more", "method.exclude_modules=[down_proj]"),
    ("method=prompt method.exclude_modules=[mlp]", "no meaning for prompt tuning", "method=lora, adalora or ia3"),
    ("method.target_parameters=expert", "must be experts", "method.target_parameters=experts"),
    ("method.target_parameters=[]", "a list of the ends", "method.target_parameters=experts"),
    ("method=ia3 method.target_parameters=experts", "no meaning for IA3", "method=lora"),
    ("method=experts method.dropout=0.1", "drops inputs", "method.dropout=0"),
    ("method=experts model.compile=true", "put on and off", "model.compile=false"),
    ("method=experts method.dora=true", "no form", "method.dora=false"),
    ("method=experts method.init=orthogonal", "no form", "method.init=default"),
    ("method.target_modules=[1,2]", "[1,2]", "module names"),
    ("eval.metrics=[]", "at least one of", "eval.metrics=[loss]"),
    ("eval.metrics=[loss,exact]", "eval.metrics=exact", "eval.metrics=[exact_match]"),
    ("data.validation=0 eval.every_steps=3", "no held-out rows", "data.validation=0.1"),
    ("data.validation=0 eval.every_epoch=true", "no held-out rows", "eval.every_epoch=false"),
    ("data.validation=0 eval.metrics=[loss,exact_match]", "no held-out rows", "eval.metrics=[loss]"),
    ("zero.offload_params=cpu", "stage 3 only; zero.stage is 2", "zero=stage3_offload"),
    ("zero=stage0 zero.offload_optimizer=cpu", "stage 1 or higher", "zero=stage2_offload"),
    ("zero=stage0 model.dtype=fp16", "loss scaler", "zero=stage1"),
    ("model.dtype=fp32 model.attention=flash_attention_2", "16 bits", "model.attention=sdpa"),
    ("schedule.warmup_steps=20 batch.max_steps=10", "batch.max_steps, which is 10", "schedule.warmup_steps=1"),
    ("optim.lora_plus_ratio=0.5", "at least 1", "optim.lora_plus_ratio=1"),
    ("method=full rank=null optim.lora_plus_ratio=16", "no B that starts at 0", "method=lora"),
    ("method=adalora optim.lora_plus_ratio=16", "one rate", "optim.lora_plus_ratio=null"),
    ("optim.decay_biases_and_norms=true", "nothing decays", "optim.weight_decay=0.01"),
    ("schedule=constant schedule.min_ratio=0.1", "schedule.name=constant", "schedule=cosine, linear or wsd"),
    ("schedule.decay_ratio=0.2", "no meaning for schedule.name=cosine", "schedule=wsd"),
    ("schedule=linear schedule.decay_shape=linear", "no meaning", "schedule.decay_shape=cosine"),
    ("schedule=wsd schedule.decay_ratio=0.8 schedule.warmup_ratio=0.4", "no room", "schedule.decay_ratio=0.6"),
    (
        "schedule=wsd schedule.decay_ratio=0.8 schedule.warmup_steps=4 batch.max_steps=10",
        "0.4 of all steps",
        "schedule.decay_ratio=0.6",
    ),
    ("generate.temperature=0.5", "no effect", "generate.do_sample=true"),
    ("generate.top_p=0.5", "no effect", "generate.do_sample=true"),
    ("zero.extra.gradient_clipping=1", "conflicts", "optim.max_grad_norm"),
    ("zero.extra.optimizer.type=Adam", "conflicts with optimizer", "optim.*"),
    ("zero.extra.scheduler.type=X", "conflicts with scheduler", "schedule.*"),
    ("zero.extra.fp16=true", "conflicts with fp16.enabled", "model.dtype"),
    ("zero.extra.bf16.enabled=true", "conflicts with bf16.enabled", "model.dtype"),
    ("zero.extra={zero_optimization:{stage:3}}", "zero_optimization.stage=3", "zero.stage"),
    ("zero.extra.zero_optimization=null", "conflicts", "zero.stage"),
    ("zero.extra.zero_optimization.offload_param.device=cpu", "conflicts", "zero.offload_params"),
    ("zero.extra.train_batch_size=4", "conflicts", "batch.global_size"),
    ("zero.extra.zero_force_ds_cpu_optimizer=true", "conflicts", "remove it"),
    ("launch.nodes=2", "one process", "launch=torchrun"),
    ("launch.nproc_per_node=2", "one process", "launch=torchrun launch.nproc_per_node=2"),
    ("launch=torchrun launch.nodes=2 launch.master_port=0", "free port", "launch.master_port=29500"),
    ("launch=torchrun launch.node_rank=1", "numbered from 0", "launch.node_rank=0"),
    ("run.name=.hidden", "plain folder name", "run.name=hidden"),
    ("run.name=a/b", "plain folder name", "run.name=a-b"),
    ("run.name=", "plain folder name", "run.name=my-run"),
    ("checkpoint.resume=atuo", "a checkpoint folder that exists", "checkpoint.resume=auto"),
    ("checkpoint.resume=/no/such", "/no/such", "checkpoint.resume=runs/"),
]


def _arguments(typed: str) -> list[str]:
    """The overrides of a row: split at spaces, except in the one value that holds a space."""
    return [typed] if "(c" in typed else typed.split(" ")


@pytest.mark.parametrize(("typed", "fragments"), [(row[0], row[1:]) for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_input_is_told_in_one_line(typed: str, fragments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(_arguments(typed))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.reason, f"no reason in {message!r}"
    assert caught.value.hint, f"no hint in {message!r}"
    assert caught.value.exit_code == 2
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} is not in {message!r}"
    assert bare_brackets(caught.value.hint) == []


def test_missing_data_names_the_folder_it_was_looked_for_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load(["data.path=no_such.jsonl"])


@pytest.mark.slow
def test_wrong_input_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    script = """
import json, sys
from trainer.config import load
from trainer.errors import ConfigError
refused = 0
for overrides in json.load(sys.stdin):
    try:
        load(overrides)
    except ConfigError:
        refused += 1
load(["experiment=demo"])
heavy = [name for name in ("torch", "transformers", "deepspeed", "peft", "numpy") if name in sys.modules]
print(json.dumps([refused, heavy]))
"""
    rows = [_arguments(row[0]) for row in WRONG]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, heavy = json.loads(done.stdout)
    assert refused == len(rows)
    assert heavy == []
    assert list(tmp_path.iterdir()) == [], "composing must not make files"


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        ("method: {rr: 8}", "method.r=8"),
        ("metod: {r: 8}", "method"),
        ("method: 8", "one of adalora"),
        ("batch: 8", "a section with keys"),
        ("method: [", "cannot be read as YAML"),
        ("- a", "must hold sections"),
        ("", "must hold sections"),
        ("method: {r: abc}", "whole number"),
    ],
)
def test_wrong_config_file(tmp_path: Path, body: str, fragment: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(body)
    with pytest.raises(ConfigError) as caught:
        load([], config_file=file)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load([], config_file=tmp_path / "config.yaml")


@pytest.mark.parametrize("choice", ["model=tiny", "rank=large", "rank=null", "experiment=demo"])
def test_groups_are_refused_on_top_of_a_config_file(tmp_path: Path, choice: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(load()))
    with pytest.raises(ConfigError, match=r"complete → set keys instead, such as \w+\.\w+=VALUE"):
        load([choice], config_file=file)


@pytest.mark.parametrize(
    ("typed", "fragment"),
    [
        ("method.r=interval(1,8)", "a grid is a list: method.r=1,4,8"),
        ("optim.learning_rate=tag(log,interval(1e-4,1e-2))", "optim.learning_rate=0.0001,0.001,0.01"),
        ("optim.learning_rate=tag(lin,interval(1e-4,1e-2))", "tag(log,interval"),
        ("optim.learning_rate=tag(log,interval(0,1e-2))", "above 0"),
        ("method.r=interval(8,1)", "method.r=interval(1,8)"),
        ("method.target_modules=interval(1,8)", "not a number"),
        ("model=glob(*)", "model=llama2_7b,"),
        ("method.r=range(3,3)", "no values"),
        ("method.r=8,8", "twice"),
        ("method.rr=8,16", "method.r=8,16"),
        ("metod=lora,full", "method="),
    ],
)
def test_wrong_sweeps(typed: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand_sweep([typed])
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("typed", ["log.api_key=k3y-s3cret", "log.wandb_token=k3y-s3cret", "wandb.secret=k3y-s3cret"])
def test_a_secret_is_not_repeated_in_an_error(typed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([typed])
    assert "k3y-s3cret" not in str(caught.value)
