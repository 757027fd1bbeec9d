"""What the tests of W&B share."""

import os

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.wandb_runs import FakeServer


@pytest.fixture
def own_home(monkeypatch, tmp_path):
    """No key and no setting of the machine the tests run on."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "home").mkdir()


@pytest.fixture
def server(own_home, monkeypatch):
    server = FakeServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    yield server
    server.silent = False
    server.shutdown()
    server.server_close()
