"""Make, name and set what each optimizer holds of the trained tensors, whatever it calls it.

A checkpoint's names of it:

==================  =====================================================================================
adamw               ``exp_avg``, ``exp_avg_sq``: in the shape of the tensor, as are those that follow
adamw_8bit, paged_  the same: its codes times their scales, in fp32
lion                ``exp_avg``
adafactor           ``exp_avg_sq_row`` and ``exp_avg_sq_col`` of a matrix, means over one of its sides;
                    ``exp_avg_sq`` of a vector
muon                ``momentum_buffer`` of a matrix; AdamW's of the others
==================  =====================================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.compat import deepspeed as compat
from trainer.engine.optimizers import USES_MUON
from trainer.engine.quantised_moments import dequantise, quantise

MOMENTS = ("exp_avg", "exp_avg_sq")


def base_optimizer(optimizer: Any, zero_stage: int) -> Any:
    """Return the library's optimizer: inside DeepSpeed's, or itself under stage 0."""
    return compat.base_optimizer(optimizer) if zero_stage else optimizer


class AdamState:
    """AdamW's: two moments. The others differ from it in what they override.

    Attributes:
        keys: the optimizer's own name of each tensor of a checkpoint.
    """

    keys: Mapping[str, str] = {kind: kind for kind in MOMENTS}

    def shapes(self, optimizer: Any, parameter: Tensor, shape: torch.Size) -> dict[str, torch.Size]:
        """Return the whole tensors that are held of a parameter, by their names in a checkpoint.

        Args:
            optimizer: the library's.
            parameter: trained; under stage 3 a rank's own part of it.
            shape: its whole shape.
        """
        return dict.fromkeys(self.keys, shape)

    def reset(self, optimizer: Any, zero_stage: int, shares: Iterable[Tensor], step: int) -> None:
        """Set the state to that after ``step`` updates, moments zero. Before the first update there is none, and it is
        made; later it is overwritten in place, for DeepSpeed links it to the parameters once.

        Args:
            optimizer: DeepSpeed's, or the library's under stage 0.
            zero_stage: 0 to 3.
            shares: whose state; under stages 1 and 2 the first call must be for all that the optimizer holds.
            step: updates taken.
        """
        base = base_optimizer(optimizer, zero_stage)
        for share in shares:
            if not base.state[share]:
                self._make(base, share)
            state = base.state[share]
            for value in (v for name, v in state.items() if torch.is_tensor(v) and not name.startswith("qmap")):
                value.zero_()
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(step)
            elif "step" in state:
                state["step"] = step
        compat.link_moments(optimizer, zero_stage)

    def _make(self, base: Any, share: Tensor) -> None:
        """Make the state of a share, as the optimizer itself does at its first update."""
        fused = bool(base.param_groups[0].get("fused"))
        state = base.state[share]
        state["step"] = torch.tensor(0.0, device=share.device if fused else "cpu")
        state.update({kind: torch.zeros_like(share, requires_grad=False) for kind in MOMENTS})

    @contextlib.contextmanager
    def readable(self, optimizer: Any, zero_stage: int, shares: Iterable[Tensor]) -> Iterator[None]:
        """Let each share's state hold its tensors under ``keys`` inside the ``with`` block."""
        yield

    @contextlib.contextmanager
    def writable(self, optimizer: Any, zero_stage: int, shares: Iterable[Tensor]) -> Iterator[None]:
        """As :meth:`readable`, and take over at the end what was written to them."""
        yield


class LionState(AdamState):
    """bitsandbytes' Lion: one moment."""

    keys: Mapping[str, str] = {"exp_avg": "state1"}

    def _make(self, base: Any, share: Tensor) -> None:
        groups = base.param_groups  # under stage 3 there are no parameters in them between the steps
        base.param_groups = [{**groups[0], "params": [share]}]
        base.init_state(base.param_groups[0], share, 0, 0)
        base.param_groups = groups


