"""Pictures for files. SVG follows the reader's light or dark mode and has the same bytes each time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Colours of text and axes, of less important text, of the page and of grid lines, each with its colour in dark mode.
INK, MUTED, PAGE, FAINT = "#1f2328", "#59636e", "#ffffff", "#d1d9e0"
DARK = {INK: "#e6edf3", MUTED: "#9198a1", PAGE: "#0d1117", FAINT: "#3d444d"}
# Colours of data are seen on both pages, and told apart by colour-blind readers.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f81f7", "#db6d28", "#2da44e", "#a371f7", "#848d97"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fused-gopd",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAGE),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": FAINT,
}


@contextmanager
def picture(path: Path | io.StringIO, width: float, height: float) -> Iterator[Any]:
    """A Matplotlib figure of so many pixels (of a browser, 96 an inch), written to ``path`` at the end: SVG or PNG by
    the name's end, SVG where it is text in memory."""
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, PURPLE, GREY])}):
        figure = Figure(figsize=(width / 96, height / 96), layout="constrained")
        yield figure
        if isinstance(path, Path) and path.suffix.lower() != ".svg":
            figure.savefig(path, dpi=192)
            return
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    for light in DARK:
        text = text.replace(light, f"var(--c{light[1:]})")
    light_mode, dark_mode = (
        ":root { " + " ".join(f"--c{light[1:]}: {colour};" for light, colour in colours) + " }"
        for colours in (zip(DARK, DARK, strict=True), DARK.items())
    )
    style = f'<style type="text/css">\n{light_mode}\n@media (prefers-color-scheme: dark) {{ {dark_mode} }}\n'
    text = text.replace('<style type="text/css">', style, 1)
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    if isinstance(path, Path):
        path.write_text(text, encoding="utf-8")
    else:
        path.write(text)
