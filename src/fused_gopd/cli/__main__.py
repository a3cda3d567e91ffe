"""``python -m fused_gopd.cli``, which launchers of several processes need: ``accelerate launch -m fused_gopd.cli``."""

from . import app

app(prog_name="fused-gopd")
