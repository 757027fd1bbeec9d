"""Fit examples to ``data.max_length``: refuse them, cut them, or split them into pieces that lose nothing."""

from __future__ import annotations

from trainer.data.sources.rows import RowError
from trainer.data.templates.encoded import Encoded


def fit_to_max_length(
    encoded: Encoded, limit: int, on_too_long: str, where: str, is_text: bool, bos_id: int | None
) -> list[Encoded]:
    """Cut an example to ``limit`` tokens, as ``on_too_long`` says; the very same object when it is short enough.

    ``truncate`` cuts plain text at its end, and of a conversation the oldest tokens: never any of the last answer, and
    never a begin token that stands first. ``split`` makes several of it: see :func:`split_to_max_length`.

    Raises:
        RowError: ``too_long``: it may not be cut, or what would be left teaches nothing.
    """
    excess = len(encoded.ids) - limit
    if excess <= 0:
        return [encoded]
    if on_too_long == "split":
        return split_to_max_length(encoded, limit, is_text, bos_id)
    if on_too_long != "truncate":
        raise RowError(
            "too_long",
            where,
            reason=f"is {len(encoded.ids)} tokens long, over data.max_length={limit}",
            hint="raise data.max_length, or data.on_too_long=drop, truncate or split",
        )
    if is_text:
        return [Encoded(encoded.ids[:limit], encoded.loss_mask[:limit], 0, limit)]
    if excess >= encoded.prompt_length:
        raise RowError(
            "too_long",
            where,
            reason=f"has an answer of {len(encoded.ids) - encoded.prompt_length} tokens, which alone fills "
            f"data.max_length={limit}: cutting it would teach a wrong ending",
            hint="raise data.max_length, or data.on_too_long=drop",
        )
    kept = 1 if encoded.ids[0] == bos_id else 0
    loss_mask = encoded.loss_mask[:kept] + encoded.loss_mask[kept + excess :]
    if not any(loss_mask[1:]):
        raise RowError(
            "too_long",
            where,
            reason=f"has no token left in the loss when it is cut to data.max_length={limit}",
            hint="raise data.max_length, or data.on_too_long=drop",
        )
    ids = encoded.ids[:kept] + encoded.ids[kept + excess :]
    prefix_length = max(kept, encoded.prompt_prefix_length - excess)
    return [Encoded(ids, loss_mask, encoded.prompt_length - excess, prefix_length)]


def split_to_max_length(encoded: Encoded, limit: int, is_text: bool, bos_id: int | None) -> list[Encoded]:
    """Split an example into pieces of at most ``limit`` tokens: each label token stands in exactly one of them.

    A piece repeats what stood before it, out of the loss: of a text the one token that its first label is predicted
    from, of a conversation up to half of the piece, and a begin token that stands first. An answer that fits into the
    other half is not cut. Pieces without a label are left out. The piece in which the last answer begins has its prompt
    length, the others have 0, as plain text has.
    """
    ids, loss_mask, length = encoded.ids, encoded.loss_mask, len(encoded.ids)
    kept = 1 if ids[0] == bos_id else 0
    out: list[Encoded] = []
    at = 0
    while at < length:
        context = 0 if at == 0 else 1 if is_text else min(limit // 2, at - kept)
        head = kept if at else 0
        end = min(at + limit - head - context, length)
        if not is_text and end < length:
            end = _before_answer(loss_mask, at, end, limit // 2 - kept)
        piece_mask = [False] * (head + context) + loss_mask[at:end]
        if any(piece_mask[1:]):
            piece_ids = ids[:head] + ids[at - context : end]
            has_answer = not is_text and at <= encoded.prompt_length < end
            prompt_length = encoded.prompt_length - at + context + head if has_answer else 0
            out.append(
                Encoded(piece_ids, piece_mask, prompt_length, len(piece_ids) if is_text else piece_mask.index(True))
            )
        at = end
    return out or [encoded]  # it has no label at all


def _before_answer(loss_mask: list[bool], begin: int, end: int, longest: int) -> int:
    """Return ``end``, or where the answer begins that it would cut in two, if that answer fits into one piece."""
    if not (loss_mask[end - 1] and loss_mask[end]):
        return end
    first = end - 1
    while first > begin and loss_mask[first - 1]:
        first -= 1
    farthest = min(first + longest, len(loss_mask))
    fits = farthest == len(loss_mask) or not all(loss_mask[end : farthest + 1])
    return first if first > begin and fits else end
