"""Drawings of matplotlib as parts of a page: vectors in its own colours, light or dark, that can be read aloud."""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from seft_dist.results.figures import load_pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Each of these stands for a colour of the page's style sheet; matplotlib needs some colour of its own.
INK, MUTED, GRID, SURFACE = "#010203", "#010204", "#010205", "#010206"
SERIES = tuple(f"#0103{number:02x}" for number in range(1, 9))
"""Colours of series: a palette that colour-blind readers can tell apart, in page.css as --series-1 to --series-8."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))
"""Line styles of the first, second and third eight series."""
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)
}
_SVG, _LINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "font.size": 9,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
WIDTH, HEIGHT = 4.9, 2.9
"""Inches of a drawing; on a telephone it is shown at about this size, so that its text can be read."""


@dataclass(frozen=True)
class Key:
    """An entry of a drawing's legend."""

    text: str
    colour: str = SERIES[0]
    """One of the colours above."""
    shape: str = "line"
    """ "line", "thin", "band", "dots", "dashes", "dotted" or "block"."""

    @property
    def variable(self) -> str:
        """Name of the colour in the style sheet."""
        return _VARIABLES[self.colour]


@dataclass(frozen=True)
class Table:
    """The numbers behind a drawing, as text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing, and everything that stands for it where it cannot be seen."""

    name: str
    """Its id in the page: letters, digits and hyphens."""
    title: str
    alt: str
    """Description, in a sentence or two."""
    table: Table | None
    svg: Markup = field(default_factory=Markup)
    """Empty: nothing was drawn."""
    legend: Sequence[Key] = ()
    note: str = ""
    """Advice on reading it."""


Draw = Callable[["Axes"], None]


def draw_svg(
    name: str,
    title: str,
    alt: str,
    draw: Draw,
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
    tips: Sequence[str] = (),
) -> Markup:
    """Draw into an SVG element that is part of a page.

    Args:
        name: Id of the figure: letters, digits and hyphens.
        title: Its title, for readers who cannot see it.
        alt: What there is to see.
        draw: Draws into the axes.
        width: Inches.
        height: Inches.
        tips: Texts for artists whose gid is "tip-0", "tip-1" and so on, which a browser shows when they are pointed at.

    Returns:
        The element. All text in it is escaped.

    Raises:
        ValueError: matplotlib is not installed.
    """
    plt = load_pyplot("figures")
    with plt.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        try:
            draw(axes)
            image = io.BytesIO()
            figure.savefig(image, format="svg", metadata={"Date": None})
        finally:
            plt.close(figure)
    return _as_element(image.getvalue(), name, title, alt, tips)


def _as_element(svg: bytes, name: str, title: str, alt: str, tips: Sequence[str]) -> Markup:
    """Turn a drawing into an inline element: unique ids, the page's colours and fonts, texts for screen readers."""
    ET.register_namespace("", _SVG)
    root = ET.fromstring(svg)
    # The style sheet among the definitions would hold for the whole page
    for unused in [child for child in root if child.find(f"{{{_SVG}}}style") is not None or "metadata" in child.tag]:
        root.remove(unused)
    for element in root.iter():
        _restyle(element, name, tips)
        element.text, element.tail = ((text or "").strip() or None for text in (element.text, element.tail))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc", "class": "drawing"}
    for position, (kind, text) in enumerate((("title", title), ("desc", alt))):
        child = ET.Element(f"{{{_SVG}}}{kind}", {"id": f"{name}-{kind}"})
        child.text = printable(text, 2000)
        root.insert(position, child)
    return Markup(ET.tostring(root, encoding="unicode"))


def _restyle(element: ET.Element, name: str, tips: Sequence[str]) -> None:
    """Give one element its final id, references, style, class and tip."""
    own = element.attrib.pop("id", None)
    if own is not None:
        element.set("id", f"{name}-{own}")
        tip = re.fullmatch(r"tip-(\d+)", own)
        if tip and int(tip[1]) < len(tips):
            child = ET.Element(f"{{{_SVG}}}title")
            child.text = printable(tips[int(tip[1])])
            element.insert(0, child)
            element.set("class", "tip")
        run = re.fullmatch(r"run-(\d+)-\d+", own)
        if run:
            element.set("class", f"of-run-{run[1]}")
    link = element.attrib.pop(_LINK, None)
    if link is not None:
        element.set("href", f"#{name}-{link.removeprefix('#')}")
    clip = element.get("clip-path", "")
    if clip.startswith("url(#"):
        element.set("clip-path", f"url(#{name}-{clip[5:]}")
    style = element.get("style", "")
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    style = re.sub(r"font(-family)?: [^;]*;?", _font_size, style)
    if style:
        element.set("style", style)


def _font_size(match: re.Match[str]) -> str:
    """Keep the size of a font, whose family is the page's."""
    size = re.search(r"[\d.]+px", match[0])
    return f"font-size: {size[0]};" if size else ""


def printable(text: object, most: int = 300) -> str:
    """Make text that XML can hold, short enough not to overflow a line of the page.

    Args:
        text: Anything, such as a name from a file.
        most: Number of characters that are kept.
    """
    kept = "".join(char if char.isprintable() else " " for char in str(text)[: most + 1])
    return kept if len(kept) <= most else f"{kept[: most - 1]}…"


def thin_out(steps: Sequence[float], values: Sequence[float], most: int = 600) -> tuple[list[float], list[float]]:
    """Leave out points of a long line that nobody could see: of each piece, its smallest and largest value stay.

    Args:
        steps: Ascending.
        values: As many.
        most: About the number of points that are kept.
    """
    if len(steps) <= most:
        return list(steps), list(values)
    kept: set[int] = {0, len(steps) - 1}
    size = 2 * len(steps) / most
    for begin in range(most // 2):
        piece = range(int(begin * size), min(int((begin + 1) * size), len(steps)))
        if piece:
            kept |= {min(piece, key=values.__getitem__), max(piece, key=values.__getitem__)}
    chosen = sorted(kept)
    return [steps[i] for i in chosen], [values[i] for i in chosen]
