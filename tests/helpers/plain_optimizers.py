"""The optimizers of torch, bitsandbytes and transformers as their own documentation makes them, in one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config.schema import OptimConfig

PLAIN = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon", "lion")


class FlatShares:
    """Trained tensors as ZeRO lays them end to end and cuts them for its ranks; in one process, all ranks' shares.

    Stages 1 and 2 cut the row of all tensors, filled up to a multiple of twice the ranks; stage 3 cuts each tensor.
    """

    def __init__(self, trained: list[nn.Parameter], world_size: int, stage: int) -> None:
        self.trained, self.world_size, self.stage = trained, world_size, stage
        self.shares = [nn.Parameter(share.clone()) for share in self.cut([p.detach() for p in trained])]

    def cut(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.stage < 3:
            return list(filled(torch.cat([t.flatten() for t in tensors]), 2 * self.world_size).chunk(self.world_size))
        parts = [filled(t.flatten(), self.world_size).chunk(self.world_size) for t in tensors]
        return [torch.cat(own) for own in zip(*parts, strict=True)]

    def take_gradients(self) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        for share, gradient in zip(self.shares, self.cut(gradients), strict=True):
            share.grad = gradient.clone()

    def give_weights(self) -> None:
        begin = 0
        for parameter in self.trained:
            size = parameter.numel()
            if self.stage < 3:
                row = torch.cat([s.detach() for s in self.shares])[begin : begin + size]
                begin += size
            else:
                part = -(-size // self.world_size)
                row = torch.cat([s.detach()[begin : begin + part] for s in self.shares])[:size]
                begin += part
            parameter.data.copy_(row.view(parameter.shape))


def filled(row: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, -len(row) % multiple))


def plain_optimizer(
    optim: OptimConfig, trained: dict[str, nn.Parameter], shares: FlatShares | None
) -> list[torch.optim.Optimizer]:
    """Return the optimizer, or the two of Muon, over trained tensors by name or over shares of them."""
    import bitsandbytes
    import transformers

    betas, decay = (optim.beta1, optim.beta2), {"weight_decay": optim.weight_decay}
    params = shares.shares if shares else list(trained.values())
    if optim.name in ("adamw_8bit", "paged_adamw_8bit"):
        return [bitsandbytes.optim.AdamW8bit(params, betas=betas, eps=optim.eps, **decay)]
    if optim.name == "lion":
        return [bitsandbytes.optim.Lion(params, betas=(0.9, 0.99), **decay)]
    if optim.name == "adafactor":
        return [transformers.Adafactor(params, lr=1.0, scale_parameter=False, relative_step=False, **decay)]
    outer = ("embed_tokens", "lm_head", "lora_E")  # lora_E is a vector that stands in a column
    inner = {n: p.ndim == 2 and not any(part in n for part in outer) for n, p in trained.items()}
    matrices, others = ([p for n, p in trained.items() if inner[n] == wanted] for wanted in (True, False))
    muon = torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **decay)
    return [muon, torch.optim.AdamW(others, betas=betas, eps=optim.eps, **decay)] if others else [muon]
