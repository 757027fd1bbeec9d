"""Build the matrices of methods, base precisions, optimizers and ZeRO stages: what works, what is refused and why."""

from __future__ import annotations

import string

from trainer.config.optimizers import OPTIMIZERS
from trainer.config.rules import optimizers
from trainer.config.rules.matrix import BITS, REFUSALS, VARIANTS, ZERO, cells, refusal

WORKS = "works"
ON_ONE_DEVICE = (
    "paged_adamw_8bit is refused on a CPU, which has no pages; its cells were trained there without paging, on a GPU "
    "not yet",
)


def build_matrix() -> tuple[list[str], list[list[str]], list[str]]:
    """Build the matrix: heads, rows (method, bits, then a stage each), and notes.

    A cell is ``works`` or ``refused N``, N being a note. What depends on gradient checkpointing or packing alone is in
    the notes too.
    """
    every = cells()
    used = [each for each in REFUSALS if any(refusal(cell) is each for cell in every.values())]
    rows = []
    for variant in VARIANTS:
        for bits in BITS:
            found = [refusal(every[variant, bits, zero]) for zero in ZERO]
            rows.append([variant, str(bits), *(WORKS if f is None else f"refused {used.index(f) + 1}" for f in found)])
    notes = [f"{number}. {each.key}: {each.seen} → {each.hint}" for number, each in enumerate(used, start=1)]
    notes += [f"*  {each.key}: {each.seen} → {each.hint}" for each in REFUSALS if each not in used]
    return ["method", "bits", *ZERO], rows, notes


def build_optimizer_matrix() -> tuple[list[str], list[list[str]], list[str]]:
    """Build the matrix of optimizers: heads, rows (optimizer, library, then a stage each), and notes, with
    letters for numbers."""
    every = optimizers.optimizer_cells()
    letters = dict(zip(map(id, optimizers.REFUSALS), string.ascii_lowercase, strict=False))
    rows = []
    for name, info in OPTIMIZERS.items():
        found = [optimizers.optimizer_refusal(every[name, zero]) for zero in ZERO]
        rows.append([name, info.library, *(WORKS if f is None else f"refused {letters[id(f)]}" for f in found)])
    notes = [f"{letters[id(each)]}. optim.name: {each.seen} → {each.hint}" for each in optimizers.REFUSALS]
    return ["optimizer", "library", *ZERO], rows, [*notes, *(f"*  optim.name: {note}" for note in ON_ONE_DEVICE)]


def count_cells(rows: list[list[str]]) -> tuple[int, int]:
    """Count the cells that work, and those that are refused."""
    flat = [cell for row in rows for cell in row[2:]]
    return flat.count(WORKS), len(flat) - flat.count(WORKS)
