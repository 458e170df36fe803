"""Tables as Markdown, figures as SVG, and the hardware that they were measured on."""

import math
import os
import platform
import re
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Sequence
from xml.sax.saxutils import escape

import torch

Line = list[tuple[float, float]]  # points of a line
COLOURS = ("#2f81f7", "#d9730d", "#1a9850", "#8957e5", "#c93c37", "#768390", "#b08800", "#0e8a8a", "#d14fa3")


def markdown(lines: Sequence[dict[str, str]]) -> str:
    """A table with a column for each key of a line."""
    heads = list(dict.fromkeys(head for line in lines for head in line))
    rows = [heads, ["---"] * len(heads), *([line.get(head, "") for head in heads] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def machine() -> str:
    """Name the hardware, the version of torch and the date."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}, {date.today()}"


def draw(path: Path, lines: dict[str, Line], across: str, up: str, about: str = "") -> None:
    """Draw lines with a point for each value, as SVG, in colours for light and dark pages."""
    width, height, left, right, top, bottom = 720, 360, 60, 210, 20, 310  # of the picture, and the edges of its field
    wide, high = (ticks(max(values)) for values in zip(*(point for line in lines.values() for point in line)))
    middle = (top + bottom) / 2

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / wide[-1] * (width - right - left), bottom - y / high[-1] * (bottom - top)

    def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f"<desc>{escape(about)}</desc>",
        "<style>text{font-size:13px;fill:#57606a}@media(prefers-color-scheme:dark){text{fill:#adbac7}}</style>",
        f'<path d="M{left} {top}V{bottom}H{width - right}" fill="none" stroke="#768390"/>',
        text((left + width - right) / 2, height - 10, across),
        text(16, middle, up, more=f' transform="rotate(-90 16 {middle})"'),
        *(text(place(tick, 0)[0], bottom + 18, f"{tick:,g}") for tick in wide),
        *(text(left - 6, place(0, tick)[1] + 4, f"{tick:,g}", "end") for tick in high),
    ]
    for number, (name, line) in enumerate(lines.items()):
        colour, row = COLOURS[number % len(COLOURS)], top + 14 + 20 * number
        points = [place(*point) for point in line]
        route = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M{route}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        parts.append(f'<rect x="{width - right + 14}" y="{row - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(text(width - right + 32, row, name, "start"))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def ticks(highest: float) -> list[float]:
    """Choose round numbers from 0 to `highest` or a little more, at most seven."""
    size = 10 ** math.floor(math.log10(highest or 1))
    step = next(size * part for part in (0.2, 0.5, 1.0, 2.0) if highest <= 6 * size * part)
    return [round(step * number, 9) for number in range(math.ceil((highest or 1) / step) + 1)]
