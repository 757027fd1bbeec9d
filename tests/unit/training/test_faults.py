"""Who reports that a rank has left: the rank itself where it can, else one of those that miss it. Real ranks are in
tests/distributed/test_chaos.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.distributed.heartbeat import Heartbeat
from trainer.distributed.process_group import World
from trainer.errors import LaunchError, TrainingError
from trainer.training import faults
from trainer.training.faults import watched

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    monkeypatch.setattr(Heartbeat, "explain", lambda _: "rank 1: no sign of it")
    monkeypatch.setattr(faults, "clear_heartbeats", lambda *_: None)
    return []


def of_rank(rank: int) -> World:
    return World(rank, 2, rank, torch.device("cpu"))


def test_a_rank_that_says_why_it_leaves_is_not_missed_by_the_others(tmp_path: Path, recorded: list[Exception]) -> None:
    said = TrainingError("out of memory")

    def rank_0() -> None:
        with watched(tmp_path, of_rank(0), 60, recorded.append):
            with pytest.raises(TrainingError), watched(tmp_path, of_rank(1), 60, recorded.append):
                raise said
            raise LOST

    with pytest.raises(SystemExit) as left:
        rank_0()
    assert left.value.code == LaunchError.exit_code
    assert recorded == [said], "its own word stays"


def test_a_rank_that_is_gone_without_a_word_is_reported_once(tmp_path: Path, recorded: list[Exception]) -> None:
    with pytest.raises(LaunchError, match="rank 1: no sign of it"), watched(tmp_path, of_rank(0), 60, recorded.append):
        raise LOST
    assert [type(error) for error in recorded] == [LaunchError]
