"""Draw the loss of a run as text: a line of dots for training, a mark for each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.report import svg
from launch.report.curves import Points, thinned
from launch.report.runs import Run

WIDTH, ROWS = 60, 12  # columns in all, rows of the drawing itself
MAX_LABELS = 5  # of the loss axis
# Unicode's braille patterns: two columns of four dots, by their bit.
BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
TRAIN_STYLE, EVAL_STYLE = "\033[36m", "\033[1;33m"
PLAIN = "\033[0m"


@dataclass(frozen=True, slots=True)
class Look:
    """How a curve is written.

    Attributes:
        is_unicode: with braille dots and lines; else in ASCII.
        is_coloured: with the terminal's colours.
    """

    is_unicode: bool = True
    is_coloured: bool = False

    @property
    def mark(self) -> str:
        """Return the mark of an evaluation."""
        return "●" if self.is_unicode else "O"


def loss_curve(run: Run, look: Look, width: int = WIDTH) -> list[str]:
    """Return the lines of the drawing, at most ``width`` columns each; none where no loss was logged.

    The loss axis is logarithmic where the loss falls by more than a factor of 6, as in ``afina report``.
    """
    train = thinned(run.series("loss"), 4 * width)
    scored = run.series("eval_loss")
    values = [value for _, value in [*train, *scored] if value is not None]
    if not values:
        return []
    last = max(step for step, _ in [*train, *scored])
    y = svg.scale(values, 4 * ROWS - 1, 0, log_from=6)
    labels = _labels(y)
    gutter = max(map(len, labels.values())) + 2
    columns = width - gutter
    x = svg.Scale(0, max(last, 1), 0, 2 * columns - 1)
    cells = _dots(train, x, y, columns) if look.is_unicode else _points(train, x, y, columns)
    marks = {(min(columns - 1, int(x(step) / 2)), int(y(value) / 4)) for step, value in scored if value is not None}
    edge = "┤" if look.is_unicode else "|"
    lines = []
    for row in range(ROWS):
        drawn = "".join(_cell(cells[row][column], (column, row) in marks, look) for column in range(columns))
        lines.append(f"{labels.get(row, ''):>{gutter - 2}} {edge}{drawn}".rstrip())
    name = "step"
    ends = f"0{name:^{max(len(name), columns - 1 - len(str(last)))}}{last}"
    lines.append(f"{' ' * gutter}{ends}"[:width].rstrip())
    legend = [_styled("⠤⠤" if look.is_unicode else "..", TRAIN_STYLE, look) + " loss of each update"] if train else []
    legend += [_styled(look.mark, EVAL_STYLE, look) + " loss on held-out rows"] if marks else []
    return [*lines, f"{' ' * gutter}{'   '.join(legend)}"]


def _labels(y: svg.Scale) -> dict[int, str]:
    """Return the numbers at the loss axis by their row, no two rows that touch each other."""
    ticks = y.ticks()
    found: dict[int, str] = {}
    for tick, text in zip(ticks, svg.ticks_text(ticks), strict=True):
        row = int(y(tick) / 4)
        if not any(near in found for near in (row - 1, row, row + 1)):
            found[row] = text
    return found or {0: f"{y.high:.4g}", ROWS - 1: f"{y.low:.4g}"}


def _dots(points: Points, x: svg.Scale, y: svg.Scale, columns: int) -> list[list[str]]:
    """Draw a line through points, eight dots a cell."""
    bits = [[0] * columns for _ in range(ROWS)]
    before: tuple[int, int] | None = None
    for step, value in points:
        if value is None:
            before = None
            continue
        here = round(x(step)), round(y(value))
        for column, row in _between(before or here, here):
            bits[row // 4][column // 2] |= DOTS[row % 4][column % 2]
        before = here
    return [[chr(BRAILLE + cell) if cell else " " for cell in row] for row in bits]


def _between(begin: tuple[int, int], end: tuple[int, int]) -> Sequence[tuple[int, int]]:
    count = max(abs(end[0] - begin[0]), abs(end[1] - begin[1]), 1)
    return [tuple(round(a + (b - a) * k / count) for a, b in zip(begin, end)) for k in range(count + 1)]  # type: ignore[misc]


def _points(points: Points, x: svg.Scale, y: svg.Scale, columns: int) -> list[list[str]]:
    cells = [[" "] * columns for _ in range(ROWS)]
    for step, value in points:
        if value is not None:
            cells[round(y(value)) // 4][round(x(step)) // 2] = "."
    return cells


def _cell(drawn: str, is_mark: bool, look: Look) -> str:
    if is_mark:
        return _styled(look.mark, EVAL_STYLE, look)
    return drawn if drawn == " " else _styled(drawn, TRAIN_STYLE, look)


def _styled(text: str, style: str, look: Look) -> str:
    return f"{style}{text}{PLAIN}" if look.is_coloured else text
