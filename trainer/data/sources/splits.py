"""Tell the splits of a folder's files by their names, as ``datasets`` does: test rows must never be trained on unseen.

``data/train-00000-of-00002.parquet``, ``validation/part.jsonl``, ``my_test.csv``: the word may stand anywhere between
marks. A file that says nothing is training data, unless another says that it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.messages import listing, nearest
from trainer.errors import DataError

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {keyword: split for split, keywords in KEYWORDS.items() for keyword in keywords}
_MARK = "[-._ 0-9]"
_KEYWORD = re.compile(
    rf"(?:^|{_MARK})({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})(?={_MARK}|$)", re.IGNORECASE
)
_SHARD = re.compile(r"(?:^|/)data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*$")


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A file, or a saved split, that lies with those in use.

    Attributes:
        split: it belongs to; empty where its name says none.
        name: for messages.
        path: absolute; of a hub data set ``owner/name/split``.
    """

    split: str
    name: str
    path: str


def usual_name(split: str) -> str:
    """Return ``train``, ``validation`` or ``test`` for the words that stand for them; other names as they are."""
    return _SPLIT_OF.get(split.lower(), split)


def name_splits(names: Sequence[str]) -> list[str]:
    """Name the split of each file of a folder; empty where its name says none.

    Args:
        names: paths from the folder, with ``/``.
    """
    shards = [found[1] if (found := _SHARD.search(name)) else "" for name in names]
    if len(set(shards) - {""}) > 1 or any(map(_keyword, shards)):
        return [usual_name(shard) or _keyword(name) for shard, name in zip(shards, names, strict=True)]
    return [_keyword(name) for name in names]


def choose_split(
    files: Sequence[Path], names: Sequence[str], split: str, what: str, is_glob: bool
) -> tuple[list[int], list[LeftAlone]]:
    """Choose the files of a split, and name the others.

    Args:
        files, names: of a folder or glob.
        split: ``data.split``.
        what: the folder or glob, for messages.
        is_glob: one whose files are all of one split asks for just that one.

    Returns:
        Which files; and those that are left alone.

    Raises:
        DataError: none is of that split.
    """
    splits, wanted = name_splits(names), usual_name(split)
    if is_glob and len(set(splits)) == 1:
        return list(range(len(files))), []
    chosen = [i for i, found in enumerate(splits) if found == wanted]
    if not chosen and wanted == "train":
        chosen = [i for i, found in enumerate(splits) if not found]
    if not chosen:
        known = sorted({*splits} - {""}, key=lambda name: ([*KEYWORDS, name].index(name), name))
        if not known:
            reason, hint = f"no file of {what} names a split", "leave data.split out"
        else:
            reason = f"no file of {what} is named so: it has {listing(known)}"
            hint = f"data.split={nearest(split, known) or known[0]}, or name the files: data.path={what}/NAME"
        raise DataError("data.split", value=split, reason=reason, hint=hint)
    rest = [i for i in range(len(files)) if i not in set(chosen)]
    return chosen, [LeftAlone(splits[i], names[i], str(files[i])) for i in rest]


def _keyword(name: str) -> str:
    """Return the split that a path says, folders first."""
    found = (_KEYWORD.search(part) for part in name.split("/"))
    return next((_SPLIT_OF[match[1].lower()] for match in found if match), "")
