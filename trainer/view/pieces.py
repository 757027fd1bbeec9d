"""Decode token ids into pieces of text to show: whole characters, and nothing that a terminal or a page would obey."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

from trainer.compat.transformers import byte_of_letter
from trainer.html import visible

MAX_MERGED = 8  # tokens of one piece: a character has at most four bytes, yet a token may end one and begin another
BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or the few that one character is cut into.

    Attributes:
        start: place of its first token in the example, from 0.
        ids: its token ids.
        text: as it is shown: newlines are kept, what cannot be seen is named (``⟨U+200B⟩``), tokens that hold a part of
            a character are their bytes (``⟨F0 9F⟩``).
        in_loss: its tokens are in the loss.
        control: a control token of the tokenizer, not text that looks like one.
    """

    start: int
    ids: tuple[int, ...]
    text: str
    in_loss: bool
    control: bool


class TokenDecoder:
    """Decodes the tokens of one tokenizer into pieces.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control_ids = frozenset(special | set(tokenizer.all_special_ids))
        # Decoders strip the space of what stands first, so nothing that is shown stands first.
        self._anchor = self._backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_text = self._decode(self._anchor)
        self._known: dict[tuple[int, ...], str] = {}

    def pieces(self, ids: Sequence[int], loss_mask: Sequence[bool]) -> list[Piece]:
        """Decode an example: each token in exactly one piece, in order; no piece crosses an edge of the loss mask."""
        out: list[Piece] = []
        tokens = zip(ids, loss_mask, strict=True)
        kinds = [(int(i), bool(in_loss), int(i) in self.control_ids) for i, in_loss in tokens]
        for (in_loss, control), run in groupby(kinds, key=lambda kind: kind[1:]):
            run_ids = tuple(i for i, *_ in run)
            at = out[-1].start + len(out[-1].ids) if out else 0
            for group in [(i,) for i in run_ids] if control else self._groups(run_ids):
                text = visible(self._decode(group) or self._name(group)) if control else self._shown(group)
                out.append(Piece(at, group, text, in_loss, control))
                at += len(group)
        return out

    def _groups(self, ids: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Group tokens into the shortest runs of whole characters; a token that never becomes whole stands alone."""
        groups, at = [], 0
        while at < len(ids):
            ends = range(at + 1, min(at + MAX_MERGED, len(ids)) + 1)
            end = next((e for e in ends if BROKEN not in self._text(ids[at:e])), at + 1)
            groups.append(ids[at:end])
            at = end
        return groups

    def _shown(self, group: tuple[int, ...]) -> str:
        text = self._text(group)
        return visible(text) if text and BROKEN not in text else self._name(group)

    def _text(self, group: tuple[int, ...]) -> str:
        if group not in self._known:
            whole = self._decode([*self._anchor, *group])
            fits = whole.startswith(self._anchor_text)
            self._known[group] = whole[len(self._anchor_text) :] if fits else self._decode(group)
        return self._known[group]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def _name(self, group: tuple[int, ...]) -> str:
        """Name tokens by their bytes, where the vocabulary writes bytes, else as the vocabulary has them."""
        names = []
        for token in self._tokenizer.convert_ids_to_tokens(list(group)):
            if token is None:  # the model may have more rows than the tokenizer has tokens
                names.append(f"⟨{' '.join(map(str, group))}⟩")
            elif token.startswith("<0x") and token.endswith(">"):
                names.append(f"⟨{token[3:-1]}⟩")
            elif all(letter in _byte_letters() for letter in token):
                names.append(f"⟨{' '.join(f'{_byte_letters()[letter]:02X}' for letter in token)}⟩")
            else:
                names.append(visible(token))
        return "".join(names)


@cache
def _byte_letters() -> dict[str, int]:
    """Return the letters that byte-level vocabularies write bytes with (Radford et al., 2019)."""
    return byte_of_letter()
