# Copied from clients/web/charts/chart.py by `make docs`: write there, not here.
"""Charts as data: values become coordinates in a small SVG, which templates/chart.html.j2 draws.

The SVG is part of the page, so that it follows the light and dark themes, needs no second request, and works with
screen readers. The learner's report has copies of this file, curves.py, the template and its style sheet.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

# The plot area in SVG units; templates/chart.html.j2 has the frame around it.
LEFT, RIGHT, TOP, BOTTOM = 44, 264, 8, 128
TICKS = 4


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to pixels."""

    low: float
    high: float
    step: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The position of a value."""
        return round(self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low), 1)

    @property
    def ticks(self) -> list[float]:
        """Round values from one end to the other."""
        count = round((self.high - self.low) / self.step)
        return [round(self.low + number * self.step, 10) for number in range(count + 1)]


def axis(values: Iterable[float], start: float, end: float, *, zero: bool = True, least: float = 0.0) -> Axis:
    """An axis with round ends that includes all values and, with `zero`, zero. Steps are at least `least`."""
    known = [*values, *([0.0] if zero else [])]
    low, high = min(known), max(known)
    step = nice(max((high - low) / TICKS, least, 1e-6 if high > low else 0.25))
    return Axis(floor(low / step) * step, max(ceil(high / step), floor(low / step) + 1) * step, step, start, end)


def nice(value: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below `value`."""
    power: float = 10.0 ** floor(log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


@dataclass(frozen=True)
class Bar:
    """A segment of a stacked bar: its kind, corner, size, and tooltip."""

    kind: int
    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A value with its interval, in pixels; `filled` draws a filled dot."""

    x: float
    y: float
    low: float
    high: float
    filled: bool
    label: str


@dataclass(frozen=True)
class Chart:
    """One chart. Any of its marks may be missing. All positions except those in `y` are pixels."""

    title: str
    unit: str
    x_title: str
    y: Axis
    # (position, text) below the axis.
    x_labels: Sequence[tuple[float, str]]
    line: Sequence[tuple[float, float]] = ()
    # A band around the line: the upper edge, then the lower edge in reverse.
    band: Sequence[tuple[float, float]] = ()
    bars: Sequence[Bar] = ()
    dots: Sequence[Dot] = ()
    # (height, label) of reference lines.
    levels: Sequence[tuple[float, str]] = ()
    # The position of the chosen step.
    mark: float | None = None


def curve(
    title: str,
    unit: str,
    steps: Sequence[float],
    values: Sequence[float],
    *,
    spread: Sequence[float] = (),
    levels: Sequence[tuple[float, str]] = (),
    zero: bool = True,
    mark: float | None = None,
) -> Chart:
    """A line over a round's steps, with a band of `spread` on both sides."""
    spread = spread or [0.0] * len(values)
    tops = [value + around for value, around in zip(values, spread, strict=True)]
    bottoms = [value - around for value, around in zip(values, spread, strict=True)]
    x = axis(steps, LEFT, RIGHT, zero=False, least=1)
    y = axis([*tops, *bottoms, *(value for value, _ in levels)], BOTTOM, TOP, zero=zero)
    upper = [(x.at(step), y.at(top)) for step, top in zip(steps, tops, strict=True)]
    lower = [(x.at(step), y.at(bottom)) for step, bottom in zip(steps, bottoms, strict=True)]
    return Chart(
        title,
        unit,
        "step",
        y,
        [(x.at(tick), f"{tick:g}") for tick in x.ticks],
        line=[(x.at(step), y.at(value)) for step, value in zip(steps, values, strict=True)],
        band=[*upper, *reversed(lower)] if any(spread) else (),
        levels=[(y.at(value), words) for value, words in levels],
        mark=None if mark is None else x.at(mark),
    )


def intervals(
    title: str,
    unit: str,
    x_title: str,
    values: Sequence[tuple[str, float, float, float, bool]],
    *,
    level: tuple[float, str],
) -> Chart:
    """A dot with its interval for each (name, value, low, high, filled), on an axis from 0 to 1."""
    y = Axis(0.0, 1.0, 0.25, BOTTOM, TOP)
    slot = (RIGHT - LEFT) / max(len(values), 1)
    places = [round(LEFT + slot * (number + 0.5), 1) for number in range(len(values))]
    dots = [
        Dot(x, y.at(value), y.at(low), y.at(high), filled, f"{name}: {value:.2f} [{low:.2f}, {high:.2f}]")
        for x, (name, value, low, high, filled) in zip(places, values, strict=True)
    ]
    names = [(x, name) for x, (name, *_) in zip(places, values, strict=True)]
    return Chart(title, unit, x_title, y, _thinned(names, 4), dots=dots, levels=[(y.at(level[0]), level[1])])


def stacks(
    title: str, unit: str, x_title: str, kinds: Sequence[str], columns: Sequence[tuple[str, Sequence[int]]]
) -> Chart:
    """A stacked bar for each (name, counts by kind)."""
    y = axis([float(sum(counts)) for _, counts in columns], BOTTOM, TOP, least=1)
    slot = (RIGHT - LEFT) / max(len(columns), 1)
    bars: list[Bar] = []
    names: list[tuple[float, str]] = []
    for number, (name, counts) in enumerate(columns):
        left, below = LEFT + slot * number, 0
        names.append((round(left + slot / 2, 1), name))
        for kind, count in enumerate(counts):
            if count:
                top, bottom = y.at(below + count), y.at(below)
                label = f"{name}: {count} {kinds[kind]}"
                bars.append(
                    Bar(kind, round(left + slot * 0.1, 1), top, round(slot * 0.8, 1), round(bottom - top, 1), label)
                )
                below += count
    return Chart(title, unit, x_title, y, _thinned(names, 4), bars=bars)


def _thinned(names: list[tuple[float, str]], most: int) -> list[tuple[float, str]]:
    """At most `most` evenly spaced names, always including the last."""
    every = max(1, ceil(len(names) / most))
    return names[(len(names) - 1) % every :: every]
