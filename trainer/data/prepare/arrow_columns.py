"""Build Arrow columns without pandas, which ``pa.array`` brings along."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def string_column(texts: Sequence[str]) -> pa.Array:
    """Build a column of strings."""
    data = [text.encode() for text in texts]
    return pa.StringArray.from_buffers(
        len(data), pa.py_buffer(offsets_of([len(d) for d in data])), pa.py_buffer(b"".join(data))
    )


def column(kind: pa.DataType, values: np.ndarray, length: int | None = None) -> pa.Array:
    """Wrap bytes as an Arrow array. ``pa.array`` would do, but it imports pandas: 50 MB in every worker."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(kind, len(values) if length is None else length, [None, pa.py_buffer(values)])


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return where each of some values begins when they stand end to end, and where the last ends, int32."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
