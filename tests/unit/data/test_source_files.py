"""Which files a path means: folders, globs, saved data sets, hub ids; and the digest of what they hold."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.config.dataset_spec import DatasetSpec
from trainer.data.sources import hf_datasets as hub
from trainer.data.sources import readers
from trainer.data.sources.file_hashes import hash_files
from trainer.data.sources.open import Source, open_source
from trainer.data.sources.rows import CHUNK_LINES, RejectedRow, Row, parse_rows
from trainer.errors import DataError

ROWS = [{"messages": [{"role": "user", "content": f"q {i}"}], "n": i, "none": None} for i in range(5)]
LONG_AGO = 1_000_000_000


def source(path: Path | str, **keys: Any) -> Source:
    return open_source(DatasetSpec(str(path), **keys))


def read(found: Source) -> list[Row | RejectedRow]:
    return [row for chunk in found.chunks() for row in parse_rows(chunk)]


def fields(path: Path | str, **keys: Any) -> list[dict[str, Any]]:
    return [row.fields for row in read(source(path, **keys)) if isinstance(row, Row)]


def put(folder: Path, name: str, content: str = '{"a": 1}\n') -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return path


def test_a_folder_is_all_known_files_below_it(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.csv", "a/y.txt.gz", "C.JSON", ".hidden.jsonl", ".git/x.jsonl", "README.md"):
        put(tmp_path, name, "a\n1\n" if ".csv" in name or ".txt" in name else '{"a": "1"}\n')
    put(tmp_path, "dataset_infos.json", "{}")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = source(f"{tmp_path}/")
    assert found.names == ("C.JSON", "a/y.txt.gz", "a/z.csv", "b.jsonl")
    assert found.files == tuple(tmp_path / name for name in found.names)
    places = [(row.file, row.where) for row in read(found) if isinstance(row, Row)]
    assert places == [(0, "C.JSON:1"), (1, "a/y.txt.gz:1"), (1, "a/y.txt.gz:2"), (2, "a/z.csv:2"), (3, "b.jsonl:1")]


def test_a_glob_is_sorted_and_recursive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("y.jsonl", "deep/er/x.jsonl", "deep/w.jsonl", "deep/.h.jsonl", "z.csv"):
        put(tmp_path, name)
    put(tmp_path, "odd[1].jsonl", '{"a": "odd"}')
    assert source(tmp_path / "**" / "*.jsonl").names == ("deep/er/x.jsonl", "deep/w.jsonl", "odd[1].jsonl", "y.jsonl")
    assert source(tmp_path / "d*" / "?.jsonl").names == ("deep/w.jsonl",)
    assert fields(tmp_path / "odd[1].jsonl") == [{"a": "odd"}]
    monkeypatch.chdir(tmp_path)
    assert source("deep/*.jsonl").files == (tmp_path / "deep" / "w.jsonl",)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("none.jsonl", "there is no such file"),
        ("*.nothing", "matches no file"),
        ("e*", "matches folders only"),
        ("empty", "the folder is empty"),
        ("code", "the folder holds no data: a.py"),
        ("code/a.py", "is of no known kind → known are .jsonl, .ndjson, .json, .csv"),
        ("code/*", "is of no known kind"),
        ("a.gz", "is of no known kind"),
        ("a.parquet.gz", "is of no known kind"),
        ("a.jsonl.zip", "is of no known kind"),
    ],
)
def test_what_cannot_be_opened_is_an_error(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("code/a.py", "a.gz", "a.parquet.gz", "a.jsonl.zip"):
        put(tmp_path, name)
    with pytest.raises(DataError) as caught:
        source(tmp_path / path)
    assert reason in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_file_that_goes_away_is_an_error(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "a.csv.gz"):
        found = source(put(tmp_path, name))
        found.files[0].unlink()
        with pytest.raises(DataError, match=rf"^{name}: cannot be read"):
            read(found)
        with pytest.raises(DataError, match=r"cannot be read \(No such file"):
            found.digest()


def test_saved_data_sets(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    other = datasets.Dataset.from_list(ROWS[::-1])
    datasets.DatasetDict({"train": whole, "test": other}).save_to_disk(tmp_path / "two")
    assert [row.where for row in read(source(tmp_path / "one"))] == [f"one:{n}" for n in range(1, 6)]
    assert fields(tmp_path / "one") == fields(tmp_path / "two") == ROWS
    assert fields(tmp_path / "two", split="test") == ROWS[::-1]
    assert read(source(tmp_path / "two", split="test"))[0].where == "two/test:1"
    assert len({source(tmp_path / "two", split=s).digest() for s in ("train", "test")}) == 2
    with pytest.raises(DataError, match=r"data\.split=tests: is not in .*: it has train or test → data\.split=test"):
        source(tmp_path / "two", split="tests")
    with pytest.raises(DataError, match=r"data\.split=test: has no splits"):
        source(tmp_path / "one", split="test")
    state = tmp_path / "one" / "state.json"
    state.write_text("{")
    with pytest.raises(DataError, match="was written by save_to_disk, and cannot be read"):
        source(tmp_path / "one")


def test_saved_data_sets_are_digested_by_what_they_hold(tmp_path: Path) -> None:
    kept = datasets.Dataset.from_list(ROWS)
    kept.save_to_disk(tmp_path / "a" / "same")
    kept.save_to_disk(tmp_path / "b" / "same")
    assert source(tmp_path / "a" / "same").digest() == source(tmp_path / "b" / "same").digest()


def test_an_unreachable_hub_is_one_error() -> None:
    with pytest.raises(DataError) as caught:
        source("some-one/some-data")
    message = str(caught.value)
    assert "data.path=some-one/some-data: there is no such path on this machine, it is not cached, and" in message
    assert "\n" not in message


def test_a_hub_data_set_is_read_like_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``load_dataset`` takes ``owner/name`` from the working directory too, so its path is walked without a network."""
    for name, rows in (("train", ROWS), ("test", ROWS[::-1])):
        put(tmp_path, f"owner/name/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    digests = set()
    for split, rows in (("train", ROWS), ("test", ROWS[::-1])):
        part = DatasetSpec("owner/name", split=split)
        found = Source(part, (), (f"owner/name/{split}",), hub.load_hub(part))
        assert [row.fields for row in read(found) if isinstance(row, Row)] == rows
        assert read(found)[4].where == f"owner/name/{split}:5"
        digests |= {found.digest(), found.digest()}
    assert len(digests) == 2
    with pytest.raises(DataError, match=r"data\.split=no: owner/name: .*train.*test"):
        hub.load_hub(DatasetSpec("owner/name", split="no"))


def test_arrow_streams_big_batches_and_texts_that_are_none(tmp_path: Path) -> None:
    table = pa.table({"text": [f"t {i}" for i in range(2 * CHUNK_LINES + 1)]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    chunks = list(source(tmp_path / "a.arrow").chunks())
    assert [(len(chunk.rows), chunk.line) for chunk in chunks] == [(CHUNK_LINES, 1), (CHUNK_LINES, 1001), (1, 2001)]
    assert fields(tmp_path / "a.arrow") == table.to_pylist()
    texts = pa.array([b"good", b"\xff", b"end"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    first, bad, last = read(source(tmp_path / "a.parquet"))
    assert isinstance(bad, RejectedRow)
    assert (bad.where, bad.reason, bad.raw) == ("a.parquet:2", "not_utf8", "\\xff")
    assert [r.where for r in (first, last)] == ["a.parquet:1", "a.parquet:3"]
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="two columns have the name a"):
        read(source(tmp_path / "twice.parquet"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.txt"])
def test_big_files_stream(tmp_path: Path, name: str) -> None:
    rows = 20_000
    path = put(tmp_path, name, "text\n" * name.startswith("a.csv") + '{"text": "' + "x" * 1000 + '"}\n' * 1)
    line = path.read_bytes() if name.endswith(".gz") else path.read_bytes().splitlines(keepends=True)[-1]
    head = b"text\n" if name == "a.csv" else b""
    path.write_bytes(head + (b"x\n" if name == "a.csv" else line) * rows)
    tracemalloc.start()
    count = sum(len(chunk.lines) + len(chunk.rows) for chunk in source(path).chunks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == rows
    assert peak < 6 << 20


def test_the_digest_holds_all_that_rows_depend_on(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '{"a": 1}\n')
    base = source(path).digest()
    assert base == source(path, weight=2.0).digest() == source(path, rows=5).digest()
    others = [
        source(put(tmp_path, "b.jsonl", '{"a": 1}\n')).digest(),
        source(put(tmp_path / "c", "a.jsonl", '{"a": 2}\n')).digest(),
        source(path, columns={"text": "a"}).digest(),
        source(path, format="text").digest(),
        source(tmp_path).digest(),
    ]
    assert len({base, *others}) == 6
    assert source(put(tmp_path / "d", "a.jsonl", '{"a": 1}\n')).digest() == base


def test_digests_are_remembered_and_never_wrong(tmp_path: Path) -> None:
    path, memory = put(tmp_path, "a.jsonl", "old"), tmp_path / "cache" / "digests.json"
    true = hash_files([path])
    assert hash_files([path], memory) == true
    assert not memory.exists(), "a file written a moment ago may be written again within the same tick"
    os.utime(path, (LONG_AGO, LONG_AGO))
    assert hash_files([path], memory) == true
    known = json.loads(memory.read_text())
    assert known[str(path)][-1] == true[0]
    memory.write_text(json.dumps({str(path): [*known[str(path)][:-1], "f" * 64]}))
    assert hash_files([path], memory) == ["f" * 64], "it is the memory that answers, not the file"
    path.write_text("new")
    os.utime(path, (LONG_AGO, LONG_AGO))
    assert hash_files([path], memory) == hash_files([path]) != true
    for broken in (b"", b"{", b"[]", b"\xff", b"3", json.dumps({str(path): [1, 2, 3, 4, "x"]}).encode()):
        memory.write_bytes(broken)
        assert hash_files([path], memory) == hash_files([path])
    assert hash_files([path], path / "under" / "a-file.json") == hash_files([path])
    assert sorted(file.name for file in memory.parent.iterdir()) == ["digests.json"]


def _digest_often(path: Path, memory: Path) -> None:
    for _ in range(50):
        assert hash_files([path], memory) == hash_files([path])
        memory.unlink(missing_ok=True)


def test_many_processes_share_a_memory(tmp_path: Path) -> None:
    memory, context = tmp_path / "digests.json", multiprocessing.get_context("fork")
    paths = [put(tmp_path, f"{n}.jsonl", str(n)) for n in range(4)]
    for path in paths:
        os.utime(path, (LONG_AGO, LONG_AGO))
    workers = [context.Process(target=_digest_often, args=(path, memory)) for path in paths]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    hash_files(paths, memory)
    assert set(json.loads(memory.read_text())) == {str(path) for path in paths}


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_small_file_that_is_one_endless_line_is_refused_in_bounded_memory(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"bomb.{kind}.gz"
    with gzip.open(file, "wb", compresslevel=1) as out:
        for _ in range(300):
            out.write(b"a" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"bomb\.{kind}\.gz:1: is longer than 64 MiB"):
        list(readers.read_chunks(file, 0, file.name))
    assert tracemalloc.get_traced_memory()[1] < 300 << 20
    tracemalloc.stop()
