"""Find linear layers whose weight the model reads past them: an adapter on one would not be trained.

Mamba's mixers hand the weights of ``x_proj``, ``dt_proj`` and ``out_proj`` to a fused kernel, where one is installed,
and ``dt_proj.weight`` to a product of their own, where none is. Read off the model's code and not off a forward, so
that an adapter has the same layers on every machine.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn

# What is asked of a weight without computing with it.
DESCRIPTIONS = {"dtype", "device", "shape", "data_ptr", "is_cuda", "requires_grad"}


def bypassed_layers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return those of some layers whose weight is read past them, and the class that does so.

    Args:
        model: the base, also with adapters attached.
        names: full names of modules.
    """
    found = {}
    for full in names:
        parent, _, name = full.rpartition(".")
        owner: Any = type(model.get_submodule(parent))
        if name in weights_read_by(owner):
            found[full] = owner.__name__
    return found


@cache
def weights_read_by(owner: type) -> frozenset[str]:
    """Return the children of a module's class whose ``weight`` its methods compute with, initialisation left out; none
    where the code of a method cannot be read."""
    found: set[str] = set()
    for kind in owner.__mro__[: owner.__mro__.index(nn.Module)]:
        for name, value in vars(kind).items():
            function = inspect.unwrap(value) if inspect.isfunction(value) else None
            if function is None or name.lstrip("_").startswith(("init", "reset")) or not _names_weight(function):
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, SyntaxError):
                continue
            found |= set(_read_weights(tree))
    return frozenset(found)


def _names_weight(function: Any) -> bool:
    """Return whether a function's own code has the word, which is seen much faster than its source is read."""
    code = getattr(function, "__code__", None)
    return code is not None and "weight" in code.co_names


def _read_weights(tree: ast.AST, above: ast.AST | None = None) -> Iterator[str]:
    """Yield NAME of each ``self.NAME.weight`` that is more than described.

    What stands under a condition on ``pretraining_tp`` repeats the sums of several devices, and is off in any other
    use.
    """
    if isinstance(tree, ast.If) and "pretraining_tp" in ast.dump(tree.test):
        for other in tree.orelse:
            yield from _read_weights(other)
        return
    is_described = isinstance(above, ast.Attribute) and above.attr in DESCRIPTIONS
    if isinstance(tree, ast.Attribute) and tree.attr == "weight" and not is_described:
        owner = tree.value
        if isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "self":
            yield owner.attr
    for child in ast.iter_child_nodes(tree):
        yield from _read_weights(child, tree)
