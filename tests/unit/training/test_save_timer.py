"""When checkpoint.every_minutes have passed."""

from __future__ import annotations

import pytest

from trainer.training import save_timer
from trainer.training.save_timer import SaveTimer


def test_it_is_due_after_the_minutes_and_not_again_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(save_timer.time, "monotonic", lambda: now[0])
    timer, never = SaveTimer(2), SaveTimer(0)
    for seconds, is_due in ((119.9, False), (0.1, True), (50, True)):
        now[0] += seconds
        assert timer.is_due() is is_due
    timer.restart()
    assert not timer.is_due()
    now[0] += 1e9
    assert timer.is_due()
    assert not never.is_due()
