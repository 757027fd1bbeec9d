"""Secrets of twenty shapes, planted in what is printed, written and sent, are found in none of it; what only looks like
one stays."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.logged import logged_lines
from trainer.config import load, to_yaml
from trainer.config.messages import config_error
from trainer.errors import ModelError
from trainer.redaction import HIDDEN, redact, redact_all
from trainer.tracking.environment import write_environment
from trainer.tracking.files import describe_error

HEART = "q7Zx9Kd2Wm4Rt6Vb8Nc1"  # of each secret: what must not be found
SHAPES = {
    "hub": f"hf_{HEART}",
    "openai": f"sk-{HEART}",
    "anthropic": f"sk-ant-api03-{HEART}",
    "aws": "AKIAQ7ZX9KD2WM4RT6VB",
    "github": f"ghp_{HEART}",
    "github fine": f"github_pat_{HEART}",
    "gitlab": f"glpat-{HEART}",
    "slack": f"xoxb-{HEART}",
    "google": f"AIza{HEART}{HEART}",
    "wandb": "9f8e7d6c5b4a39281706f5e4d3c2b1a098765432",
    "wandb new": f"wandb_v1_{HEART}",
    "web token": f"eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.{HEART}",
    "private key": f"-----BEGIN RSA PRIVATE KEY-----{HEART}",
    "password": f"https://me:{HEART}@host.example/x",
    "password with @": f"https://me:a@{HEART}@host.example/x",
    "password with /": f"postgres://me:a/{HEART}@host.example:5432/x",
    "password with a space": f"https://me:a {HEART}@host.example/x",
    "user": f"https://{HEART}@host.example/x",
    "signed": f"https://bucket.example/data.jsonl?X-Amz-Signature={HEART}&X-Amz-Date=1",
    "query": f"https://host.example/x?token={HEART}",
    "named": f"api_key={HEART}",
    "quoted": f"'hf_token': '{HEART}'",
    "header": f"Authorization: Bearer {HEART}",
}


def in_config(secret: str) -> str:
    config = load([])
    config.log.group, config.log.tags, config.log.project = secret, [secret], f"mine {secret}"
    config.model.name_or_path = secret
    return to_yaml(config)


def in_log(secret: str) -> str:
    with logged_lines() as lines:
        logging.getLogger("trainer.anything").warning("cannot reach %s now", secret)
    return "\n".join(lines)


PLACES: dict[str, Callable[[str], str]] = {
    "text": redact,
    "middle of a text": lambda secret: redact(f"cannot be loaded from {secret}, and so not used"),
    "error": lambda secret: str(ModelError(secret, reason=f"there is no {secret}", hint=f"not {secret}")),
    "value of an error": lambda secret: str(ModelError("model.name_or_path", value=secret, reason="is not there")),
    "config error": lambda secret: str(config_error("log.group", secret, f"is {secret}", f"log.group={secret}")),
    "config.yaml": in_config,
    "log": in_log,
    "summary": lambda secret: json.dumps(describe_error(OSError(f"401 for {secret}"), 0)),
    "nested": lambda secret: json.dumps(redact_all({"a": [{"b": secret}], "c": (secret, 5)})),
    "name": lambda _: json.dumps(redact_all({"hub_password": HEART, "x": {"API_KEY": HEART}})),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_secret_is_found(shape: str, place: str) -> None:
    secret = SHAPES[shape]
    found = PLACES[place](secret)
    assert HEART not in found
    assert "Q7ZX9KD2WM4RT6VB" not in found
    assert "9f8e7d6c5b4a39281706" not in found
    assert HIDDEN in found


@pytest.mark.parametrize("shape", SHAPES)
def test_the_command_is_recorded_without_them(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["afina", "train", f"log.group={SHAPES[shape]}", f"x.api_key={HEART} {HEART}"])
    write_environment(tmp_path)
    text = (tmp_path / "environment.json").read_text()
    assert HEART not in text
    assert HIDDEN in text


def test_what_a_variable_holds_is_hidden_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "just-any-words-here")
    assert redact("tag just-any-words-here!") == f"tag {HIDDEN}!"
    config = load([])
    config.log.tags = ["just-any-words-here"]
    assert "any-words" not in to_yaml(config)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.text(st.sampled_from("abc XYZ.,;:-_/()[]'\"\n"), max_size=30),
    st.text(st.sampled_from("abc XYZ.,;()[]\n"), max_size=30),
)
def test_whatever_stands_around_it(shape: str, before: str, after: str) -> None:
    assert HEART not in redact(f"{before} {SHAPES[shape]} {after}")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_twice_is_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "batch.micro_tokens=4096",
        "tokenizer=foo/bar",
        "/data/hf_checkpoints/llama",
        "http://host.example:8080/path and a mail to x@y.example",
        "model.revision=9f8e7d6c5b4a39281706f5e4d3c2b1a098765432",
        "hub/models--org--name/snapshots/9f8e7d6c5b4a39281706f5e4d3c2b1a098765432/config.json",
        "risk-averse-learning-with-20-words-in-it",
        "the end of a turn is the token: <|im_end|>",
        "tokens: 6,548; a row min/median 71 103; 192 are in the loss",
        "step 12/75 loss 0.412 lr 4.9e-04 320 tok/s",
        "a" * 5000,
        "-._" * 2000,
    ],
)
def test_what_only_looks_like_one_stays(text: str) -> None:
    assert redact(text) == text


def test_a_revision_is_no_secret() -> None:
    commit = "9f8e7d6c5b4a39281706f5e4d3c2b1a098765432"
    assert redact_all({"model": {"revision": commit}}) == {"model": {"revision": commit}}
