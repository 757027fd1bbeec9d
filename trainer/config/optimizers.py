"""The optimizers: which keys of ``optim`` belong to which, and their learning rate beside AdamW's. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.method import METHODS


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What is known of an optimizer.

    Attributes:
        title: its name in messages.
        library: that it comes from.
        keys: of ``optim`` that mean something for it alone or for some; rate, decay and clipping mean it for all.
        rate_factor: of the method's default learning rate, which is AdamW's.
        momentum: where ``optim.momentum`` is null.
        needs_whole_matrices: its update of an element depends on the others of its matrix, which ZeRO cuts.
        quantises: its moments are held in 8 bits, in blocks.
    """

    title: str
    library: str
    keys: frozenset[str]
    rate_factor: float = 1.0
    momentum: float | None = None
    needs_whole_matrices: bool = False
    quantises: bool = False


ADAM = frozenset({"beta1", "beta2", "eps"})

# Lion's authors take a rate 3 to 10 times smaller than AdamW's, for each of its updates is a whole rate large (Chen et
# al., 2023, section 5). Adafactor divides an update by its own root mean square, and Muon is scaled to that of AdamW
# (Liu et al., 2025): both take AdamW's rate.
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer("AdamW", "torch", ADAM),
    "adamw_8bit": Optimizer("AdamW in 8 bits", "bitsandbytes", ADAM, quantises=True),
    "paged_adamw_8bit": Optimizer("paged AdamW in 8 bits", "bitsandbytes", ADAM, quantises=True),
    "adafactor": Optimizer("Adafactor", "transformers", frozenset(), needs_whole_matrices=True),
    "muon": Optimizer("Muon", "torch", ADAM | {"momentum"}, momentum=0.95, needs_whole_matrices=True),
    "lion": Optimizer("Lion", "bitsandbytes", frozenset({"beta1", "momentum"}), rate_factor=0.1, momentum=0.99),
}


def default_learning_rate(method: str, optimizer: str) -> float:
    """Return the peak rate where ``optim.learning_rate`` is null: the method's, times the optimizer's factor."""
    return METHODS[method].learning_rate * OPTIMIZERS[optimizer].rate_factor
