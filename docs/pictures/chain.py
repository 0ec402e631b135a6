"""The picture of the chain in README: ``python docs/pictures/chain.py`` writes chain.svg beside this file.

Three stages of one chain, side by side: L = 6 layers, the chain starts at layer 2, and windows have Q = 2 adapters.
"""

from collections.abc import Iterator
from pathlib import Path

LAYERS, START, WINDOW = 6, 2, 2

WIDTH, HEIGHT = 920, 664
COLUMNS = (212, 450, 688)  # left edges of the three stages
BOX = 124  # width of a layer
LAYER, ADAPTER, GAP = 25, 10, 5  # heights
GROUND = 446  # lower edge of the embeddings

INK, MUTED, FROZEN, EDGE = "#1f2937", "#667085", "#e4e7ec", "#b6bec9"
ADAPTERS, DONE, WINDOWS, INSIDE, DISK = "#ea7317", "#f9c99a", "#2563eb", "#eaf1ff", "#0f766e"

Parts = Iterator[str]


def picture() -> str:
    """The whole SVG. It has a background of its own, so that it reads the same in light and dark surroundings."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="-apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif" role="img">',
        "<title>A chain of adapters, trained one window at a time</title>",
        "<defs>",
        *(_arrowhead(name, colour) for name, colour in (("adapters", ADAPTERS), ("window", WINDOWS), ("disk", DISK))),
        _arrowhead("ink", MUTED),
        "</defs>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="12" fill="#ffffff" stroke="#d0d5dd"/>',
        *_words(),
        *(part for stage, left in enumerate(COLUMNS) for part in _stage(left, START + stage)),
        *_slides(),
        *_clients(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _arrowhead(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5.5" markerHeight="5.5" orient="auto">'
        f'<path d="M0 0.5 L8 4 L0 7.5 z" fill="{colour}"/></marker>'
    )


def _text(
    x: float, y: float, words: str, size: float = 13, colour: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"{weight}>{words}</text>'
    )


def _box(x: float, y: float, width: float, height: float, style: str, radius: float = 4) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" {style}/>'


def _path(points: str, colour: str, end: str = "", width: float = 2) -> str:
    marker = f' marker-end="url(#{end})"' if end else ""
    return f'<path d="{points}" fill="none" stroke="{colour}" stroke-width="{width:g}"{marker}/>'


def _layer_top(layer: int) -> float:
    """Upper edge of a layer; its adapter, if it has one, lies above."""
    adapters_below = max(0, layer - START)
    embeddings = 22
    return GROUND - embeddings - (layer + 1) * (LAYER + GAP) - adapters_below * (ADAPTER + GAP)


def _adapter_top(layer: int) -> float:
    return _layer_top(layer) - GAP - ADAPTER


def _head_top() -> float:
    return _adapter_top(LAYERS - 1) - 12 - LAYER


def _window_edges(bottom: int) -> tuple[float, float]:
    """Upper and lower edge of the window whose lowest adapter is that of layer ``bottom``."""
    return _adapter_top(bottom + WINDOW - 1) - 6, _adapter_top(bottom) + ADAPTER + 3


def _stage(left: float, bottom: int) -> Parts:
    """One stage: what is cached below the window, what is in memory, and what is above it."""
    top, middle, right = bottom + WINDOW - 1, left + BOX / 2, left + BOX
    last = top == LAYERS - 1
    upper, lower = _window_edges(bottom)
    yield _text(middle, _head_top() - 20, f"stage {bottom - START + 1}", 14, anchor="middle", bold=True)
    yield _box(left - 9, upper, BOX + 18, lower - upper, f'fill="{INSIDE}" stroke="{WINDOWS}" stroke-width="2"', 7)
    yield _box(left, GROUND - 22, BOX, 22, f'fill="{FROZEN}" stroke="{EDGE}"')
    yield _text(middle, GROUND - 7, "embeddings", 12, MUTED, "middle")
    for layer in range(LAYERS):
        y = _layer_top(layer)
        reached = layer <= top
        style = f'fill="{FROZEN}" stroke="{EDGE}"' if reached else f'fill="none" stroke="{EDGE}" stroke-dasharray="3 3"'
        yield _box(left, y, BOX, LAYER, style)
        words = (middle, "middle") if reached else (left + 8, "start")
        yield _text(words[0], y + 17, f"layer {layer}", 12, MUTED if reached else "#98a2b3", words[1])
        if layer >= START:
            colour = ADAPTERS if bottom <= layer <= top else DONE if layer < bottom else "#ffffff"
            yield _box(
                left, _adapter_top(layer), BOX, ADAPTER, f'fill="{colour}" stroke="{ADAPTERS}" stroke-width="1.5"', 3
            )
    for layer in range(top, LAYERS - 1):  # the way of the adapters alone
        yield _path(
            f"M{middle:g} {_adapter_top(layer) - 1:g} V{_adapter_top(layer + 1) + ADAPTER + 2:g}", ADAPTERS, "adapters"
        )
    yield _path(f"M{middle:g} {_adapter_top(LAYERS - 1) - 1:g} V{_head_top() + LAYER + 2:g}", ADAPTERS, "adapters")
    yield _box(left, _head_top(), BOX, LAYER, f'fill="{INK}"')
    yield _text(middle, _head_top() + 17, "head", 12.5, "#ffffff", "middle", bold=True)
    yield _text(right + 8, _head_top() + 17, "loss" if last else "+ λ · global loss", 12, ADAPTERS, bold=True)
    if not last:
        yield _text(right + 14, upper + 12, "local loss", 12, ADAPTERS, bold=True)
    yield from _disk(right + 22, _layer_top(bottom) + LAYER / 2 + 3)
    yield _path(f"M{right + 1:g} {_layer_top(bottom) + LAYER / 2 + 3:g} h17", DISK, "disk")
    yield _path(
        f"M{right + 33:g} {_layer_top(bottom) - 1:g} V{_adapter_top(bottom) + 5:g} H{right + 3:g}", DISK, "disk"
    )


def _disk(left: float, middle: float) -> Parts:
    width, half, lid = 22, 9, 3.5
    top, line = middle - half, f'stroke="{DISK}" stroke-width="1.5"'
    around, back = (f"a{width / 2:g} {lid} 0 0 0 {across} 0" for across in (width, -width))
    yield f'<path d="M{left:g} {top:g} v{2 * half} {around} v{-2 * half} {back}" fill="#d5efeb" {line}/>'
    yield f'<ellipse cx="{left + width / 2:g}" cy="{top:g}" rx="{width / 2:g}" ry="{lid}" fill="#eefaf8" {line}/>'
    yield _text(left + width + 6, middle + half - 5, "cache", 12, DISK, bold=True)


def _slides() -> Parts:
    """The window goes one layer up from stage to stage."""
    for stage in (0, 1):
        heights = [sum(_window_edges(START + each)) / 2 for each in (stage, stage + 1)]
        begin, end, round_ = COLUMNS[stage] + BOX + 11, COLUMNS[stage + 1] - 13, 9
        bend, rise = end - 20, heights[1] - heights[0] + 2 * round_
        corners = f"q{round_} 0 {round_} {-round_} v{rise:g} q0 {-round_} {round_} {-round_}"
        yield _path(f"M{begin} {heights[0]:g} H{bend - round_} {corners} H{end}", WINDOWS, "window")


def _words() -> Parts:
    yield _text(
        24, 36, "A machine trains one window of adapters, and needs memory for that window alone", 17, bold=True
    )
    example = f"An example: {LAYERS} layers, a chain that starts at layer {START}, windows of Q = {WINDOW} adapters"
    yield _text(24, 58, example, 13, MUTED)
    x = COLUMNS[0] - 9
    for fill, words in (
        (ADAPTERS, "adapter in training"),
        (DONE, "trained, and frozen"),
        ("#ffffff", "not trained yet"),
    ):
        yield _box(x, 79, 30, ADAPTER, f'fill="{fill}" stroke="{ADAPTERS}" stroke-width="1.5"', 3)
        yield _text(x + 38, 88.5, words, 12.5, MUTED)
        x += 174
    upper, lower = _window_edges(START)
    for y, colour, title, lines in (
        (
            _head_top() + 12,
            ADAPTERS,
            "Above the window",
            ("the adapters alone stand in", "for their layers, which", "are not loaded"),
        ),
        (upper + 10, WINDOWS, "In memory: the window", ("Q adapters are trained,", "with Q − 1 frozen layers")),
        (
            lower + 26,
            DISK,
            "Below: frozen",
            ("every row runs through it", "once; the output is kept", "on disk, and moves up", "with the window"),
        ),
    ):
        yield _text(24, y, title, 13.5, colour, bold=True)
        for number, line in enumerate(lines, 1):
            yield _text(24, y + 17 * number, line, 12.5, MUTED)


def _clients() -> Parts:
    """Clients below the chain: boxes as large as their memory, with the part of the window that each can hold."""
    floor, line = 612, GROUND + 24
    yield _path(f"M24 {line} H{WIDTH - 24}", "#d0d5dd", width=1)
    yield _text(24, line + 34, "Clients", 13.5, bold=True)
    for number, words in enumerate(
        ("boxes are as large as", "their memory; each has", "rows of its own, and", "none holds the model"), 1
    ):
        yield _text(24, line + 34 + 17 * number, words, 12.5, MUTED)
    for x, side, name, adapters, words in (
        (212, 34, "watch", 0, "too small: left out"),
        (352, 58, "phone", 1, "the top adapter"),
        (492, 84, "laptop", 2, "the whole window"),
        (648, 108, "hospital", 2, "the whole window"),
    ):
        lost = not adapters
        style = (
            f'fill="#f9fafb" stroke="{EDGE}" stroke-dasharray="4 3"'
            if lost
            else f'fill="#f9fafb" stroke="{INK}" stroke-width="1.5"'
        )
        yield _box(x, floor - side, 1.25 * side, side, style, 6)
        yield from _held(x + 0.625 * side, floor - side / 2, adapters)
        yield _text(x, floor + 17, name, 13, MUTED if lost else INK, bold=True)
        yield _text(x, floor + 32, words, 12, MUTED)
    x = 812
    yield _path(f"M{x} {floor - 18} V{line + 22}", ADAPTERS, "adapters")
    yield _path(f"M{x + 16} {line + 18} V{floor - 22}", MUTED, "ink")
    for y, word, colour in (
        (line + 48, "updates", ADAPTERS),
        (line + 66, "up, their", MUTED),
        (line + 84, "mean", MUTED),
        (line + 102, "down", MUTED),
    ):
        yield _text(x + 28, y, word, 12.5, colour, bold=colour == ADAPTERS)


def _held(middle: float, centre: float, adapters: int) -> Parts:
    """The window in small: its adapters, and the frozen layer between two of them."""
    width, thin, layer = 42, 7, 14
    bar = f'fill="{ADAPTERS}" stroke="{ADAPTERS}"'
    frame = f'fill="{INSIDE}" stroke="{WINDOWS}" stroke-width="1.5"'
    height = adapters * thin + (adapters - 1) * (layer + 4) + 10
    if adapters:
        yield _box(middle - width / 2 - 5, centre - height / 2, width + 10, height, frame, 4)
    for number in range(adapters):
        yield _box(middle - width / 2, centre - height / 2 + 5 + number * (thin + layer + 4), width, thin, bar, 2)
    if adapters > 1:
        yield _box(middle - width / 2, centre - layer / 2, width, layer, f'fill="{FROZEN}" stroke="{EDGE}"', 2)


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture())