class QuantisedState(LionState):
    """bitsandbytes' AdamW in 8 bits: codes and scales of two moments; of fewer than 4096 values the moments."""

    keys: Mapping[str, str] = {kind: kind for kind in MOMENTS}
    parts = (("exp_avg", "state1", "qmap1", "absmax1"), ("exp_avg_sq", "state2", "qmap2", "absmax2"))

    @contextlib.contextmanager
    def readable(self, optimizer: Any, zero_stage: int, shares: Iterable[Tensor]) -> Iterator[None]:
        """Hold the moments in fp32 on the CPU beside the codes."""
        base, shares = base_optimizer(optimizer, zero_stage), list(shares)
        for share in shares:
            state = base.state[share]
            _wait_for_pages(state["state1"], share.device)
            for kind, codes, levels, scales in self.parts:
                small = levels not in state
                state[kind] = state[codes] if small else dequantise(state[codes], state[scales], state[levels])
        compat.link_moments(optimizer, zero_stage)
        try:
            yield
        finally:
            for share in shares:
                for kind in MOMENTS:
                    del base.state[share][kind]
            compat.link_moments(optimizer, zero_stage)

    @contextlib.contextmanager
    def writable(self, optimizer: Any, zero_stage: int, shares: Iterable[Tensor]) -> Iterator[None]:
        """Quantise at the end what was written."""
        base, shares = base_optimizer(optimizer, zero_stage), list(shares)
        with self.readable(optimizer, zero_stage, shares):
            yield
            for share in shares:
                state = base.state[share]
                for kind, codes, levels, scales in self.parts:
                    if levels in state:
                        found = quantise(state[kind], state[levels])
                        state[codes].copy_(found[0])
                        state[scales].copy_(found[1])


class AdafactorState(AdamState):
    """transformers' Adafactor: the second moment, of a matrix as the means of its rows and of its columns."""

    keys: Mapping[str, str] = {kind: kind for kind in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")}

    def shapes(self, optimizer: Any, parameter: Tensor, shape: torch.Size) -> dict[str, torch.Size]:
        """Return a row and a column of a matrix."""
        if len(shape) < 2:
            return {"exp_avg_sq": shape}
        return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}

    def _make(self, base: Any, share: Tensor) -> None:
        shapes = self.shapes(base, share, share.shape)
        base.state[share].update({kind: share.new_zeros(shape) for kind, shape in shapes.items()}, step=0, RMS=0.0)


class MuonState(AdamState):
    """torch's Muon with AdamW beside it."""

    keys: Mapping[str, str] = {kind: kind for kind in ("momentum_buffer", *MOMENTS)}

    def shapes(self, optimizer: Any, parameter: Tensor, shape: torch.Size) -> dict[str, torch.Size]:
        """Return the momentum of a matrix, or AdamW's moments."""
        return dict.fromkeys(("momentum_buffer",) if _is_muons(optimizer, parameter) else MOMENTS, shape)

    def _make(self, base: Any, share: Tensor) -> None:
        if _is_muons(base, share):
            base.state[share]["momentum_buffer"] = torch.zeros_like(share, requires_grad=False)
        else:
            super()._make(base, share)


def _is_muons(optimizer: Any, parameter: Tensor) -> bool:
    return any(group[USES_MUON] for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def _wait_for_pages(state: Tensor, device: torch.device) -> None:
    """Wait until pages that the device may be writing to can be read; bitsandbytes shows them as a CPU's tensor."""
    if getattr(state, "is_paged", False):
        torch.cuda.synchronize(device)


STATES: dict[str, AdamState] = {
    "adamw": AdamState(),
    "adamw_8bit": QuantisedState(),
    "paged_adamw_8bit": QuantisedState(),
    "adafactor": AdafactorState(),
    "muon": MuonState(),
    "lion": LionState(),
}
"""By ``optim.name``."""


def copy_shares(optimizer: Any, zero_stage: int, shares: Iterable[Tensor]) -> list[dict[str, Tensor]]:
    """Copy this rank's shares with AdamW's state of each, for :func:`write_shares` of an engine of the same stage and
    world size."""
    adam = base_optimizer(optimizer, zero_stage)
    return [
        {"weight": share.detach().clone(), **{kind: value.clone() for kind, value in adam.state[share].items()}}
        for share in shares
    ]


def write_shares(
    optimizer: Any, zero_stage: int, shares: Iterable[Tensor], copies: Iterable[Mapping[str, Tensor]]
) -> None:
    """Write what :func:`copy_shares` gave into shares whose state was made. What the forward uses is left as it is."""
    adam = base_optimizer(optimizer, zero_stage)
    for share, copied in zip(shares, copies, strict=True):
        share.data.copy_(copied["weight"])
        for kind, value in adam.state[share].items():
            value.copy_(copied[kind])
