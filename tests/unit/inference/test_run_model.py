"""A finished run put to use with several adapters on its base, and when its data is gone."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import trainer.cli.app
from tests.helpers.finished_run import LETTERS, finished, tiny
from trainer.data.formats.turns import Example, Turn
from trainer.data.templates.template import Template
from trainer.errors import AfinaError, ConfigError
from trainer.inference.generate import generate_run
from trainer.inference.run_model import load_run, parse_adapters
from trainer.inference.score import score_run
from trainer.methods import load_adapter

Capture = pytest.CaptureFixture[str]
TOKENS = 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    work = tmp_path_factory.mktemp("work")
    for seed, (name, method) in enumerate(
        {"one": "lora", "two": "ia3", "three": "prompt", "four": "bottleneck"}.items()
    ):
        finished(work, name, f"method={method}", f"generate.max_new_tokens={TOKENS}", seed=seed)
    finished(work, "whole", "method=full", f"generate.max_new_tokens={TOKENS}", strength=0.02)
    finished(work, "alpaca", "data.template=alpaca")
    return work


@pytest.fixture
def without_data(work: Path) -> Any:
    (work / "rows.jsonl").rename(work / "gone")
    yield
    (work / "gone").rename(work / "rows.jsonl")


def alone(model: Any, tokenizer: Any, prompt: str) -> str:
    """Stock greedy generation of one prompt in the model's own chat template."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.usefixtures("without_data")
def test_each_adapter_answers_as_if_loaded_alone(work: Path, tokenizer: Any) -> None:
    runs = work / "runs"
    given = [f"two={runs / 'two'}", "base", f"three={runs / 'three' / 'adapter'}", f"four={runs / 'four'}"]
    found = dict(generate_run(runs / "one", "What is b?", adapters=given))
    assert list(found) == ["one", "two", "base", "three", "four"]
    for name, answer in found.items():
        model = tiny() if name == "base" else load_adapter(tiny(), runs / name / "adapter").eval()
        assert answer == alone(model, tokenizer, "What is b?"), name
    assert len(set(found.values())) > 2, "the adapters do nothing"
    first = dict(generate_run(runs / "one", "What is b?", adapter=False, adapters=given[:1]))
    assert first == {"base": found["base"], "two": found["two"]}


@pytest.mark.usefixtures("without_data")
def test_answers_are_printed_under_their_names_where_there_are_several(work: Path, capsys: Capture) -> None:
    run = str(work / "runs" / "one")
    assert trainer.cli.app.main(["generate", run, "hi"]) == 0
    plain = capsys.readouterr().out
    assert (
        trainer.cli.app.main(["generate", run, "hi", "--adapter", f"b={work / 'runs' / 'two'}", "--adapter", "base"])
        == 0
    )
    shown = capsys.readouterr().out
    assert shown.startswith(f"# one\n{plain}\n# b\n")
    assert [line for line in shown.splitlines() if line.startswith("# ")] == ["# one", "# b", "# base"]
    assert trainer.cli.app.main(["generate", run, "hi", "--no-adapter"]) == 0
    assert shown.endswith("# base\n" + capsys.readouterr().out)


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize("verb", ["eval", "merge"])
def test_what_needs_rows_says_that_they_are_gone(verb: str, work: Path, tmp_path: Path, capsys: Capture) -> None:
    extra = ["--to", str(tmp_path / "x")] if verb == "merge" else []
    assert trainer.cli.app.main([verb, str(work / "runs" / "one"), *extra]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: data.path={work / 'rows.jsonl'}: there is no such file")
    assert told.count("\n") == 1


def test_scores_stand_side_by_side(work: Path, capsys: Capture) -> None:
    runs = work / "runs"
    given = [f"two={runs / 'two'}", "base"]
    scores = score_run(runs / "one", adapters=given)
    assert list(scores) == ["one", "two", "base"]
    for name in ("one", "two"):
        (own,) = score_run(runs / name).values()
        assert own == scores[name]
    assert scores["one"]["eval_loss"] != scores["base"]["eval_loss"] != scores["two"]["eval_loss"]
    assert all(math.isfinite(value) for of in scores.values() for value in of.values())
    capsys.readouterr()
    arguments = ["eval", str(runs / "one"), "--adapter", given[0], "--adapter", "base"]
    assert trainer.cli.app.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("metric"))
    assert lines[at].split() == ["metric", "one", "two", "base"]
    assert lines[at + 1].split() == ["eval_loss", *(f"{scores[n]['eval_loss']:.4f}" for n in ("one", "two", "base"))]


