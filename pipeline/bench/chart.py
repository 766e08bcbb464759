"""Benchmarks as one SVG of bars that needs no other file: images/s of each arm, a panel for each cell."""

from collections.abc import Sequence

from markupsafe import Markup

from pipeline.bench.cells import ARMS
from pipeline.bench.figures import DECODE, LIMIT, OURS, Cell, rows_of

__all__ = ["chart"]

WIDTH, LEFT, RIGHT = 760, 250, 110
BAR, GAP, HEAD, FOOT = 16, 6, 34, 10
STYLE = Markup("""<style>
text { font: 13px system-ui, sans-serif; fill: #24292f; }
.head { font-weight: 600; } .soft { fill: #59636e; }
.track { fill: #f6f8fa; } .peer { fill: #8c959f; } .ours { fill: #0969da; } .limit { fill: #d0d7de; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .soft { fill: #9198a1; }
  .track { fill: #151b23; } .limit { fill: #3d444d; } .ours { fill: #4493f8; }
}
</style>""")


def chart(cells: Sequence[Cell]) -> str:
    """The drawing; bars of a panel share a scale, whose end is its fastest arm."""
    parts: list[Markup] = []
    top = 0.0
    for cell in cells:
        rows = [row for row in rows_of(cell) if row.images_per_s is not None]
        text = f"{cell.name}: {cell.model}, corpus {cell.corpus}"
        parts.append(Markup('<text class="head" x="8" y="{:.0f}">{}</text>').format(top + 22, text))
        fastest = max((row.images_per_s or 0.0 for row in rows), default=1.0) or 1.0
        top += HEAD
        for row in rows:
            rate = row.images_per_s or 0.0
            length = max(1.0, (WIDTH - LEFT - RIGHT) * rate / fastest)
            kind = "ours" if row.name == OURS else "limit" if row.name in (LIMIT, DECODE) else "peer"
            title = ARMS[row.name].title if row.name in ARMS else row.name
            of = "" if row.of_limit is None else f" ({row.of_limit:.2f})"
            parts += [
                Markup('<text x="{}" y="{:.0f}" text-anchor="end">{}</text>').format(LEFT - 10, top + 12, title),
                Markup('<rect class="track" x="{}" y="{:.1f}" width="{}" height="{}"/>').format(
                    LEFT, top, WIDTH - LEFT - RIGHT, BAR
                ),
                Markup('<rect class="{}" x="{}" y="{:.1f}" width="{:.1f}" height="{}"/>').format(
                    kind, LEFT, top, length, BAR
                ),
                Markup('<text class="soft" x="{:.1f}" y="{:.0f}">{}</text>').format(
                    WIDTH - RIGHT + 8, top + 12, f"{rate:.2f}{of}"
                ),
            ]
            top += BAR + GAP
        top += FOOT
    legend = Markup('<text class="soft" x="8" y="{:.0f}">images/s, and its share of the limit; longer is better</text>')
    parts.append(legend.format(top + 12))
    opening = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">')
    parts = [opening.format(WIDTH, top + 22, "images per second of each program"), STYLE, *parts, Markup("</svg>\n")]
    return Markup("").join(parts)
