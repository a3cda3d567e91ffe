"""``fused-gopd distill``: train a student on its own answers, towards one or several teachers, with one command.

:class:`fused_gopd.integrations.trl.GOPDTrainer` does the training. This package adds options that are checked before a
model is loaded, prompts from a file, runs that can be interrupted and resumed, and their metrics.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from ...integrations.addresses import split_userinfo
from .. import outputs
from ..parameters import help_of
from ..threads import use_patient_threads
from .checkpoints import relist
from .options import RunOptions, for_new_run, for_resumed_run

__all__ = ["distill"]


# The panels of --help: each is a table of its own, so an option's long name narrows the texts of its own panel only.
_RUN, _MODELS, _SERVER, _PROMPTS = "The run", "Models", "A teacher behind a server", "Prompts"
_LOSS, _TRAINING = "The loss", "Training"


def distill(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder of the run, new or empty.", rich_help_panel=_RUN)
    ],
    student: Annotated[
        str, typer.Option(help="The model to train: a folder, a hub name, or smollm2.", rich_help_panel=_MODELS)
    ] = "",
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="Likewise, or adapter:PATH; several as ROUTE=MODEL, by the prompts' --route-column.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    teacher_server: Annotated[
        str, typer.Option(metavar="URL", help="A teacher behind an inference server.", rich_help_panel=_SERVER)
    ] = "",
    teacher_server_model: Annotated[
        str, typer.Option(help="The name under which it serves the teacher.", rich_help_panel=_SERVER)
    ] = "",
    teacher_server_api: Annotated[str, typer.Option(help="vllm, sglang or openai.", rich_help_panel=_SERVER)] = "vllm",
    teacher_server_head: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="The teacher's folder: its head is read, and the server sends hidden states.",
            rich_help_panel=_SERVER,
        ),
    ] = "",
    teacher_server_states: Annotated[
        str,
        typer.Option(
            metavar="FOLDER", help="Where vLLM writes hidden states, as this machine sees it.", rich_help_panel=_SERVER
        ),
    ] = "",
    teacher_server_timeout: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="Seconds to wait for its answer.", rich_help_panel=_SERVER)
    ] = 120.0,
    teacher_server_patience: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SECONDS",
            help="Seconds to wait for it when it has answered and no longer does: a restart.",
            rich_help_panel=_SERVER,
        ),
    ] = 600.0,
    teacher_server_key: Annotated[
        str,
        typer.Option(
            envvar="TEACHER_API_KEY", help="Its key; never written to the run's folder.", rich_help_panel=_SERVER
        ),
    ] = "",
    teacher_tokenizer: Annotated[
        str,
        typer.Option(
            help="With --cross-tokenizer: a folder or hub name that has the server's tokenizer.",
            rich_help_panel=_SERVER,
        ),
    ] = "",
    cross_tokenizer: Annotated[
        bool,
        typer.Option(
            "--cross-tokenizer",
            help="Teacher and reference may have tokenizers of their own: texts are compared in place of ids.",
            rich_help_panel=_MODELS,
        ),
    ] = False,
    ref: Annotated[
        str,
        typer.Option(
            help="The reference: a model, or `student` as it is before training. Needed unless λ is 1.",
            rich_help_panel=_MODELS,
        ),
    ] = "",
    teacher_cache: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="Keeps what teachers and reference computed, for runs that sample the same answers.",
            rich_help_panel=_MODELS,
        ),
    ] = "",
    teacher_cache_gib: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="GIB", help="The size that it may have. Default: any.", rich_help_panel=_MODELS),
    ] = None,
    prompts: Annotated[
        str, typer.Option(metavar="FILE", help="A .jsonl or .parquet file, one prompt a row.", rich_help_panel=_PROMPTS)
    ] = "",
    prompt_column: Annotated[
        str,
        typer.Option(
            help="Its column of texts or lists of messages. Default: prompt, or messages.", rich_help_panel=_PROMPTS
        ),
    ] = "",
    route_column: Annotated[
        str, typer.Option(help="Its column that names each prompt's teacher.", rich_help_panel=_PROMPTS)
    ] = "",
    chat: Annotated[
        bool,
        typer.Option(
            help="Take texts for a user's messages, where the student has a chat template.", rich_help_panel=_PROMPTS
        ),
    ] = True,
    reward_scale: Annotated[
        float, typer.Option(help="λ: 1 follows the teacher, above 1 extrapolates beyond it.", rich_help_panel=_LOSS)
    ] = 1.0,
    estimator: Annotated[
        str,
        typer.Option(
            help=f"{help_of('estimator')} Default: full; sampled with --teacher-server alone.", rich_help_panel=_LOSS
        ),
    ] = "",
    divergence: Annotated[str, typer.Option(help=help_of("divergence"), rich_help_panel=_LOSS)] = "reverse_kl",
    k: Annotated[int | None, typer.Option("--k", min=1, help=help_of("k"), rich_help_panel=_LOSS)] = None,
    support: Annotated[str | None, typer.Option(help=help_of("support"), rich_help_panel=_LOSS)] = None,
    tail: Annotated[str | None, typer.Option(help=help_of("tail"), rich_help_panel=_LOSS)] = None,
    beta: Annotated[float | None, typer.Option(help=help_of("beta"), rich_help_panel=_LOSS)] = None,
    alpha: Annotated[float | None, typer.Option(help=help_of("alpha"), rich_help_panel=_LOSS)] = None,
    skew: Annotated[float | None, typer.Option(help=help_of("skew"), rich_help_panel=_LOSS)] = None,
    forward_weight: Annotated[float | None, typer.Option(help=help_of("forward_weight"), rich_help_panel=_LOSS)] = None,
    lora: Annotated[
        int, typer.Option(min=0, help="Rank of a LoRA adapter; 0 trains all weights.", rich_help_panel=_TRAINING)
    ] = 0,
    lora_alpha: Annotated[
        float | None, typer.Option(min=0.0, help="Its alpha. Default: twice the rank.", rich_help_panel=_TRAINING)
    ] = None,
    save: Annotated[
        str,
        typer.Option(help="With --lora: merged (a plain model) or adapter (the adapter alone).", rich_help_panel=_RUN),
    ] = "merged",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.", rich_help_panel=_TRAINING)] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers in memory at once.", rich_help_panel=_TRAINING)] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches to one step.", rich_help_panel=_TRAINING)] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0.0, help="Constant. Default: 1e-5; 1e-4 with --lora.", rich_help_panel=_TRAINING),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=_TRAINING)] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of the answers and of the loss.", rich_help_panel=_TRAINING)
    ] = 1.0,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32 or bfloat16. Default: bfloat16 on a GPU, float32 on a CPU.", rich_help_panel=_TRAINING
        ),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.", rich_help_panel=_TRAINING)] = 0,
    save_every: Annotated[
        int, typer.Option(min=1, metavar="STEPS", help="Steps between two checkpoints.", rich_help_panel=_RUN)
    ] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output.", rich_help_panel=_RUN)
    ] = False,
    accept_changed_inputs: Annotated[
        bool,
        typer.Option(
            "--accept-changed-inputs", help="With --resume: prompts or models may have changed.", rich_help_panel=_RUN
        ),
    ] = False,
) -> None:
    """Distil teachers into a student on the student's own answers; λ > 1 extrapolates beyond them.

    A run is a folder: the trained model (`model`, for `from_pretrained`), `metrics.jsonl`, `metrics.png`,
    `tensorboard`, checkpoints, and the options. Ctrl-C ends the step, saves, and says how to go on; `--resume --output
    FOLDER` needs no other option, and ends with the weights that an uninterrupted run would have had.

    Needs the extra `train`, which `fused-gopd doctor` says how to install. Exit status 2: wrong options, known before a
    model is loaded; 130: stopped.
    """
    server_url = teacher_server
    if teacher_server:
        try:
            # without user name and password: this one is shown, and written to the folder
            teacher_server, _ = split_userinfo("URL", teacher_server)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--teacher-server") from None
    given = {name: value for name, value in locals().items() if name in RunOptions.names()}
    given["teacher"] = teacher or []
    if accept_changed_inputs and not resume:
        raise typer.BadParameter("is an option of --resume", param_hint="--accept-changed-inputs")
    if resume:
        options = for_resumed_run(output, given, {name for name in given if _was_given(context, name)})
    else:
        options = for_new_run(output, given)
    if not options.teacher_server:
        for name in ("api", "head", "states", "timeout", "patience", "key"):
            if _was_given(context, f"teacher_server_{name}", environment=False):
                raise typer.BadParameter("is an option of --teacher-server", param_hint=f"--teacher-server-{name}")
    use_patient_threads()
    if all(name == "smollm2" or Path(name).exists() for name in options.models()):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models are local
    # each warns of the other's deprecated names
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    opened = outputs.opened(output, "distill", reads=options.reads(), reuse=resume, relist=relist if resume else None)
    with outputs.option("--output"), opened as folder:
        from .training import DistillationRun

        run = DistillationRun(options, folder, teacher_server_key or None, server_url or None)
        if not run.run(resume, accept_changed_inputs):
            raise typer.Exit(130)


def _was_given(context: typer.Context, name: str, environment: bool = True) -> bool:
    source: Any = context.get_parameter_source(name)
    defaults = ("DEFAULT", "DEFAULT_MAP") if environment else ("DEFAULT", "DEFAULT_MAP", "ENVIRONMENT")
    return source is not None and source.name not in defaults
