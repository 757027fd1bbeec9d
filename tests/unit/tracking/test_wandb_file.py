"""W&B over the lives of a run: what one lost the next sends, and no step comes twice. Real files, real wandb."""

import zlib
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.wandb_runs import history_of, offline_files, record_run
from trainer.compat.wandb import parse_record
from trainer.tracking import wandb_run
from trainer.tracking.files import read_metrics
from trainer.tracking.wandb_file import BLOCK_BYTES, FILE_HEADER, FIRST, FULL, LAST, MIDDLE, read_records, read_steps

pytestmark = pytest.mark.usefixtures("own_home")


def steps(first: int, last: int) -> list[dict]:
    """Records of about a kilobyte in a `.wandb` file, so that a hundred take several of its blocks."""
    return [
        {"step": k, "loss": 1 / (k + 1), **{f"metric_{n}": k * n / 7 for n in range(12)}} for k in range(first, last)
    ]


def end_life(folder: Path, name: str, *, keep: float = 1.0) -> None:
    """Set the newest file of a run aside, as lives a second apart have folders of their own; keep a part of it."""
    (path,) = (path for path in offline_files(folder) if not path.parent.name.startswith("offline-run-life"))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    path.parent.rename(path.parent.with_name(f"offline-run-life-{name}"))


def counted(folder: Path) -> Counter[int]:
    return Counter(step for path in offline_files(folder) for step in history_of_file(path))


def history_of_file(path: Path) -> list[int]:
    return [record.history.step.num for record in read_records(path) if record.HasField("history")]


def once(last: int) -> Counter[int]:
    return Counter(range(last))


def test_what_killed_lives_lost_is_sent_by_the_next(tmp_path):
    record_run(tmp_path, steps(0, 60))
    end_life(tmp_path, "1", keep=0.5)
    held = set(counted(tmp_path))
    assert 10 < len(held) < 50
    record_run(tmp_path, steps(60, 90), resume_step=59)
    (second,) = (path for path in offline_files(tmp_path) if "life" not in str(path))
    assert history_of_file(second) == [k for k in range(90) if k not in held]
    history = history_of(list(read_records(second)))
    for line in read_metrics(tmp_path):
        if line["step"] not in held:
            assert history[line["step"]] == {key: value for key, value in line.items() if key != "step"}
    end_life(tmp_path, "2", keep=0.8)
    record_run(tmp_path, [], resume_step=89)
    assert counted(tmp_path) == once(90)


@pytest.mark.parametrize("resume_step", [0, 40])
@pytest.mark.parametrize("keep", [1.0, 0.4, 0.0])
def test_steps_that_are_done_again_come_once(tmp_path, resume_step, keep):
    record_run(tmp_path, steps(0, 60))
    end_life(tmp_path, "1", keep=keep)
    # The step that a run resumes after is logged again, with its evaluation.
    record_run(tmp_path, steps(resume_step, 80), resume_step=resume_step)
    assert counted(tmp_path) == once(80)


def test_a_run_that_was_off_is_sent_whole(tmp_path):
    record_run(tmp_path, steps(0, 5), mode="off")
    record_run(tmp_path, steps(5, 7), resume_step=4)
    assert counted(tmp_path) == once(7)


@pytest.mark.parametrize("arrived", [0, 1, 7, 20])
@pytest.mark.parametrize("resume_step", [5, 19])
def test_a_server_gets_what_it_lacks(tmp_path, server, arrived, resume_step):
    record_run(tmp_path, steps(0, 20), mode="online")
    assert len(server.history) == 20
    del server.history[arrived:]
    record_run(tmp_path, steps(resume_step, 25), mode="online", resume_step=resume_step)
    assert [line["_step"] for line in server.history] == list(range(25))


def test_a_server_gets_what_was_recorded_offline(tmp_path, server):
    record_run(tmp_path, steps(0, 5), mode="offline")
    record_run(tmp_path, steps(5, 7), mode="online", resume_step=4)
    assert [line["_step"] for line in server.history] == list(range(7))


def test_a_failure_to_read_loses_no_new_step(tmp_path, monkeypatch, capsys):
    record_run(tmp_path, steps(0, 5))
    end_life(tmp_path, "1")

    def fail(_: object) -> None:
        raise ImportError("wandb has changed")

    monkeypatch.setattr(wandb_run, "read_steps", fail)
    record_run(tmp_path, steps(5, 7), resume_step=4)
    assert "W&B does not get what a kill of this run may have lost: ImportError: wandb has" in capsys.readouterr().out
    assert counted(tmp_path) == once(7)


def test_the_first_life_reads_no_file(tmp_path, monkeypatch, capsys):
    def fail(_: object) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr("trainer.tracking.wandb_file.read_records", fail)
    record_run(tmp_path, steps(0, 3))
    assert "W&B" not in capsys.readouterr().out
    assert history_of_file(offline_files(tmp_path)[0]) == [0, 1, 2]


def test_a_file_may_end_or_be_damaged_anywhere(tmp_path):
    record_run(tmp_path / "run", steps(0, 80))
    content = offline_files(tmp_path / "run")[0].read_bytes()
    assert len(content) > 2 * BLOCK_BYTES
    path = tmp_path / "torn.wandb"
    near_blocks = [block * BLOCK_BYTES + k for block in (1, 2) for k in range(-9, 10)]
    cuts = [*range(30), *range(30, len(content), 997), *near_blocks, *range(len(content) - 20, len(content))]
    found = 0
    for cut in sorted(cuts):
        for tail in (b"", bytes(100), b"\xff" * 100):
            path.write_bytes(content[:cut] + tail)
            held = read_steps([path])
            assert held == set(range(len(held))), cut
        assert len(held) >= found
        found = len(held)
    assert found == 80
    assert read_steps([tmp_path / "missing.wandb", tmp_path, path]) == set(range(80))


def chunk(kind: int, data: bytes) -> bytes:
    head = zlib.crc32(bytes([kind]) + data).to_bytes(4, "little")
    return head + len(data).to_bytes(2, "little") + bytes([kind]) + data


def test_a_step_may_be_an_item_and_a_record_in_parts(tmp_path):
    item, nested, neither = parse_record(b""), parse_record(b""), parse_record(b"")
    item.history.item.add(key="_step", value_json="3")
    nested.history.item.add(nested_key=["_step"], value_json="5")
    neither.history.item.add(nested_key=["a", "_step"], value_json="7")
    whole = nested.SerializeToString()
    path = tmp_path / "a.wandb"
    content = FILE_HEADER + chunk(FULL, item.SerializeToString()) + chunk(FULL, neither.SerializeToString())
    parts = chunk(FIRST, b"") + chunk(MIDDLE, whole[:4]) + chunk(LAST, whole[4:])
    path.write_bytes(content + parts)
    assert read_steps([path]) == {3, 5}
    # A part without the ones before it is damage, and nothing after it counts.
    path.write_bytes(content + chunk(LAST, whole[4:]) + parts)
    assert read_steps([path]) == {3}
