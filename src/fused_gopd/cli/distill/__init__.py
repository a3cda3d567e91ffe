"""``fused-gopd distill``: train a student on its own answers, towards one or several teachers, with one command.

:class:`fused_gopd.integrations.trl.GOPDTrainer` does the training. This package adds options that are checked before a
model is loaded, prompts from a file, runs that can be interrupted and resumed, and their metrics.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ...integrations.addresses import split_userinfo
from .. import outputs, quiet
from ..parameters import flag, with_options, wrong
from ..processes import Processes
from ..threads import use_patient_threads
from .checkpoints import relist
from .options import RUN, SERVER, RunOptions, for_new_run, for_resumed_run
from .runfile import use as use_config

__all__ = ["distill"]


@with_options(RunOptions)
def distill(
    context: typer.Context,
    output: Annotated[Path, RUN(file_okay=False, help="Folder of the run, new or empty.")],
    config: Annotated[
        Path | None,
        RUN(
            dir_okay=False,
            exists=True,
            is_eager=True,
            callback=use_config,
            metavar="FILE",
            help="Options in YAML, by the names of their flags; those of the command line win.",
        ),
    ] = None,
    resume: Annotated[bool, RUN("--resume", help="Go on with the run in --output.")] = False,
    accept_changed_inputs: Annotated[
        bool, RUN("--accept-changed-inputs", help="With --resume: prompts or models may have changed.")
    ] = False,
    dry_run: Annotated[
        bool,
        RUN("--dry-run", help="Load, check, plan the memory, time a step, and write nothing."),
    ] = False,
    *,
    teacher_server_key: Annotated[
        str, SERVER(envvar="TEACHER_API_KEY", help="Its key; never written to the run's folder.")
    ] = "",
    **given: Any,
) -> None:
    """Distil teachers into a student on the student's own answers; λ > 1 extrapolates beyond them.

    A run is a folder: the trained model (`model`, for `from_pretrained`), `metrics.jsonl`, `report.html`,
    `tensorboard`, checkpoints, and the options. Ctrl-C ends the step, saves, and says how to go on; `--resume --output
    FOLDER` needs no other option, and ends with the weights that an uninterrupted run would have had.

    On several GPUs: `accelerate launch --num_processes 4 -m fused_gopd.cli distill ...`, with --batch-size for each.

    Needs the extra `train`, which `fused-gopd doctor` says how to install. Exit status 2: wrong options, known before a
    model is loaded; 130: stopped.
    """
    use_patient_threads()
    processes = Processes()
    server_url = given["teacher_server"]
    with processes.agreeing():
        if dry_run and resume:
            raise typer.BadParameter("is for a new run: leave out --resume", param_hint="--dry-run")
        options = _checked(context, output, resume, accept_changed_inputs, given, processes.count)
    quiet.before_import(options.models())
    opened = outputs.opened(output, "distill", reads=options.reads(), reuse=resume, relist=relist if resume else None)
    with outputs.option("--output"), ExitStack() as stack:
        with processes.agreeing():
            first = stack.enter_context(opened) if processes.first else None
        folder = outputs.FollowedFolder(output, "distill") if first is None or dry_run else first
        from .training import DistillationRun

        run = DistillationRun(options, folder, processes, teacher_server_key or None, server_url or None)
        finished = run.dry_run() if dry_run else run.run(resume, accept_changed_inputs)
    processes.close()
    if not finished:
        raise typer.Exit(130)


def _checked(
    context: typer.Context, output: Path, resume: bool, accept_changed_inputs: bool, given: dict[str, Any], count: int
) -> RunOptions:
    """The options of the run, checked; ``count`` is the number of processes."""
    if given["teacher_server"]:
        try:
            # without user name and password: this one is shown, and written to the folder
            given["teacher_server"], _ = split_userinfo("URL", given["teacher_server"])
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--teacher-server") from None
    if accept_changed_inputs and not resume:
        raise typer.BadParameter("is an option of --resume", param_hint="--accept-changed-inputs")
    if resume:
        options = for_resumed_run(output, given, {name for name in given if _was_given(context, name)}, count)
    else:
        options = for_new_run(output, given)
    if not options.teacher_server:
        for name in (*given, "teacher_server_key"):
            belongs = name.startswith("teacher_server_") or name == "teacher_tokenizer"
            if belongs and _was_given(context, name, environment=False):
                raise wrong(flag(name), "is an option of --teacher-server")
    return options


def _was_given(context: typer.Context, name: str, environment: bool = True) -> bool:
    source: Any = context.get_parameter_source(name)
    # DEFAULT_MAP is --config
    defaults = ("DEFAULT",) if environment else ("DEFAULT", "ENVIRONMENT")
    return source is not None and source.name not in defaults
