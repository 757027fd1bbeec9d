"""Files that name their split: only the split that is asked for is used, and what is left alone is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from trainer.config import load
from trainer.config.dataset_spec import DatasetSpec
from trainer.data.load import inspect_data
from trainer.data.sources.open import list_splits, open_source
from trainer.data.sources.splits import name_splits
from trainer.errors import DataError


def put(folder: Path, *names: str, rows: int = 3) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"instruction": f"{name} {i}", "output": "yes"}) for i in range(rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    return folder


SNAPSHOT = [f"data/{split}-00000-of-00001.jsonl" for split in ("train", "validation", "test")]
FOLDERS = [
    SNAPSHOT,
    ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
    ["train.jsonl", "dev.jsonl", "extra.jsonl"],
    ["my_train_file.jsonl", "eval-2.jsonl"],
    ["train/a.jsonl", "val/b.jsonl", "testing/deep/c.jsonl"],
    ["training.1/a.jsonl", "my-valid set/b.jsonl"],
    ["a.jsonl", "attested.jsonl", "trained.jsonl", "developers/devices.jsonl"],
]


@pytest.mark.parametrize("names", FOLDERS)
def test_names_mean_what_they_mean_to_datasets(tmp_path: Path, names: list[str]) -> None:
    put(tmp_path / "d", *names)
    theirs = datasets.load_dataset_builder(str(tmp_path / "d"), cache_dir=str(tmp_path / "c")).config.data_files
    for split, files in theirs.items():
        ours = open_source(DatasetSpec(str(tmp_path / "d"), split=str(split)))
        assert [str(file) for file in ours.files] == sorted(map(str, files))
    if "train" in theirs:
        used = open_source(DatasetSpec(str(tmp_path / "d")))
        assert {left.name for left in used.left_alone} == set(names) - set(used.names)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["a.jsonl", "test.jsonl"], ["", "test"]),  # `datasets` would find no training data
        (["data/shard-00000-of-00002.jsonl", "data/shard-00001-of-00002.jsonl"], ["", ""]),
        (["Test.jsonl", "TRAIN/a.csv"], ["test", "train"]),
        (["data/aux-00000-of-00001.csv", "data/main-00000-of-00001.csv"], ["aux", "main"]),
    ],
)
def test_names_that_datasets_reads_otherwise(names: list[str], splits: list[str]) -> None:
    assert name_splits(names) == splits


def test_files_without_a_split_are_training_data_beside_a_test_file(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", "test.jsonl")
    found = open_source(DatasetSpec(str(tmp_path)))
    assert found.names == ("a.jsonl",)
    assert [(left.split, left.name) for left in found.left_alone] == [("test", "test.jsonl")]
    assert open_source(DatasetSpec(str(tmp_path), split="eval")).names == ("test.jsonl",)
    assert open_source(DatasetSpec(str(tmp_path / "*.jsonl"))).names == ("a.jsonl",)
    assert open_source(DatasetSpec(str(tmp_path / "t*.jsonl"))).names == ("test.jsonl",), "a glob that says it"
    assert open_source(DatasetSpec(str(tmp_path / "test.jsonl"))).names == ("test.jsonl",)
    assert list_splits(DatasetSpec(str(tmp_path))) == ["", "test"]


@pytest.mark.parametrize(
    ("names", "split", "reason"),
    [
        (["test.jsonl"], "train", "it has test → data.split=test"),
        (SNAPSHOT, "tests", "it has train, validation or test → data.split=test"),
        (["a.jsonl"], "test", "names a split → leave data.split out"),
    ],
)
def test_a_split_that_no_file_names(tmp_path: Path, names: list[str], split: str, reason: str) -> None:
    put(tmp_path, *reversed(names))
    with pytest.raises(DataError, match=r"data\.split=") as caught:
        open_source(DatasetSpec(str(tmp_path), split=split))
    assert reason in str(caught.value)


def inspected(tmp_path: Path, tokenizer: Any, path: Path | str, validation: Any, **keys: Any) -> Any:
    typed = [f"data.{key}={value}" for key, value in keys.items()]
    config = load([f"data.path={path}", f"data.validation={validation}", f"data.cache_dir={tmp_path}/cache", *typed])
    return inspect_data(config, tokenizer)


def files_of(rows: Any) -> set[str]:
    return {name.rpartition(":")[0] for name in rows.names(range(len(rows)))}


def test_a_snapshot_of_the_hub_trains_on_train_and_holds_out_what_is_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    folder, (train, validation, test) = put(tmp_path / "snap", *SNAPSHOT), SNAPSHOT
    data = inspected(tmp_path, tokenizer, folder, 0)
    assert (files_of(data.train), len(data.validation)) == ({train}, 0)
    (told,) = (f for f in data.findings if f.kind == "other_split")
    assert f"not used, as they are of other splits: {test} (test), {validation} (validation)" in told.message
    assert "→ data.validation=validation" in told.message
    for held_out in ("validation", folder, f"{folder}/data/validation-*"):
        data = inspected(tmp_path, tokenizer, folder, held_out)
        assert (files_of(data.train), len(data.validation)) == ({train}, 3)
        assert next(iter(files_of(data.validation))).endswith(Path(validation).name)
        assert not [f for f in data.findings if f.kind == "leak"]
    (told,) = (f for f in data.findings if f.kind == "other_split")
    assert validation not in told.message
    assert files_of(inspected(tmp_path, tokenizer, folder, "test", split="validation").train) == {validation}
    with pytest.raises(DataError, match=r"data\.validation=validation: is no path, and .*rows\.jsonl is a file"):
        inspected(tmp_path, tokenizer, put(tmp_path, "rows.jsonl") / "rows.jsonl", "validation")


def test_a_saved_data_set_tells_its_other_splits_and_holds_one_out(tmp_path: Path, tokenizer: Any) -> None:
    def rows(name: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"instruction": f"{name} {i}", "output": "yes"} for i in range(3)])

    datasets.DatasetDict({name: rows(name) for name in ("train", "validation")}).save_to_disk(tmp_path / "two")
    told = [f.message for f in inspected(tmp_path, tokenizer, tmp_path / "two", 0).findings if f.kind == "other_split"]
    assert [message.split(": ")[1].split(" →")[0] for message in told] == ["two/validation (validation)"]
    for held_out in ("validation", tmp_path / "two"):
        data = inspected(tmp_path, tokenizer, tmp_path / "two", held_out)
        assert (files_of(data.train), files_of(data.validation)) == ({"two/train"}, {"two/validation"})
        assert not [f for f in data.findings if f.kind in ("leak", "other_split")]
