"""The picture of the demo in README, of what ``chainfed demo`` prints, shortened.

``COLUMNS=80 chainfed demo | python docs/pictures/demo.py`` writes demo.svg beside this file, which needs no font of its own.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

TITLE = "make demo (shortened)"
COLUMNS = 80
PROGRESS = r"so far|: done in|^In the queue|^The job starts|^$"
PARTS = (  # how the first and the last line of each part begin
    (r"1\. ", r"   It answers"),
    (r"2\. ", r"accepted"),
    (r"3\. ", r"round 2/"),
    (r"4\. ", r"head "),
    (r"stage  layers  rounds", r"held-out"),
    (r"class ", r"silo "),
    (r"5\. ", r".* pandas"),
)
STYLES = (
    (r"^\d\. .*", "bold bright_white"),
    (r"^(stage|class) .*|^held-out.*|^…", "bright_black"),
    (r"lacks \S+|2 out|2 are excluded|^  watch .*", "yellow"),
    (r"^ +→ .*|^test accuracy\s+\S+", "bold green"),
    (r"^round \d+/\d+", "cyan"),
)
THEME = TerminalTheme(
    (24, 28, 36),
    (214, 219, 227),
    [(60, 66, 78), (240, 113, 120), (146, 203, 126), (240, 190, 110), (104, 170, 255), (200, 150, 240), (90, 200, 210),
     (214, 219, 227)],
    [(132, 141, 155), (255, 140, 140), (170, 225, 150), (255, 210, 130), (140, 190, 255), (220, 170, 255),
     (120, 220, 230), (255, 255, 255)],
)  # fmt: skip
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def shortened(lines: Iterable[str]) -> Iterator[str]:
    """The parts of the story, without what tells progress. ``…`` stands for the rounds that are left out, and from there on an
    empty line is before each part.
    """
    parts, inside = list(PARTS), False
    for line in lines:
        if not parts or re.search(PROGRESS, line):
            continue
        first, last = parts[0]
        if not inside and re.match(first, line):
            inside = True
            if first.startswith("4"):
                yield "…"
            if len(parts) <= 4:
                yield ""
        if inside:
            yield line.rstrip()
            if re.match(last, line):
                parts.pop(0)
                inside = False


def picture(lines: Iterable[str]) -> str:
    """The same as an SVG."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), color_system="truecolor", force_terminal=True)
    for line in shortened(lines):
        text = Text(line, no_wrap=True)
        for pattern, style in STYLES:
            text.highlight_regex(pattern, style)
        console.print(text, soft_wrap=True)
    made = console.export_svg(title=TITLE, theme=THEME, unique_id="demo")
    made = re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", "", made, flags=re.DOTALL)
    return re.sub(r"[ \t]+$", "", made.replace("Fira Code, monospace", FONTS), flags=re.MULTILINE)


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(sys.stdin))
