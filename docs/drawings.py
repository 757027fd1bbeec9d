"""Draw docs/pipeline.svg and docs/trie.svg: ``python docs/drawings.py``. Plain strings, no library.

Each picture brings its own panel, so it can be read on a light and on a dark page; where the reader's system is dark,
the panel is too.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = """
  text { font-family: ui-sans-serif, system-ui, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 13px; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 }
  .small { font-size: 11.5px; fill: #59636e }
  .code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 11px; fill: #59636e }
  .panel { fill: #ffffff; stroke: #d1d9e0 }
  .box { fill: #f6f8fa; stroke: #818b98 }
  .shared { fill: #ddf4ff; stroke: #0969da }
  .own { fill: #f6f8fa; stroke: #818b98 }
  .loss { fill: #dafbe1; stroke: #1a7f37 }
  .pad { fill: none; stroke: #b7bfc8; stroke-dasharray: 3 3 }
  .line { fill: none; stroke: #59636e; stroke-width: 1.4 }
  .head { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .small, .code { fill: #9198a1 }
    .panel { fill: #0d1117; stroke: #3d444d }
    .box, .own { fill: #1c2128; stroke: #656c76 }
    .shared { fill: #12294a; stroke: #4493f8 }
    .loss { fill: #12331c; stroke: #3fb950 }
    .pad { stroke: #3d444d }
    .line { stroke: #9198a1 }
    .head { fill: #9198a1 }
  }
"""


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole SVG document with its panel; ``title`` is what a screen reader says."""
    arrow = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="head" d="M 0 0.5 L 8 4 L 0 7.5 z"/></marker>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{arrow}</defs>",
            f'<rect class="panel" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """One line of text, its baseline at ``y``."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle of a kind of ``STYLE``."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>'


def arrow(path: str) -> str:
    """A path that ends in an arrow head."""
    return f'<path class="line" d="{path}" marker-end="url(#head)"/>'


STAGES = (
    ("rows", "read, checked, rendered into|token ids and a loss mask:|a memory-mapped table", "trainer/data/"),
    ("trie", "a global batch, cut into|micro-batches, each with a|shared prefix once", "trainer/data/batching/"),
    ("step", "forward and backward, reduce|gradients, check and clip|their norm, AdamW", "trainer/engine/, kernels/"),
    ("checkpoint", "fp32 weights and moments as|whole tensors, hashed;|complete or not there", "trainer/checkpoint/"),
    ("adapter", "a stock PEFT folder with its|tokenizer; reopened and|compared", "trainer/methods/save.py"),
    ("merge", "folded into the base, read|back from disk to the bit,|its answers compared", "trainer/merge/"),
)
WIDTH, HEIGHT, ROOM, LEFT, UPPER, LOWER = 216, 134, 62, 24, 58, 254


def pipeline() -> str:
    """Rows, trie, step, checkpoint, adapter, merge: what comes out of what, and where it is in the tree."""
    parts = []
    columns = [LEFT + k * (WIDTH + ROOM) for k in (0, 1, 2, 2, 1, 0)]  # there and back again
    for number, (name, lines, where) in enumerate(STAGES):
        x, y = columns[number], UPPER if number < 3 else LOWER
        middle = x + WIDTH / 2
        parts.append(box(x, y, WIDTH, HEIGHT, "box"))
        parts.append(text(middle, y + 26, f"{number + 1}  {name}", "title", "middle"))
        parts += [text(middle, y + 51 + 18 * k, line, "", "middle") for k, line in enumerate(lines.split("|"))]
        parts.append(text(middle, y + HEIGHT - 14, where, "code", "middle"))
    for k in range(2):
        right = columns[k] + WIDTH
        parts.append(arrow(f"M {right + 3} {UPPER + HEIGHT / 2} L {right + ROOM - 4} {UPPER + HEIGHT / 2}"))
        parts.append(arrow(f"M {right + ROOM - 3} {LOWER + HEIGHT / 2} L {right + 4} {LOWER + HEIGHT / 2}"))
    step, low = columns[2] + WIDTH / 2, UPPER + HEIGHT
    parts.append(arrow(f"M {step + 30} {UPPER} C {step + 34} 26 {step - 34} 26 {step - 30} {UPPER - 3}"))
    parts.append(text(step + 40, 38, "next step", "small"))
    parts.append(arrow(f"M {step - 24} {low + 3} L {step - 24} {LOWER - 4}"))
    parts.append(text(step - 32, (low + LOWER) / 2 + 4, "save", "small", "end"))
    parts.append(arrow(f"M {step + 24} {LOWER - 3} L {step + 24} {low + 4}"))
    parts.append(text(step + 32, (low + LOWER) / 2 + 4, "resume", "small"))
    parts.append(text(columns[1] + WIDTH + ROOM / 2, LOWER + HEIGHT / 2 - 10, "the end", "small", "middle"))
    return picture(2 * LEFT + 3 * WIDTH + 2 * ROOM, LOWER + HEIGHT + 24, "From rows to a merged model", parts)


PREFIX = ("Is", "it", "a", "joke", "?")
ROWS = ((*PREFIX, "cats", "sleep", "no"), (*PREFIX, "cats", "vote", "yes"), (*PREFIX, "rain", "no"))
TREE = (  # depth, line on the page, token; a line's first token hangs on the token before it in the tree
    *((depth, 1, token) for depth, token in enumerate(PREFIX)),
    *((5, 0.5, "cats"), (6, 0, "sleep"), (7, 0, "no"), (6, 1, "vote"), (7, 1, "yes"), (5, 2, "rain"), (6, 2, "no")),
)
PARENTS = (None, 0, 1, 2, 3, 4, 5, 6, 5, 8, 4, 10)
WIDE, HIGH, STRIDE = 52, 28, 60


def kind_of(token: str, shared: bool) -> str:
    """How a token is drawn: in the loss, shared by several rows, or a row's own."""
    return "loss" if token in ("no", "yes") else "shared" if shared else "own"


def token_box(x: float, y: float, token: str, kind: str) -> list[str]:
    """A token in its box, whose left edge is at ``x`` and whose middle is at ``y``."""
    return [box(x, y - HIGH / 2, WIDE, HIGH, kind), text(x + WIDE / 2, y + 4.5, token, "", "middle")]


def padded_part(left: float, top: float) -> list[str]:
    """Three rows side by side, padded to the longest."""
    longest = max(map(len, ROWS))
    parts = [text(left, top, "padded: three rows, each filled up to the longest", "title")]
    for number, row in enumerate(ROWS):
        y = top + 34 + 38 * number
        for k in range(longest):
            x = left + k * STRIDE
            if k < len(row):
                parts += token_box(x, y, row[k], kind_of(row[k], k < len(PREFIX) or row[k] == "cats"))
            else:
                parts.append(box(x, y - HIGH / 2, WIDE, HIGH, "pad"))
                parts.append(text(x + WIDE / 2, y + 4, "padding", "small", "middle"))
    return parts + notes(left, top, "23 useful tokens, 24 computed tokens:", "the prefix is computed in every row")


def tree_part(left: float, top: float) -> list[str]:
    """The same rows as a tree: what they begin with in common stands once."""
    parts = [text(left, top, "trie: the same three rows", "title")]
    places = [(left + depth * STRIDE, top + 34 + 44 * line) for depth, line, _ in TREE]
    for (x, y), parent in zip(places, PARENTS, strict=True):
        if parent is not None:
            px, py = places[parent]
            if py == y:
                parts.append(f'<path class="line" d="M {px + WIDE} {py} L {x} {y}"/>')
            else:
                bend = px + WIDE + (x - px - WIDE) / 2
                parts.append(f'<path class="line" d="M {px + WIDE} {py} C {bend} {py} {bend} {y} {x} {y}"/>')
    for number, ((x, y), (_, _, token)) in enumerate(zip(places, TREE, strict=True)):
        parts += token_box(x, y, token, kind_of(token, number < 6))
    return parts + notes(
        left,
        top + 16,
        "23 useful tokens, 12 computed tokens:",
        "loss and gradient are those of the separate",
        "rows, for a row sees only what is on its path",
    )


def notes(left: float, top: float, *lines: str) -> list[str]:
    """Sentences to the right of the rows."""
    return [text(left + 8 * STRIDE + 22, top + 38 + 20 * k, line) for k, line in enumerate(lines)]


def line_part(left: float, top: float) -> list[str]:
    """The tree as the one sequence that the device computes, with its positions and parents."""
    parts = [text(left, top, "what the device computes: one sequence, the tree in depth-first order", "title")]
    y = top + 34
    heads = (("token", 4.5), ("position id = depth", 36), ("predicted from", 56))
    parts += [text(left, y + down, words, "small") for words, down in heads]
    begin = left + 128
    for number, (depth, _, token) in enumerate(TREE):
        x, parent = begin + number * STRIDE, PARENTS[number]
        parts += token_box(x, y, token, kind_of(token, number < 6))
        parts.append(text(x + WIDE / 2, y + 36, str(depth), "small", "middle"))
        parts.append(text(x + WIDE / 2, y + 56, "–" if parent is None else TREE[parent][2], "small", "middle"))
    return parts


def legend(left: float, top: float) -> list[str]:
    """What the colours mean."""
    parts, x = [], left
    for kind, words, room in (
        ("shared", "shared prefix: computed once, forward and backward", 350),
        ("own", "a row's own tokens", 160),
        ("loss", "in the loss (loss mask)", 0),
    ):
        parts += [box(x, top - 11, 18, 14, kind), text(x + 26, top, words, "small")]
        x += room
    return parts


def trie() -> str:
    """Three rows, padded and as a trie."""
    parts = [*padded_part(24, 34), *tree_part(24, 196), *line_part(24, 372), *legend(24, 494)]
    return picture(900, 516, "Three rows with a shared prefix, padded and as a trie", parts)


if __name__ == "__main__":
    for name, drawing in (("pipeline", pipeline()), ("trie", trie())):
        (Path(__file__).parent / f"{name}.svg").write_text(drawing, encoding="utf-8")
