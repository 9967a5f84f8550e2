"""How figures are drawn: colours with a light and a dark side, panels of one size, labels beside their points, and SVG that follows the page's theme.

A figure is drawn once, with the light colours. As a file it keeps them; in the page each becomes a CSS variable, and the page says what that is in either
theme. Teachers are coloured by their order in strength, from amber to blue, the axis that colour-blind eyes keep; a marker of its own says it again.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.transforms import Bbox

from kdstore.study.tabular import plain

WIDTH, HEIGHT = 4.1, 3.2  # inches of a panel: a phone shows one of them, a desk two beside each other
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.58, 0.12, 0.52, 0.36  # inches around the axes
_ROLES = {  # name -> colour in the light and in the dark theme
    "ink": ("#1a1d21", "#e9ebee"),
    "muted": ("#59616b", "#a7afb9"),
    "line": ("#d8dce1", "#3b424b"),
    "surface": ("#fefefe", "#171a1f"),
    "none": ("#6a727d", "#9aa3ae"),
    "own": ("#007a6c", "#4fd1b5"),
    "accent": ("#1f4fa8", "#8db4ff"),
}
_LADDER = (("#b07300", "#c4345c", "#7b2f9f", "#1d3c96"), ("#f3b63f", "#ff8c90", "#d193f2", "#90b2ff"))  # weakest to strongest teacher, light and dark
_HEAT, HEAT_STEPS = (("#f6f7f9", "#7fa6e6"), ("#1d2127", "#2f5796")), 12
_MARKERS = "osD^vPXhp<>"
_RC = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a label is a stranger's
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.linewidth": 0.8,
    "axes.edgecolor": _ROLES["muted"][0],
    "axes.labelcolor": _ROLES["muted"][0],
    "text.color": _ROLES["ink"][0],
    "xtick.color": _ROLES["muted"][0],
    "ytick.color": _ROLES["muted"][0],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": _ROLES["line"][0],
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Palette:
    """{role: (light, dark)} of all colours, and each teacher's role and marker."""

    roles: dict[str, tuple[str, str]]
    role_of: dict[str, str]
    marker_of: dict[str, str]

    def color(self, teacher: str) -> str:
        """Return the light colour of a teacher; that of none for what is no teacher of the recipe's."""
        return self.roles[self.role_of.get(teacher, "none")][0]

    def marker(self, teacher: str) -> str:
        return self.marker_of.get(teacher, "o")


@dataclass(frozen=True)
class Figure:
    """A drawn panel; `alternative` says in words what is seen in it."""

    name: str
    title: str
    alternative: str
    canvas: Canvas


def palette(ladder: Sequence[str], own: Sequence[str]) -> Palette:
    """Give colours to teachers, ascending in strength, and to those of the student's own size."""
    places = [i / max(1, len(ladder) - 1) for i in range(len(ladder))]
    roles = {f"teacher{i}": (_along(_LADDER[0], place), _along(_LADDER[1], place)) for i, place in enumerate(places)}
    heat = {f"heat{i}": (_along(_HEAT[0], i / (HEAT_STEPS - 1)), _along(_HEAT[1], i / (HEAT_STEPS - 1))) for i in range(HEAT_STEPS)}
    role_of = {teacher: f"teacher{i}" for i, teacher in enumerate(ladder)} | dict.fromkeys(own, "own")
    markers = {teacher: _MARKERS[i % len(_MARKERS)] for i, teacher in enumerate(ladder)} | dict.fromkeys(own, "*")
    return Palette(_ROLES | heat | roles, role_of, markers)


def role(name: str) -> str:
    """Return the light colour of a role that no teacher has."""
    return _ROLES[name][0]


def _along(colors: Sequence[str], place: float) -> str:
    """Return the colour at a place from 0 to 1 on the way through some."""
    at = place * (len(colors) - 1)
    i = min(int(at), len(colors) - 2)
    first, second = (bytes.fromhex(color[1:]) for color in colors[i : i + 2])
    return "#" + bytes(round(a + (at - i) * (b - a)) for a, b in zip(first, second, strict=True)).hex()


def panel(
    title: str,
    x: str,
    y: str,
    *,
    left: float = _LEFT,
    right: float = _RIGHT,
    bottom: float = _BOTTOM,
    width: float = WIDTH,
    height: float = HEIGHT,
    key: str = "",
) -> Any:
    """Return axes on a canvas of their own; margins are in inches, so that panels side by side agree. `key` says below them what markers mean."""
    with mpl.rc_context(_RC):
        canvas = Canvas(figsize=(width, height))
        FigureCanvasAgg(canvas)
        axes = canvas.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + _TOP) / height))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        canvas.text(0.1 / width, 1 - 0.08 / height, short(title, 54), va="top", weight="bold", fontsize=9.5)
        canvas.text(1 - 0.1 / width, 0.07 / height, key, ha="right", fontsize=8, color=_ROLES["muted"][0])
    return axes


def short(text: str, most: int = 22) -> str:
    """Cut a text to what a figure has room for; its table has the whole."""
    text = plain(text)
    return text if len(text) <= most else f"{text[: most - 3].rstrip()}..."


