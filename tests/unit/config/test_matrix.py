"""What goes with what: refused before a model is loaded, in the words of one table."""

from __future__ import annotations

import pytest

import trainer.cli.app
from launch.doctor.matrix import WORKS, build_matrix, count_cells
from trainer.config import load
from trainer.config.method import MethodConfig
from trainer.config.optimizers import OPTIMIZERS
from trainer.config.rules.check import check
from trainer.config.rules.matrix import BITS, REFUSALS, VARIANTS, ZERO, Cell, cells, refusal
from trainer.errors import ConfigError

OVERRIDES = {
    "lora_new_tokens": ["method.trainable_tokens=new", "model.new_tokens=[quokka]"],
    "lora_modules_to_save": ["method.modules_to_save=[embed_tokens,lm_head]", "model.new_tokens=[quokka]"],
}
REFUSED = {
    *(("full", bits, zero) for bits in (8, 4) for zero in ZERO),
    *(("dora", 8, zero) for zero in ZERO),
    *(("dora", 4, zero) for zero in ("stage3", "stage3_offload")),
}


def test_the_table_is_whole() -> None:
    heads, rows, notes = build_matrix()
    assert heads == ["method", "bits", *ZERO]
    assert {(row[0], int(row[1])) for row in rows} == {(v, b) for v in VARIANTS for b in BITS}
    assert all(cell == WORKS or cell.startswith("refused ") for row in rows for cell in row[2:])
    assert count_cells(rows) == (len(VARIANTS) * len(BITS) * len(ZERO) - len(REFUSED), len(REFUSED))
    assert len(notes) == len(REFUSALS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_is_refused_where_the_table_says_so(variant: str) -> None:
    config = load(OVERRIDES.get(variant, [f"method={variant}"]))
    for (name, bits, zero), cell in cells().items():
        if name != variant:
            continue
        config.method.bits, config.zero.stage = bits, ZERO[zero]
        found = refusal(cell)
        assert (found is not None) == ((name, bits, zero) in REFUSED)
        if found is None:
            check(config)
            continue
        with pytest.raises(ConfigError) as error:
            check(config)
        assert str(error.value).startswith(found.key)
        assert " ".join(found.seen.split()) in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["method=prefix", "model.gradient_checkpointing=true"], "model.gradient_checkpointing=true"),
        (["method=prefix", "batch.packing=trie"], "batch.packing=trie"),
        (["method=prompt", "batch.packing=trie"], "batch.packing=trie"),
    ],
)
def test_what_else_is_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}"):
        load(overrides)


def test_every_refusal_is_of_some_cell() -> None:
    tried = [
        *cells().values(),
        Cell(MethodConfig(name="prefix"), 2, True),
        Cell(MethodConfig(name="prefix"), 2, False, "trie"),
    ]
    assert {id(refusal(cell)) for cell in tried} >= {id(each) for each in REFUSALS}


def test_the_verb_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.cli.app.main(["doctor", "--matrix"]) == 0
    said = capsys.readouterr().out
    assert "220 cells work, 32 are refused" in said
    assert "untested" not in said
    assert all(name in said for name in (*VARIANTS, *OPTIMIZERS))
