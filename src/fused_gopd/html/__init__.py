"""One self-contained HTML page about a run: curves, texts with each token coloured, settings, warnings.

No script and no address is in it, and its Content-Security-Policy allows neither: it opens offline, from a file.
"""

from __future__ import annotations

from .page import render_report, write_report
from .texts import ScoredText

__all__ = ["ScoredText", "render_report", "write_report"]
