"""Patch a loaded model in a way that can be taken back and put in again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Patch:
    """One kernel on one model.

    Attributes:
        apply: puts it in.
        undo: takes it out.
    """

    apply: Callable[[], None]
    undo: Callable[[], None]


def patch_forwards(forwards: Sequence[tuple[nn.Module, Callable[..., Tensor]]]) -> Patch | None:
    """Give modules another forward each; the classes' own stay as they are.

    Returns:
        the patch, applied; ``None`` where there is no module.
    """

    def apply() -> None:
        for module, forward in forwards:
            module.forward = forward

    def undo() -> None:
        for module, _ in forwards:
            del module.forward

    return _applied(Patch(apply, undo)) if forwards else None


def patch_attribute(owner: Any, name: str, value: Any) -> Patch:
    """Give an object another attribute; return the patch, applied."""
    stock = getattr(owner, name)
    return _applied(Patch(lambda: setattr(owner, name, value), lambda: setattr(owner, name, stock)))


def _applied(patch: Patch) -> Patch:
    patch.apply()
    return patch