def left_for(labels: Sequence[str]) -> float:
    """Return the inches that labels at the left of an axis take."""
    return 0.2 + 0.075 * max(map(len, labels), default=1)


def label_points(axes: Any, points: Sequence[tuple[float, float, str]], taken: Sequence[Bbox] = ()) -> None:
    """Write each text beside its point: of the places around it the first that meets the fewest points, other labels and boxes `taken` (in pixels)."""
    with mpl.rc_context(_RC):
        renderer, inside, edge = axes.figure.canvas.get_renderer(), axes.get_window_extent(), axes.figure.bbox.x1 - 2
        at = [axes.transData.transform((x, y)) for x, y, _ in points]
        boxes = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in at] + list(taken)
        for x, y, text in points:
            made = axes.annotate(short(text), (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8.5)
            places = []
            for i, (dx, dy, ha, va) in enumerate(_AROUND):
                made.set(position=(dx, dy), ha=ha, va=va)
                box = made.get_window_extent(renderer)
                outside = max(0.0, inside.x0 - box.x0, box.x1 - edge, inside.y0 - box.y0, box.y1 - inside.y1 - 10)
                places.append((outside > 0, box.count_overlaps(boxes), i))
            dx, dy, ha, va = _AROUND[min(places)[2]]
            made.set(position=(dx, dy), ha=ha, va=va)
            boxes.append(made.get_window_extent(renderer))


_AROUND = [  # (x, y) in points, and which side of the text is there; nearest first
    *((dx, dy, ha, "center") for dx, ha in ((7, "left"), (-7, "right")) for dy in (0, 6, -6, 12, -12)),
    *((0, dy, "center", va) for away in (9, 16, 24, 32) for dy, va in ((away, "bottom"), (-away, "top"))),
    *((dx, dy, ha, "center") for dy in (18, -18, 26, -26) for dx, ha in ((5, "left"), (-5, "right"))),
]


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]], gap: float = 10.5) -> None:
    """Write (x, y, text, colour) right of the ends of lines, moved apart to `gap` points where they meet."""
    scale = 72 / axes.figure.dpi
    with mpl.rc_context(_RC):
        at = sorted((float(axes.transData.transform((x, y))[1]) * scale, x, y, text, color) for x, y, text, color in ends)
        lowest, highest = (edge * scale for edge in axes.get_window_extent().intervaly)
        edge = axes.get_window_extent().x1
        heights = spread([height for height, *_ in at], min(gap, (highest - lowest) / max(1, len(at) - 1)))
        shift = min(0.0, highest - heights[-1]) or max(0.0, lowest - heights[0])
        for height, (own, x, y, text, color) in zip(heights, at, strict=True):
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 1, "relpos": (0, 0.5)}
            axes.annotate(
                short(text, 18),
                (x, y),
                xytext=(16 + (edge - axes.transData.transform((x, y))[0]) * scale, height + shift - own),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                arrowprops=line,
            )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move ascending places as little as needed to stand at least `gap` apart: those that meet share their middle."""
    groups: list[list[float]] = []  # [mean of the places less their rank's gap, number]
    for rank, place in enumerate(places):
        groups.append([place - rank * gap, 1])
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            mean, number = groups.pop()
            before, many = groups.pop()
            groups.append([(mean * number + before * many) / (number + many), number + many])
    middles = [mean for mean, number in groups for _ in range(int(number))]
    return [middle + rank * gap for rank, middle in enumerate(middles)]


def as_file(figure: Figure, form: str) -> bytes:
    """Render a figure as svg or pdf; the same content gives the same bytes."""
    sink = io.BytesIO()
    with mpl.rc_context({**_RC, "svg.hashsalt": figure.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a label in another script: the page has it
        figure.canvas.savefig(sink, format=form, transparent=form == "svg", metadata={"Date": None} if form == "svg" else {"CreationDate": None})
    return sink.getvalue()


def inline_svg(figure: Figure, colors: Palette) -> str:
    """Render a figure for the page: colours become CSS variables, fonts the page's, and nothing in it touches what lies outside."""
    svg = as_file(figure, "svg").decode()
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    names = {light: name for name, (light, _) in colors.roles.items()}
    svg = re.sub(r'style="[^"]*"', lambda style: re.sub(r"#[0-9a-f]{6}", lambda c: f"var(--{names[c[0]]})" if c[0] in names else c[0], style[0]), svg)
    svg = svg.replace("'DejaVu Sans', sans-serif", "var(--sans)").replace("'DejaVu Sans'", "var(--sans)")
    head = re.search(r'viewBox="([^"]*)"', svg)
    assert head is not None
    width = float(head[1].split()[2])
    size = f"min-width: {width:.0f}px; max-width: {1.55 * width:.0f}px"  # from a phone's to a desk's: its text is read at both
    opening = f'<svg viewBox="{head[1]}" style="{size}" aria-hidden="true" focusable="false" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opening + svg[svg.index(">") + 1 :]
