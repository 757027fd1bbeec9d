"""Draw rows that share prefixes, for hypothesis."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from trainer.data.batching.micro_batch import Tokens

# Few token ids, so that prefixes are shared by chance; sometimes a long common one.
ids = st.lists(st.integers(0, 2), min_size=1, max_size=9)
row_ids = st.one_of(ids, st.builds(lambda n, tail: [3] * n + tail, st.integers(0, 12), ids))

deep = st.integers(20, 60).map(lambda n: [[3, 4] * (n // 2), [3, 4] * (n // 2) + [2], [3] * n])
wide = st.integers(9, 30).map(lambda n: [[3, 4, k, k] for k in range(5, 5 + n)])
chain = st.integers(2, 12).map(lambda n: [[4] * k for k in range(1, n + 1)])
turns = st.builds(lambda a, b, c: [a + b, a + b + c, a + c], ids, ids, ids)
rows_of_a_kind = st.one_of(
    st.lists(row_ids, min_size=1, max_size=8),
    row_ids.map(lambda r: [r]),
    row_ids.map(lambda r: [r] * 5),
    *(deep, wide, chain, turns),
)


@st.composite
def loss_masks(draw: st.DrawFn, length: int) -> list[bool]:
    """None, all, an answer at the end, several turns, or any."""
    kind = draw(st.sampled_from(["none", "all", "answer", "turns", "any"]))
    begin, period = draw(st.integers(0, length)), draw(st.integers(1, 5))
    if kind == "any":
        return draw(st.lists(st.booleans(), min_size=length, max_size=length))
    is_in_loss = {
        "none": lambda i: False,
        "all": lambda i: True,
        "answer": lambda i: i >= begin,
        "turns": lambda i: i // period % 2 == 1,
    }
    return [is_in_loss[kind](i) for i in range(length)]


@st.composite
def rows_with_shared_prefixes(draw: st.DrawFn) -> list[Tokens]:
    """Draw rows of unlike kinds, equal ones and prefixes of others among them, each with a loss mask."""
    rows = list(draw(rows_of_a_kind))
    rows += [rows[0]] * draw(st.integers(0, 1))  # an equal one
    if draw(st.booleans()):
        rows += [rows[0][: draw(st.integers(1, len(rows[0])))]]  # a prefix of another
    drawn = [draw(loss_masks(len(r))) for r in rows]
    return [Tokens(np.asarray(r, np.int32), np.asarray(lab, bool)) for r, lab in zip(rows, drawn, strict=True)]
