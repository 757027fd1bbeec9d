"""Which optimizer goes with which option of ``zero``, method and key: refused before a model is loaded."""

from __future__ import annotations

import pytest

from launch.doctor.matrix import WORKS, build_optimizer_matrix, count_cells
from launch.report.runs import with_method_defaults
from trainer.config import TrainConfig, load
from trainer.config.method import METHODS
from trainer.config.optimizers import OPTIMIZERS, default_learning_rate
from trainer.config.rules.check import check
from trainer.config.rules.matrix import ZERO
from trainer.config.rules.optimizers import REFUSALS, OptimizerCell, optimizer_cells, optimizer_refusal
from trainer.config.suggestions import config_fields
from trainer.config.taken import default_values
from trainer.engine.learning_rate import peak_learning_rate
from trainer.errors import ConfigError

REFUSED = {
    *((name, zero) for name in ("adafactor", "muon") for zero in ZERO if zero != "stage0"),
    *(("paged_adamw_8bit", zero) for zero in ("stage2_offload", "stage3_offload")),
}


def test_the_table_is_whole() -> None:
    heads, rows, notes = build_optimizer_matrix()
    assert heads == ["optimizer", "library", *ZERO]
    assert [row[0] for row in rows] == list(config_fields()["optim.name"].field.metadata["choices"]) == list(OPTIMIZERS)
    assert all(cell == WORKS or cell.startswith("refused ") for row in rows for cell in row[2:])
    assert count_cells(rows) == (len(OPTIMIZERS) * len(ZERO) - len(REFUSED), len(REFUSED))
    assert len(notes) == len(REFUSALS) + 1


@pytest.mark.parametrize(("name", "zero"), optimizer_cells())
def test_a_config_is_refused_where_the_table_says_so(name: str, zero: str) -> None:
    found = optimizer_refusal(optimizer_cells()[name, zero])
    assert (found is not None) == ((name, zero) in REFUSED)
    if found is None:
        check(load([f"zero={zero}", f"optim.name={name}"]))
        return
    with pytest.raises(ConfigError, match=f"^optim.name={name}: ") as error:
        load([f"zero={zero}", f"optim.name={name}"])
    assert " ".join(found.seen.split()) in str(error.value)


@pytest.mark.parametrize("method", ["ia3", "prompt", "prefix"])
def test_muon_needs_matrices(method: str) -> None:
    with pytest.raises(ConfigError, match=r"^optim.name=muon: it is for matrices"):
        load(["zero=stage0", "optim.name=muon", f"method={method}", "rank=null"])


def test_every_refusal_is_of_some_cell() -> None:
    tried = [*optimizer_cells().values(), OptimizerCell("muon", 0, trains_matrices=False)]
    assert {id(optimizer_refusal(cell)) for cell in tried} >= {id(each) for each in REFUSALS}


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("optim.name=lion optim.beta2=0.99", "optim.beta2=0.99"),
        ("optim.name=lion optim.eps=1e-6", "optim.eps=1e-06"),
        ("optim.name=adafactor zero=stage0 optim.beta1=0.8", "optim.beta1=0.8"),
        ("optim.momentum=0.9", "optim.momentum=0.9"),
        ("optim.name=adamw_8bit optim.momentum=0.9", "optim.momentum=0.9"),
    ],
)
def test_a_key_without_a_meaning_is_refused(typed: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: has no meaning for "):
        load(typed.split())


@pytest.mark.parametrize("typed", ["optim.name=lion optim.momentum=0.9 optim.beta1=0.8", "optim.name=muon zero=stage0"])
def test_a_key_with_a_meaning_is_taken(typed: str) -> None:
    check(load(typed.split()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_rate_is_the_same_wherever_it_is_shown(name: str, method: str) -> None:
    config = TrainConfig()
    config.optim.name, config.method.name = name, method
    rate = peak_learning_rate(config)
    assert rate == default_learning_rate(method, name) == default_values(config)["optim.learning_rate"]
    values = {"optim.name": name, "method.name": method, "optim.learning_rate": None}
    assert with_method_defaults(values)["optim.learning_rate"] == rate
    assert rate == pytest.approx(METHODS[method].learning_rate * (0.1 if name == "lion" else 1))
    config.optim.learning_rate = 3e-4
    assert peak_learning_rate(config) == 3e-4
