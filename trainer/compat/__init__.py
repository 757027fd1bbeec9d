"""Every reach past a library's public interface, in one place: a module a library, a function or constant a reach.

Each says why (its docstring), the upstream issue, and when it can go. Where a change of the library would be silent and
cost a run, the function raises instead; :func:`trainer.compat.deepspeed.check_optimizer` does so at the start for what
is needed only later. ``tests/unit/test_compat.py`` tries each on the installed library. The modules load their library
inside the functions, so config and launch stay free of torch.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.errors import LaunchError

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Reach:
    """One reach past a public interface.

    Attributes:
        name: dotted name of what makes it here, such as ``deepspeed.loss_scale``.
        private: what is reached.
        upstream: the issue or pull request that would make it unnecessary, or "none known".
        until: when it can go.
    """

    name: str
    private: str
    upstream: str
    until: str


REACHES: list[Reach] = []


def reach(private: str, *, upstream: str = "none known", until: str) -> Callable[[Function], Function]:
    """Enter a function in the table of reaches; arguments as in :class:`Reach`."""

    def enter(function: Function) -> Function:
        name = f"{function.__module__.removeprefix('trainer.compat.')}.{function.__name__}"
        REACHES.append(Reach(name, private, upstream, until))
        return function

    return enter


def need(library: str, owner: Any, *names: str) -> None:
    """Check that an object of a library still has these attributes.

    Raises:
        LaunchError: one is missing.
    """
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise has_changed(library, f"{getattr(owner, '__name__', type(owner).__name__)} has no {', '.join(missing)}")


def has_changed(library: str, what: str) -> LaunchError:
    """Build the error for a library that is not as it was tried: ``what`` says what is missing."""
    return LaunchError(
        f"{library} {importlib.metadata.version(library)}",
        reason=f"is not a version that this program was tried with: {what}",
        hint=f"pip install -c constraints.txt {library}",
    )
