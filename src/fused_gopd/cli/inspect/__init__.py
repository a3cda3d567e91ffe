"""``fused-gopd inspect``: a page with what up to three models think of each token of some answers, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from .. import quiet
from ..parameters import with_options
from ..threads import use_patient_threads
from .options import MODELS, InspectOptions

__all__ = ["inspect"]


@with_options(InspectOptions)
def inspect(
    output: Annotated[Path, MODELS(dir_okay=False, metavar="FILE", help="The page, such as page.html.")],
    overwrite: Annotated[bool, MODELS("--overwrite", help="Replace a page that exists.")] = False,
    **given: Any,
) -> None:
    """Show what student, teacher and reference think of each token, on one HTML page.

    `--prompts FILE`: the student answers, as `distill` would have it answer at its first step. `--texts FILE`: the
    answers are in the file. Each token is coloured by its advantage, reward, entropy or log-prob. Nothing is trained,
    and one model is in memory beside the student at a time.

    Needs the extra `train`, which `fused-gopd doctor` says how to install.
    """
    options = InspectOptions(**given)
    options.check()
    use_patient_threads()
    quiet.before_import(options.places())
    from .scoring import Inspection

    Inspection(options, output, overwrite).run()