def test_the_loss_is_that_of_plain_transformers(work: Path, tokenizer: Any) -> None:
    """Summed cross-entropy row by row, over the labels of all rows."""
    runs, overrides = work / "runs", [f"data.validation={work / 'rows.jsonl'}", "eval.max_rows=null"]
    scores = score_run(runs / "one", overrides, [f"four={runs / 'four'}", "base"])
    template = Template(tokenizer, "chat")
    for name, found in scores.items():
        model = tiny() if name == "base" else load_adapter(tiny(), runs / name / "adapter").eval()
        total, count = 0.0, 0
        for letter in LETTERS:
            turns = (Turn("user", f"Say {letter}."), Turn("assistant", letter * 3, answer=True))
            row = template.encode(Example(turns, "", 0))
            ids, loss_mask = torch.tensor([row.ids]), torch.tensor(row.loss_mask[1:])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            total += float(cross_entropy(logits[loss_mask], ids[0, 1:][loss_mask], reduction="sum"))
            count += int(loss_mask.sum())
        assert found["eval_loss"] == pytest.approx(total / count, rel=1e-5), name


def test_a_run_of_all_weights_has_no_base_to_switch_to(work: Path, tokenizer: Any) -> None:
    runs = work / "runs"
    (name, answer), *rest = generate_run(runs / "whole", "hi")
    assert (name, rest) == ("whole", [])
    assert answer != alone(tiny(), tokenizer, "hi")
    with pytest.raises(ConfigError, match="has trained all of its weights"):
        load_run(runs / "whole", adapters=["base"])
    loaded = load_run(runs / "whole", adapter=False, adapters=[f"one={runs / 'one'}"])
    assert list(loaded.switcher.adapters) == ["base", "one"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["two"], r"--adapter=two: must be a name and a folder, or base → --adapter two=two"),
        (["=x"], "must be a name and a folder"),
        (["x="], "must be a name and a folder"),
        (["base=runs/two"], "is the name of the base alone"),
        (["one=runs/two"], "is the name of the run's own adapter"),
        (["a b=runs/two"], "must hold no space"),
        (["x=runs/two", "x=runs/three"], "is the name of another adapter"),
        (["x=runs/thre"], r"holds no adapter_config\.json .* → did you mean runs/three\?"),
        (["x=nowhere"], r"holds no adapter_config\.json .* → the folder of a finished run"),
        (["x=runs/whole"], r"trained all weights"),
    ],
)
def test_a_wrong_name_is_refused(given: list[str], told: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    with pytest.raises(ConfigError, match=told):
        parse_adapters(given, "one")


def test_what_an_adapter_was_trained_with_is_told(work: Path) -> None:
    runs = work / "runs"
    loaded = load_run(runs / "one", adapters=[f"a={runs / 'alpaca'}", f"b={runs / 'two'}"])
    assert loaded.notes == ["a was trained with data.template=alpaca; here it is chat"]


@pytest.mark.usefixtures("without_data")
def test_what_a_run_started_from_may_be_gone_too(work: Path, tmp_path: Path) -> None:
    first = shutil.copytree(work / "runs" / "one", tmp_path / "first")
    second = shutil.copytree(work / "runs" / "one", tmp_path / "second")
    config = second / "config.yaml"
    config.write_text(config.read_text().replace("adapter: null", f"adapter: {first}/adapter"))
    assert f"adapter: {first}" in config.read_text()
    shutil.rmtree(first)
    assert [name for name, _ in generate_run(second, "hi")] == ["second"]
    with pytest.raises(AfinaError, match=r"method\.adapter=.*is what training starts from → --adapter NAME=x"):
        list(generate_run(second, "hi", overrides=["method.adapter=x"]))
