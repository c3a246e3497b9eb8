"""Draws the pictures of ``docs/tutorial.md``: ``python docs/draw.py`` writes ``docs/tutorial/*.svg``."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "tutorial"

INK, LINE, PAPER, PADDING = "#24292f", "#8c959f", "#ffffff", "#eaeef2"
BLUE, ORANGE, GREEN, RED = "#9ecbff", "#ffc680", "#a6e3a1", "#ff9d9d"
ZERO = "#d3dfee"  # padding under a filter


def number(value: float) -> str:
    """``value`` with at most one decimal, so that the SVG text is the same on every machine."""
    return f"{value:.1f}".removesuffix(".0")


class Drawing:
    """Shapes on a white background of ``width`` x ``height`` pixels, as the text of an SVG file."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="13">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>',
        ]
        self.box(0, 0, width, height, PAPER, line="none")

    def box(self, x: float, y: float, width: float, height: float, fill: str, line: str = LINE, thick: float = 1) -> None:
        """Draw a rectangle."""
        at = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
        self.parts.append(f'<rect {at} fill="{fill}" stroke="{line}" stroke-width="{number(thick)}"/>')

    def text(self, x: float, y: float, words: str, anchor: str = "middle", size: int = 13, bold: bool = False) -> None:
        """Draw ``words`` with the baseline at ``y``."""
        weight = "bold" if bold else "normal"
        at = f'x="{number(x)}" y="{number(y)}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
        self.parts.append(f'<text {at} fill="{INK}">{words}</text>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """Draw an arrow to (``to_x``, ``to_y``)."""
        at = f'x1="{number(x)}" y1="{number(y)}" x2="{number(to_x)}" y2="{number(to_y)}"'
        self.parts.append(f'<line {at} stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>')

    def grid(self, x: float, y: float, rows: int, columns: int, cell: float, colors: dict[tuple[int, int], str]) -> None:
        """Draw a grid of cells; ``colors`` maps (row, column) to a color, other cells are white."""
        for i in range(rows):
            for j in range(columns):
                self.box(x + j * cell, y + i * cell, cell, cell, colors.get((i, j), PAPER))

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def tile() -> Drawing:
    """A 3 x 3 convolution of a 5 x 5 image with padding 1, and its matrix product."""
    d = Drawing(760, 330, "A tile of the implicit product, and the pixels that it reads")
    size, padding, cell, rows = 5, 1, 28, range(4, 8)  # rows of the product that one program owns
    m, j = 5, 1 * 3 + 2  # one row, and one column: filter position (1, 2), one channel
    whole = size + 2 * padding
    at_edge = {0, whole - 1}
    colors = {(i, k): PADDING for i in range(whole) for k in range(whole) if at_edge & {i, k}}
    p, q, r, s = m // size, m % size, j // 3, j % 3
    colors |= {(p + i, q + k): ZERO if at_edge & {p + i, q + k} else BLUE for i in range(3) for k in range(3)}
    colors[p + r, q + s] = ORANGE
    d.text(30, 26, "the input, with its padding (grey)", "start", bold=True)
    d.grid(30, 40, whole, whole, cell, colors)
    d.box(30 + q * cell, 40 + p * cell, 3 * cell, 3 * cell, "none", INK, 2)
    d.text(30, 262, f"Row m = {m} is output pixel p = {p}, q = {q}.", "start")
    d.text(30, 282, f"Column j = {j} is filter position r = {r}, s = {s}.", "start")
    d.text(30, 302, f"It reads h = p - 1 + r = {p - 1 + r}, w = q - 1 + s = {q - 1 + s}.", "start")
    left, top, small = 340, 60, 16
    marked = {(i, k): GREEN for i in rows for k in range(9)} | {(m, k): BLUE for k in range(9)} | {(m, j): ORANGE}
    d.text(left + 72, 26, "patches, never stored", bold=True)
    d.text(left + 72, 46, "j = (r, s, c)")
    d.grid(left, top, 12, 9, small, marked)
    d.text(left - 14, top + m * small + 13, "m")
    d.text(left + 72, top + 12 * small + 20, "...")
    d.text(left + 172, top + 80, "x", size=18)
    d.text(left + 226, 26, "filters", bold=True)
    d.text(left + 226, 46, "k")
    d.grid(left + 194, top, 9, 4, small, {(i, k): GREEN for i in range(9) for k in range(2)})
    d.text(left + 284, top + 80, "=", size=18)
    d.text(left + 340, 26, "output", bold=True)
    d.text(left + 340, 46, "k")
    d.grid(left + 308, top, 12, 4, small, {(i, k): GREEN for i in rows for k in range(2)})
    d.text(left + 40, 302, "Green: the tile of one program, and what it reads.", "start")
    return d


def passes() -> Drawing:
    """The shapes of the three products."""
    d = Drawing(760, 250, "The three passes as products")
    m, j, k, top = 90, 60, 36, 70

    def product(left: float, name: str, shapes: tuple[tuple[str, int, int, str], ...]) -> None:
        d.text(left, 26, name, "start", bold=True)
        x: float = left
        for sign, (words, height, width, color) in zip(("", "x", "="), shapes, strict=True):
            if sign:
                d.text(x + 12, top + 32, sign, size=16)
                x += 24
            d.box(x, top, width, height, color)
            d.text(x + width / 2, top - 8, words, size=12)
            x += width

    product(20, "forward", (("patch(x)", m, j, BLUE), ("w", j, k, GREEN), ("y", m, k, ORANGE)))
    product(245, "gradient of the input", (("patch(dz)", m, j, ORANGE), ("w turned", j, k, GREEN), ("dx", m, k, BLUE)))
    product(480, "gradient of the weight", (("dz", k, m, ORANGE), ("patch(x)", m, j, BLUE), ("dw", k, j, GREEN)))
    d.text(20, 205, "rows: output pixels", "start", 12)
    d.text(20, 223, "sum: (r, s, c)", "start", 12)
    d.text(245, 205, "rows: input pixels", "start", 12)
    d.text(245, 223, "sum: (r, s, k)", "start", 12)
    d.text(480, 205, "rows: filters", "start", 12)
    d.text(480, 223, "sum: all output pixels, so it is long", "start", 12)
    return d


def images() -> Drawing:
    """A tile of eight pixels of one image beside a tile of one pixel of eight images."""
    d = Drawing(760, 290, "A tile of pixels beside a tile of images")
    size, cell, rows = 3, 24, 8
    d.text(30, 26, "8 pixels of an image of 3 x 3", "start", bold=True)
    for tile_number, x in enumerate((30, 140)):
        own = range(tile_number * rows, (tile_number + 1) * rows)
        d.grid(x, 44, size, size, cell, {(m // size, m % size): GREEN for m in own})
        for i, m in enumerate(own):
            d.box(x, 140 + i * 14, 72, 14, GREEN if m < size**2 else RED)
        d.text(x + 36, 133, f"tile {tile_number}", size=12)
    used = size**2
    d.text(30, 276, f"{used} of {2 * rows} rows are used; red ones are masked off.", "start", 12)
    d.text(300, 26, "one pixel of 8 images", "start", bold=True)
    for image in range(rows):
        d.grid(300 + image * 54, 60, size, size, 15, {(0, 0): GREEN})
        d.text(300 + image * 54 + 22, 54, f"n = {image}", size=11)
        d.box(300, 140 + image * 14, 72, 14, GREEN)
    d.text(336, 133, "a tile", size=12)
    d.text(400, 160, "All rows are used.", "start")
    d.text(400, 182, "All are at the same corner: with padding 1 the", "start")
    d.text(400, 200, "filter positions r = 0 and s = 0 lie outside for", "start")
    d.text(400, 218, "each of them, and the loop leaves them out.", "start")
    d.grid(400, 228, 3, 3, 11, {(r, s): GREEN if r and s else PADDING for r in range(3) for s in range(3)})
    return d


def split() -> Drawing:
    """A long sum, split into three parts."""
    d = Drawing(760, 260, "Parts of a sum in a workspace, added in order")
    d.text(110, 26, "dz x patches, all pixels", bold=True)
    d.text(420, 26, "workspace", bold=True)
    d.text(640, 26, "gradient", bold=True)
    for part, color in enumerate((BLUE, GREEN, ORANGE)):
        y = 44 + part * 60
        d.box(30, y, 160, 60, color)
        d.text(110, y + 34, f"pixels of part {part}", size=12)
        d.arrow(194, y + 30, 374, y + 30)
        d.text(284, y + 23, f"program {part}", size=12)
        d.box(380, y + 6, 80, 48, color)
        d.text(420, y + 34, f"part {part}", size=12)
        d.arrow(464, y + 30, 594, 124 + part * 10)
    d.box(600, 110, 80, 48, PAPER, INK)
    d.text(640, 138, "dw", size=12)
    d.text(30, 246, "Programs run in any order. Each has a place of its own.", "start", 12)
    d.text(500, 246, "Always (part 0 + part 1) + part 2.", "start", 12)
    return d


def pool() -> Drawing:
    """Windows of 3 x 3 with stride 2 over 7 x 7 pixels, and the four windows that share a pixel."""
    d = Drawing(760, 330, "Windows of the pool, and the four that share a pixel")
    cell, shared = 34, (2, 4)
    d.text(30, 26, "the convolution's output", "start", bold=True)
    d.grid(30, 44, 7, 7, cell, {shared: ORANGE})
    windows = [(p, q) for p in range(3) for q in range(3) if 0 <= shared[0] - 2 * p <= 2 and 0 <= shared[1] - 2 * q <= 2]
    for (p, q), color in zip(windows, ("#0969da", "#1a7f37", "#9a6700", "#cf222e"), strict=True):
        inset = 3 if (p + q) % 2 else 6
        side = 3 * cell - 2 * inset
        d.box(30 + 2 * q * cell + inset, 44 + 2 * p * cell + inset, side, side, "none", color, 2.5)
    d.text(30, 304, "Each pixel asks at most four windows", "start", 12)
    d.text(30, 320, "whether their position points at it.", "start", 12)
    d.text(320, 26, "positions in a window", "start", bold=True)
    d.grid(320, 44, 3, 3, cell, {})
    for position in range(9):
        d.text(320 + position % 3 * cell + 17, 44 + position // 3 * cell + 22, str(position))
    d.text(450, 60, "The orange pixel is", "start", 12)
    for i, (p, q) in enumerate(windows):
        r, s = shared[0] - 2 * p, shared[1] - 2 * q
        d.text(450, 80 + 18 * i, f"position {r * 3 + s} of window ({p}, {q})", "start", 12)
    d.text(320, 190, "a key: 32 bits, ordered like the numbers", "start", bold=True)
    for x, width, words, color in (
        (320, 30, "0", PADDING),
        (350, 270, "exponent, mantissa", BLUE),
        (620, 110, "31 - position", ORANGE),
    ):
        d.box(x, 204, width, 32, color)
        d.text(x + width / 2, 225, words, size=12)
    d.text(335, 252, "sign", size=11)
    d.text(485, 252, "decides first", size=11)
    d.text(675, 252, "5 bits, decide ties", size=11)
    d.text(320, 290, "One integer maximum finds the value and its position.", "start", 12)
    return d


def drawings() -> dict[str, str]:
    """The text of each SVG file of ``docs/tutorial``, by file name."""
    return {f"{draw.__name__}.svg": draw().svg() for draw in (tile, passes, images, split, pool)}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in drawings().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
