"""A run's config.yaml: the one of before is kept, and what has changed is listed."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.logged import logged_lines
from trainer.checkpoint.config_history import read_config, write_config
from trainer.config import load, to_yaml


def test_changed_keys_are_listed_and_the_old_file_is_kept(tmp_path: Path) -> None:
    first, second = (load(["debug=tiny", f"batch.micro_tokens={n}"]) for n in (1024, 2048))
    write_config(tmp_path, first, 0)
    with logged_lines() as logged:
        write_config(tmp_path, first, 3)
    assert logged == []
    with logged_lines() as logged:
        write_config(tmp_path, second, 5)
    assert logged == ["changed since the run was stopped: batch.micro_tokens was 1024, is 2048"]
    assert (tmp_path / "config-until-step-00000005.yaml").read_text() == to_yaml(first)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config-until-step-00000005.yaml", "config.yaml"]
    assert read_config(tmp_path) == second


def test_one_that_cannot_be_read_any_more_is_still_kept(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {no_such_key: 1}\n")
    assert read_config(tmp_path) is None
    write_config(tmp_path, load(["debug=tiny"]), 7)
    assert "no_such_key" in (tmp_path / "config-until-step-00000007.yaml").read_text()
