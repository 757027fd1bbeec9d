"""Somebody else's run folder, whose base brings Python files: no verb runs them unless that is typed."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.finished_run import finished
from trainer.cli import main

EVIL = "from pathlib import Path\nPath({mark!r}).write_text(__file__)\nraise ImportError('it has run')\n"
VERBS = {
    "generate": ["generate", "{run}", "hello"],
    "chat": ["chat", "{run}"],
    "eval": ["eval", "{run}"],
    "merge": ["merge", "{run}", "--to", "{to}"],
    "train": ["train", "--config", "{run}/config.yaml", "run.name=mine"],
    "data": ["data", "--config", "{run}/config.yaml"],
    "config": ["config", "--config", "{run}/config.yaml"],
}


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A run takes them over, and here it is this process that begins one."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Where the code of the base writes, when it is run."""
    return tmp_path / "EXECUTED"


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a base that asks for its own code in every way there is, and a config that grants it."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    for module in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (base / f"{module}.py").write_text(EVIL.format(mark=str(mark)))
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]}, "tokenizer_class": "T"}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    made = finished(tmp_path, "theirs")
    shutil.copy(base / "tokenizer_config.json", made / "adapter")
    for file in base.glob("*.py"):
        shutil.copy(file, made / "adapter")
    text = (made / "config.yaml").read_text().replace("name_or_path: tiny", f"name_or_path: {base}")
    (made / "config.yaml").write_text(text)
    return made


def said_by(
    verb: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    words = [word.format(run=run, to=run.parent / "merged") for word in VERBS[verb]]
    code = main([*words, *more])
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert code == 2 or verb == "config"
    return said


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_cannot_grant_it(
    verb: str, run: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    said = said_by(verb, run, monkeypatch, capsys)
    assert "type model.trust_remote_code=true where you trust its author" in said
    assert said.count("\n") == 1
    assert not mark.exists()


@pytest.mark.parametrize("verb", VERBS)
def test_without_it_nothing_is_run(
    verb: str, run: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = said_by(verb, run, monkeypatch, capsys)
    assert "Traceback" not in said
    assert not mark.exists()


def test_typed_it_is_run_and_told(
    run: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attack is a real one."""
    said = said_by("generate", run, monkeypatch, capsys, "model.trust_remote_code=true")
    assert "Python code that comes with" in said
    assert mark.exists()
