"""What the unit tests of data and models share: the tiny model's tokenizer, and the model in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.logged import logged_lines
from tests.helpers.prepared_data import Asked
from trainer.tracking.logs import use_handler


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    """The tiny tokenizer: byte-level, ChatML. Tests that change it take a deep copy."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    """The tiny Llama, fresh for each test, fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def logging_is_configured_by_each_test_alone() -> Iterator[None]:
    """No handler outlives its test: an open terminal's would print the next test's lines on its stdout."""
    yield
    use_handler(None)


@pytest.fixture(autouse=True)
def a_shell_as_a_user_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program exports for the processes it starts, in this very process in some tests, is no one else's."""
    for name in ("PYTHONSAFEPATH", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The lines that the program logs during the test."""
    with logged_lines() as lines:
        yield lines


@pytest.fixture
def asked(tmp_path: Path, tokenizer: Any, logged: list[str]) -> Asked:
    """A file of 23 rows, and ``prepare`` on it with a cache of its own."""
    return Asked(tmp_path, tokenizer, logged)
