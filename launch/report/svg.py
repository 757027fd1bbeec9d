"""Draw with SVG: scales, ticks, axes and the few elements that the charts are made of. No style attribute anywhere, so
that the page's content policy can refuse them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.html import text

# Five classes with colours that colour-blind people tell apart (Okabe and Ito, 2008), and a shape each for print.
COLOURED = 5
SHAPES = ("circle", "square", "diamond", "up", "down")
# Cividis (Nuñez, Anderton and Renslow, 2018): of one order of lightness, whoever looks at it.
_CIVIDIS = ((0, 32, 77), (60, 77, 110), (124, 123, 120), (187, 174, 105), (255, 234, 70))


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from ``low`` to ``high`` to places from ``begin`` to ``end``; logarithmic where that is asked for."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Return values to write at the axis, about five."""
        if self.is_log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for multiples in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
                found = [m * 10.0**e for e in exponents for m in multiples if self.low <= m * 10.0**e <= self.high]
                if len(found) >= 4:
                    return found
        step = _step((self.high - self.low) / 6)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first
        return [(first + k) * step for k in range(min(count, 20) + 1)]


def _step(rough: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten."""
    if not rough > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next((m * power for m in (1, 2, 5) if m * power >= rough * 0.999), 10 * power)


def scale(
    values: Sequence[float], begin: float, end: float, *, log_from: float = math.inf, margin: float = 0.04
) -> Scale:
    """Build a scale over values, with a margin; logarithmic where they span more than the factor ``log_from``."""
    low, high = min(values), max(values)
    if low > 0 and high / low > log_from:
        room = (high / low) ** margin
        return Scale(low / room, high * room, begin, end, is_log=True)
    room = (high - low) * margin if high > low else abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, begin, end)


def short(value: float) -> str:
    """Write a number for an axis or a cell: ``12,000``, ``0.25``, ``2e-05``."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 and value == int(value):
        return f"{int(value):,}"
    return f"{value:.4g}"


def ticks_text(ticks: Sequence[float]) -> list[str]:
    """Write ticks alike: with as many digits as tell each from its neighbours."""
    largest = max(map(abs, ticks), default=0.0)
    if largest < 1e-3:
        return [short(float(f"{tick:.9g}")) for tick in ticks]
    for digits in range(10):
        if all(abs(round(tick, digits) - tick) <= 1e-9 * largest for tick in ticks):
            return [f"{tick + 0.0:,.{digits}f}" for tick in ticks]
    return [f"{tick:g}" for tick in ticks]


def n(value: float) -> str:
    """Write a coordinate in as few characters as its tenth needs."""
    return f"{value:.1f}".removesuffix(".0")


def label(x: float, y: float, words: object, kind: str = "", anchor: str = "start", more: str = "") -> str:
    """Write a text; ``words`` is escaped here."""
    named = f' class="{kind}"' if kind else ""
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{n(x)}" y="{n(y)}"{named}{at}{more}>{text(words)}</text>'


def marker(x: float, y: float, shape: str, size: float, kind: str, title: str = "") -> str:
    """Draw a mark; its title is shown where the mouse rests, and read aloud."""
    inside = f"<title>{text(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{n(x)}" cy="{n(y)}" r="{n(size)}" class="{kind}">{inside}</circle>'
    a, b = size * 1.25, size * 0.9
    drawn = {
        "square": f"M{n(x - b)} {n(y - b)}h{n(2 * b)}v{n(2 * b)}h{n(-2 * b)}z",
        "diamond": f"M{n(x)} {n(y - a)}l{n(a)} {n(a)}l{n(-a)} {n(a)}l{n(-a)} {n(-a)}z",
        "up": f"M{n(x)} {n(y - a)}l{n(a)} {n(2 * b)}h{n(-2 * a)}z",
        "down": f"M{n(x)} {n(y + a)}l{n(a)} {n(-2 * b)}h{n(-2 * a)}z",
    }[shape]
    return f'<path d="{drawn}" class="{kind}">{inside}</path>'


def polyline(points: Sequence[tuple[float, float] | None], kind: str, title: str = "") -> str:
    """Draw a line through points; ``None`` is a gap."""
    parts, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{n(point[0])} {n(point[1])}")
        pen = "L"
    inside = f"<title>{text(title)}</title>" if title else ""
    return f'<path d="{"".join(parts)}" class="{kind}">{inside}</path>' if parts else ""


def frame(width: float, height: float, content: Sequence[str], words: str) -> str:
    """Put elements into a drawing that says in words what it shows."""
    size = f'viewBox="0 0 {n(width)} {n(height)}" width="{n(width)}"'
    return f'<svg {size} role="img" aria-label="{text(words)}">{"".join(content)}</svg>'


def axes(x: Scale, y: Scale, x_name: str, y_name: str) -> list[str]:
    """Draw grid, ticks and names of two axes with their units; ``y`` may rise or fall."""
    drawn, bottom, top = [], max(y.begin, y.end), min(y.begin, y.end)
    for tick, words in zip(y.ticks(), ticks_text(y.ticks())):
        drawn.append(f'<path d="M{n(x.begin)} {n(y(tick))}H{n(x.end)}" class="grid"/>')
        drawn.append(label(x.begin - 7, y(tick) + 4, words, anchor="end"))
    for tick, words in zip(x.ticks(), ticks_text(x.ticks())):
        drawn.append(f'<path d="M{n(x(tick))} {n(bottom)}v5" class="tick"/>')
        drawn.append(label(x(tick), bottom + 19, words, anchor="middle"))
    drawn.append(f'<path d="M{n(x.begin)} {n(bottom)}H{n(x.end)}" class="tick"/>')
    drawn.append(label((x.begin + x.end) / 2, bottom + 37, x_name, "name", "middle"))
    drawn.append(label(x.begin - 50, top - 14, y_name, "name"))
    return drawn


def colour(share: float) -> tuple[str, str]:
    """Return the fill of a share from 0 to 1 on the scale of lightness, and the class of a text upon it."""
    at = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    k = min(int(at), len(_CIVIDIS) - 2)
    mixed = [round(a + (at - k) * (b - a)) for a, b in zip(_CIVIDIS[k], _CIVIDIS[k + 1])]
    luminance = sum(w * (c / 255) ** 2.2 for w, c in zip((0.2126, 0.7152, 0.0722), mixed))
    # black and white have the same contrast to 0.179
    return "#{:02x}{:02x}{:02x}".format(*mixed), "on-light" if luminance > 0.179 else "on-dark"
