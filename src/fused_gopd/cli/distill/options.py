"""The options of a run, checked before any model is loaded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ... import installing
from ...integrations.following import Following
from ...integrations.hub import ADAPTER, STUDENT, adapter_path, is_folder
from ...options import PARAMETERS
from ..durable import Damaged, read_sealed, write_sealed
from ..parameters import (
    check_loss_options,
    flag,
    help_of,
    json_object,
    naming,
    panel,
    require_finite,
    require_one_of,
    require_packages,
    wrong,
)
from . import inputs
from .readings import Reading, readings_of

FILE = "distill.json"


# ------------------------------------------------------------------------------------------------- marks of an option

# may differ when a run is resumed
MAY_CHANGE = object()
# a file or folder, or the name of something that is none: made absolute where it exists
PLACE = object()
# a JSON object, as text
JSON = object()


RUN, TRAINING, LOSS = panel("The run"), panel("Training"), panel("The loss")
MODELS, SERVER, PROMPTS = panel("Models"), panel("A teacher behind a server"), panel("Prompts")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options that define a run, each in one place: its type, flag, help, marks and default.

    The command's parameters (:func:`fused_gopd.cli.parameters.with_options`), the keys of ``--config`` and the entries
    of ``distill.json`` and ``run.yaml`` are these fields. A run that was started by a version without an option is
    resumed with its default.
    """

    student: Annotated[str, MODELS(help="The model to train: a folder, a hub name, or smollm2."), PLACE] = ""
    teacher: Annotated[
        list[str],
        MODELS(
            help="Likewise, or adapter:PATH, or `student`, the student itself; several as ROUTE=MODEL, by the prompts' "
            "--route-column."
        ),
    ] = field(default_factory=list)
    teacher_ema: Annotated[
        float | None,
        MODELS(metavar="DECAY", help="With --teacher student: it is a moving average of the student, such as 0.99."),
    ] = None
    teacher_sync_steps: Annotated[
        int | None,
        MODELS(
            min=1,
            metavar="STEPS",
            help="With --teacher student: steps between its updates; 1 is the current student. Default: as it began.",
        ),
    ] = None
    cross_tokenizer: Annotated[
        bool,
        MODELS(
            "--cross-tokenizer",
            help="Teacher and reference may have tokenizers of their own: texts are compared in place of ids.",
        ),
    ] = False
    ref: Annotated[
        str, MODELS(help="The reference: a model, or `student` as it is before training. Needed unless λ is 1."), PLACE
    ] = ""
    teacher_cache: Annotated[
        str,
        MODELS(
            metavar="FOLDER", help="Keeps what teachers and reference computed, for runs that sample the same answers."
        ),
        MAY_CHANGE,
    ] = ""
    teacher_cache_gib: Annotated[
        float | None, MODELS(min=0.0, metavar="GIB", help="The size that it may have. Default: any."), MAY_CHANGE
    ] = None
    teacher_server: Annotated[str, SERVER(metavar="URL", help="A teacher behind an inference server."), MAY_CHANGE] = ""
    teacher_server_model: Annotated[str, SERVER(help="The name under which it serves the teacher.")] = ""
    teacher_server_revision: Annotated[
        str, SERVER(metavar="TEXT", help="What tells weights of one name there apart, such as a commit.")
    ] = ""
    teacher_server_api: Annotated[str, SERVER(help="vllm, sglang or openai.")] = "vllm"
    teacher_server_head: Annotated[
        str,
        SERVER(metavar="FOLDER", help="The teacher's folder: its head is read, and the server sends hidden states."),
        PLACE,
    ] = ""
    teacher_server_states: Annotated[
        str,
        SERVER(metavar="FOLDER", help="Where vLLM writes hidden states, as this machine sees it."),
        PLACE,
        MAY_CHANGE,
    ] = ""
    teacher_server_timeout: Annotated[
        float, SERVER(min=0.0, metavar="SECONDS", help="Seconds to wait for its answer."), MAY_CHANGE
    ] = 120.0
    teacher_server_patience: Annotated[
        float,
        SERVER(
            min=0.0,
            metavar="SECONDS",
            help="Seconds to wait for it when it has answered and no longer does: a restart.",
        ),
        MAY_CHANGE,
    ] = 600.0
    teacher_tokenizer: Annotated[
        str,
        SERVER(help="With --cross-tokenizer: a folder or hub name that has the server's tokenizer."),
        PLACE,
    ] = ""
    prompts: Annotated[str, PROMPTS(metavar="FILE", help="A .jsonl or .parquet file, one prompt a row."), PLACE] = ""
    prompt_column: Annotated[
        str, PROMPTS(help="Its column of texts or lists of messages. Default: prompt, or messages.")
    ] = ""
    completion_column: Annotated[
        str,
        PROMPTS(
            help="With --lmbda: its column of answers. Default: completion, or the assistant's message at the end."
        ),
    ] = ""
    route_column: Annotated[str, PROMPTS(help="Its column that names each prompt's teacher.")] = ""
    teacher_prompt_column: Annotated[
        str, PROMPTS(help="Its column of prompts that teachers read, in place of the student's.")
    ] = ""
    teacher_system: Annotated[
        str, PROMPTS(metavar="TEXT", help="A system message that teachers alone read, in place of the prompt's own.")
    ] = ""
    teacher_template: Annotated[
        str,
        PROMPTS(
            metavar="TEXT",
            help="What teachers read in place of the prompt's last text: {prompt} is that, {NAME} a column.",
        ),
    ] = ""
    ref_prompt_column: Annotated[str, PROMPTS(help="Its column of prompts that the reference reads.")] = ""
    chat: Annotated[bool, PROMPTS(help="Take texts for a user's messages, where the student has a chat template.")] = (
        True
    )
    chat_template_kwargs: Annotated[
        str,
        PROMPTS(metavar="JSON", help="Variables of the chat templates, such as '{\"enable_thinking\": false}'."),
        JSON,
    ] = ""
    eval_prompts: Annotated[
        str, PROMPTS(metavar="FILE", help="Held-out prompts: reward and exact KLs at the start and at the end."), PLACE
    ] = ""
    eval_every: Annotated[
        int | None, PROMPTS(min=1, metavar="STEPS", help="Evaluate also every so many steps."), MAY_CHANGE
    ] = None
    reward_scale: Annotated[float, LOSS(help="λ: 1 follows the teacher, above 1 extrapolates beyond it.")] = 1.0
    estimator: Annotated[
        str, LOSS(help=f"{help_of('estimator')} Default: full; sampled with --teacher-server alone.")
    ] = ""
    divergence: Annotated[str, LOSS(help=help_of("divergence"))] = "reverse_kl"
    k: Annotated[int | None, LOSS("--k", min=1, help=help_of("k"))] = None
    support: Annotated[str | None, LOSS(help=help_of("support"))] = None
    tail: Annotated[str | None, LOSS(help=help_of("tail"))] = None
    beta: Annotated[float | None, LOSS(help=help_of("beta"))] = None
    alpha: Annotated[float | None, LOSS(help=help_of("alpha"))] = None
    skew: Annotated[float | None, LOSS(help=help_of("skew"))] = None
    forward_weight: Annotated[float | None, LOSS(help=help_of("forward_weight"))] = None
    lmbda: Annotated[
        float,
        LOSS(min=0.0, max=1.0, help="Share of steps whose answers the student samples; the others have the file's."),
    ] = 1.0
    sft_weight: Annotated[
        float, LOSS(min=0.0, help="Weight of -log p of the file's answers, beside the loss; with --lmbda below 1.")
    ] = 0.0
    lora: Annotated[int, TRAINING(min=0, help="Rank of a LoRA adapter; 0 trains all weights.")] = 0
    lora_alpha: Annotated[float | None, TRAINING(min=0.0, help="Its alpha. Default: twice the rank.")] = None
    steps: Annotated[int, TRAINING(min=1, help="Optimizer steps."), MAY_CHANGE] = 100
    batch_size: Annotated[int, TRAINING(min=1, help="Answers in memory at once.")] = 8
    accumulation: Annotated[int, TRAINING(min=1, help="Batches to one step.")] = 1
    learning_rate: Annotated[float | None, TRAINING(min=0.0, help="Constant. Default: 1e-5; 1e-4 with --lora.")] = None
    max_new_tokens: Annotated[int, TRAINING(min=1, help="Longest answer.")] = 256
    temperature: Annotated[float, TRAINING(min=0.0, help="Of the answers and of the loss.")] = 1.0
    dtype: Annotated[str, TRAINING(help="float32 or bfloat16. Default: bfloat16 on a GPU, float32 on a CPU.")] = ""
    seed: Annotated[int, TRAINING(min=0, help="Of all random numbers.")] = 0
    save: Annotated[str, RUN(help="With --lora: merged (a plain model) or adapter (the adapter alone).")] = "merged"
    save_every: Annotated[int, RUN(min=1, metavar="STEPS", help="Steps between two checkpoints."), MAY_CHANGE] = 50

    @staticmethod
    def names(mark: object = None) -> list[str]:
        """The names of all options, or of those with a mark."""
        types = get_type_hints(RunOptions, include_extras=True)
        marked = {name: getattr(types[name], "__metadata__", ()) for name in (f.name for f in fields(RunOptions))}
        return [name for name, marks in marked.items() if mark is None or mark in marks]

    @staticmethod
    def from_command(given: dict[str, Any]) -> RunOptions:
        """From the command's parameters: paths made absolute, defaults that depend on other options filled in."""
        values = {**given, "teacher": given.get("teacher") or []}
        for name in RunOptions.names(PLACE):
            if (name, values[name]) != ("ref", STUDENT):
                values[name] = _absolute(values[name])
        if values["teacher_cache"]:
            values["teacher_cache"] = str(Path(values["teacher_cache"]).expanduser().resolve())
        for name in RunOptions.names(JSON):
            found = json_object(name, values[name])
            values[name] = json.dumps(found) if found else ""  # the shortest form
        routes = [_route(entry) for entry in values["teacher"]]
        values["teacher"] = [model if route is None else f"{route}={model}" for route, model in routes]
        only_scores = values["teacher_server"] and not values["teacher_server_head"]
        values["estimator"] = values["estimator"] or ("sampled" if only_scores else "full")
        if values["learning_rate"] is None:
            values["learning_rate"] = 1e-4 if values["lora"] else 1e-5
        if values["lora"] and values["lora_alpha"] is None:
            values["lora_alpha"] = 2.0 * values["lora"]
        return RunOptions(**values)

    def loss_options(self) -> dict[str, Any]:
        """Those that are options of the loss, as far as they are given."""
        names = ("estimator", "divergence", "k", "support", "tail", *PARAMETERS)
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def cache_options(self) -> dict[str, Any]:
        """Those of the cache as :class:`GOPDConfig` has them; the size in bytes."""
        gib = self.teacher_cache_gib
        return {
            "teacher_cache": self.teacher_cache or None,
            "teacher_cache_max_bytes": None if gib is None else int(gib * 2**30),
        }

    @property
    def uses_ref(self) -> bool:
        """Whether the reference is loaded. λ = 1 cancels it in the loss; evaluations have it nevertheless."""
        return bool(self.ref) and (self.reward_scale != 1 or bool(self.eval_prompts))

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables of the chat templates."""
        return json_object("chat_template_kwargs", self.chat_template_kwargs)

    def routes(self) -> dict[str | None, str]:
        """The local teachers by route; a single teacher has the route None. Empty for a teacher behind a server."""
        return dict(_route(entry) for entry in self.teacher)

    def roles(self) -> dict[str, str]:
        """Folders and hub names of the models that this process loads, by their role in the run."""
        found = {"the student": self.student}
        for route, model in self.routes().items():
            if model == STUDENT:
                continue
            found["the teacher" if route is None else f"the teacher of {route}"] = model
        if self.server_tokenizer():
            found["the teacher's tokenizer"] = self.server_tokenizer()
        if self.ref not in ("", STUDENT) and self.uses_ref:
            found["the reference"] = self.ref
        return found

    def server_tokenizer(self) -> str:
        """With ``cross_tokenizer`` the folder or hub name that has the tokenizer of the server's teacher."""
        return (self.teacher_tokenizer or self.teacher_server_head) if self.cross_tokenizer else ""

    def readings(self) -> dict[str, Reading]:
        """By role, ``"teacher"`` or ``"ref"``, the prompts that are not the student's, of models that are run."""
        return {role: reading for role, reading in readings_of(self).items() if role != "ref" or self.uses_ref}

    @property
    def following(self) -> Following:
        return Following(self.teacher_ema, self.teacher_sync_steps)

    @property
    def teacher_moves(self) -> str | None:
        """The options by which a teacher "student" follows the student; None: it does not."""
        return " ".join(f"{flag(name)} {value}" for name, value in self.following.given.items()) or None

    def models(self) -> list[str]:
        """Folders and hub names of the models and adapters that this process loads."""
        return [adapter_path(name) or name for name in self.roles().values()]

    def reads(self) -> dict[str, Path]:
        """Files and folders that the run reads, by the names that messages use."""
        places = {role: Path(place).expanduser() for role, place in with_bases(self.roles()).items()}
        folders = {role: folder for role, folder in places.items() if folder.is_dir()}
        if Path(self.teacher_server_head or "-").is_dir():
            folders["the folder of the teacher's head"] = Path(self.teacher_server_head)
        return {**self.files(), **folders}

    def files(self) -> dict[str, Path]:
        """The files of prompts, by the names that messages use."""
        held_out = {inputs.HELD_OUT: Path(self.eval_prompts)} if self.eval_prompts else {}
        return {inputs.PROMPTS: Path(self.prompts), **held_out}


def with_bases(places: Mapping[str, str]) -> dict[str, str]:
    """The models, and for each PEFT adapter among them also its base model, if that is not the student's."""
    found = {role: adapter_path(place) or place for role, place in places.items()}
    for role, place in places.items():
        if adapter_path(place) is not None:
            continue
        try:
            text = (Path(place).expanduser() / "adapter_config.json").read_text(encoding="utf-8")
            found[f"the base of {role}"] = str(json.loads(text)["base_model_name_or_path"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _absolute(name: str) -> str:
    adapter = adapter_path(name)
    if adapter is not None:
        return ADAPTER + _absolute(adapter)
    return str(Path(name).expanduser().resolve()) if name and Path(name).expanduser().exists() else name


def _route(entry: str) -> tuple[str | None, str]:
    """(route, model) of MODEL or ROUTE=MODEL; an existing folder with an = in its name is a MODEL."""
    route, sign, model = entry.partition("=")
    if not sign or Path(entry).expanduser().exists():
        return None, entry if entry == STUDENT else _absolute(entry)  # a folder of that name is ./student
    return route, model if model == STUDENT else _absolute(model)


def for_new_run(output: Path, given: dict[str, Any]) -> RunOptions:
    """The options of a new run."""
    if (output / FILE).exists():
        raise typer.BadParameter(
            f"{output} holds a run already: go on with it by --resume, or choose another folder", param_hint="--output"
        )
    for name in ("student", "prompts"):
        if not given[name]:
            raise typer.BadParameter("must be given", param_hint=f"--{name}")
    options = RunOptions.from_command(given)
    check(options)
    return options


def for_resumed_run(
    output: Path, given: dict[str, Any], from_command_line: Iterable[str], processes: int = 1
) -> RunOptions:
    """The saved options of the run in a folder; those that the command line repeats must be equal.

    Args:
        output: the folder.
        given: the values of all parameters.
        from_command_line: the names of the parameters that the user gave.
        processes: their number.
    """
    from_command_line = list(from_command_line)
    read, began_with = _read(output)
    if began_with != processes:
        raise typer.BadParameter(
            f"the run in {output} was started with {began_with} processes, got {processes}: the answers depend on "
            f"their number. Go on with it by: {resume_command(output, began_with)}",
            param_hint="--resume",
        )
    saved = asdict(read)
    repeated = asdict(RunOptions.from_command({**saved, **{name: given[name] for name in from_command_line}}))
    may_change = RunOptions.names(MAY_CHANGE)
    for name in from_command_line:
        if name in may_change:
            saved[name] = repeated[name]
        elif repeated[name] != saved[name]:
            raise typer.BadParameter(
                f"the run in {output} was started with {saved[name]!r}, got {repeated[name]!r}: leave it out, or start "
                "another run",
                param_hint=flag(name),
            )
    if not saved["teacher_cache"] and "teacher_cache_gib" not in from_command_line:
        saved["teacher_cache_gib"] = None  # goes with the cache
    options = RunOptions(**saved)
    check(options)
    return options


def resume_command(output: Path, processes: int) -> str:
    """The command that goes on with a run."""
    launcher = ["torchrun", "--nproc_per_node", str(processes), "-m", "fused_gopd.cli"]
    program = ["fused-gopd"] if processes == 1 else launcher
    return shlex.join([*program, "distill", "--resume", "--output", str(output)])


def _read(output: Path) -> tuple[RunOptions, int]:
    """The saved options, and the number of processes."""
    copies = sorted(output.glob(f"checkpoint-*/{FILE}"), key=lambda path: path.stat().st_mtime)
    try:
        values = read_sealed(output / FILE)
        processes = int(values.pop("processes", 1))
        return RunOptions(**values), processes
    except Damaged as error:
        if copies:
            command = ["cp", str(copies[-1]), str(output / FILE)]
            advice = f"{error}: restore it by: {shlex.join(command)}"
        elif (output / FILE).exists():
            advice = f"{error}: put a copy of it back, or begin another run in another folder"
        else:
            advice = f"{output} holds no run to go on with ({error}): start one without --resume"
        raise typer.BadParameter(advice, param_hint="--output") from None
    except TypeError as error:
        raise typer.BadParameter(
            f"{output / FILE} is of another version of this package: {error}", param_hint="--output"
        ) from None


def write(output: Path, options: RunOptions, processes: int = 1) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_sealed(output / FILE, {**asdict(options), "processes": processes})


# -------------------------------------------------------------------------------------------------------------- checks


def check(options: RunOptions) -> None:
    """Raise for options that contradict each other, missing files and packages that are not installed."""
    check_loss_options(**options.loss_options())
    require_one_of("save", options.save, ("merged", "adapter"))
    if options.dtype:
        require_one_of("dtype", options.dtype, ("float32", "bfloat16"))
    require_finite("reward_scale", options.reward_scale)
    if options.temperature == 0:
        raise wrong("--temperature", "must be positive: the student's own answers are sampled")
    if options.save == "adapter" and not options.lora:
        raise wrong("--save", "adapter needs --lora: without it all weights are trained")
    _check_teachers(options)
    _check_student_as_teacher(options)
    _check_cache(options)
    if options.reward_scale != 1 and not options.ref:
        raise wrong(
            "--ref",
            f"must be given for --reward-scale {options.reward_scale:g}: only 1 does without a reference. Usually it "
            "is the student before training: --ref student",
        )
    if options.completion_column and options.lmbda == 1:
        raise wrong("--completion-column", "is an option of --lmbda below 1: the student samples all answers")
    if options.ref_prompt_column and not options.ref:
        raise wrong("--ref-prompt-column", "is what the reference reads: it needs --ref")
    for reading in options.readings().values():
        reading.check()
    if options.eval_every is not None and not options.eval_prompts:
        raise wrong("--eval-every", "is an option of --eval-prompts")
    for name in ("prompts", "eval_prompts"):
        file = getattr(options, name)
        if (file or name == "prompts") and not Path(file).is_file():
            raise wrong(flag(name), f"there is no file {file}")
    for option, name in (("--student", options.student), ("--ref", options.ref)):
        _check_model(option, name, options.lora)
    _check_packages(options)


def _check_teachers(options: RunOptions) -> None:
    if bool(options.teacher) == bool(options.teacher_server):
        raise wrong("--teacher", "give either --teacher (or several) or --teacher-server")
    if options.cross_tokenizer and options.support == "student":
        raise wrong("--support", "student names the student's tokens, and the teacher has others (--cross-tokenizer)")
    if options.teacher_server:
        _check_server(options)
        return
    routes = options.routes()
    if len(routes) < len(options.teacher):
        raise wrong("--teacher", f"has a route twice, or several teachers without one: {', '.join(options.teacher)}")
    if None in routes and len(routes) > 1:
        raise wrong("--teacher", "several teachers need a route each: --teacher ROUTE=MODEL")
    if (None in routes) == bool(options.route_column):
        raise wrong(
            "--route-column",
            "needs teachers with routes: --teacher ROUTE=MODEL"
            if options.route_column
            else f"must be given: which column of the prompts says {' or '.join(map(repr, routes))}?",
        )
    for model in routes.values():
        _check_model("--teacher", model, options.lora)


def _check_student_as_teacher(options: RunOptions) -> None:
    moves, own = options.teacher_moves, STUDENT in options.routes().values()
    if moves and not own:
        raise wrong(moves.split()[0], "is an option of --teacher student, the student itself")
    if (fault := options.following.fault_of_ema) is not None:
        raise wrong("--teacher-ema", f"{fault} (--teacher-sync-steps 1 alone)")
    if moves and options.teacher_cache:
        raise wrong(
            "--teacher-cache", f"has no use for a teacher that changes ({moves}): what it scores it never scores again"
        )
    teaches = "teacher" in options.readings() or options.following.teaches(other_terms=bool(options.sft_weight))
    if own and options.reward_scale == 1 and not teaches:
        raise wrong(
            "--teacher",
            "student reads the prompt that the student reads, so that at --reward-scale 1 both say the same and every "
            "gradient is 0: give it another prompt (--teacher-template, --teacher-system, --teacher-prompt-column)",
        )


def _check_server(options: RunOptions) -> None:
    require_one_of("teacher_server_api", options.teacher_server_api, ("vllm", "sglang", "openai"))
    if not options.teacher_server_model:
        raise wrong("--teacher-server-model", "must be given: the name under which the server has the teacher")
    _check_head(options)
    if options.estimator == "full" and not options.teacher_server_head:
        raise wrong(
            "--estimator",
            "full needs the teacher's whole vocabulary: a server gives sampled or topk, or with --teacher-server-head "
            "hidden states",
        )
    if options.route_column:
        raise wrong("--route-column", "needs several teachers, and --teacher-server is one")
    if options.cross_tokenizer and not options.server_tokenizer():
        raise wrong(
            "--teacher-tokenizer",
            "must be given with --cross-tokenizer: the folder or hub name of the model behind the server, for its "
            "tokenizer (--teacher-server-head has it)",
        )
    if options.teacher_tokenizer and not options.cross_tokenizer:
        raise wrong("--teacher-tokenizer", "is an option of --cross-tokenizer")
    _check_model("--teacher-tokenizer", options.teacher_tokenizer, options.lora)


def _check_head(options: RunOptions) -> None:
    """Check the options of a server that sends hidden states."""
    head, states = options.teacher_server_head, options.teacher_server_states
    _check_model("--teacher-server-head", head, lora=0)
    if states and not head:
        raise wrong("--teacher-server-states", "needs --teacher-server-head, the teacher's folder")
    if not head:
        return
    require_one_of("teacher_server_api", options.teacher_server_api, ("vllm", "sglang"))
    if bool(states) != (options.teacher_server_api == "vllm"):
        what = "must be given: the folder into which vLLM writes hidden states" if not states else "is vLLM's"
        raise wrong("--teacher-server-states", what)


def _check_cache(options: RunOptions) -> None:
    if options.teacher_cache_gib is not None:
        if not options.teacher_cache:
            raise wrong("--teacher-cache-gib", "is an option of --teacher-cache")
        require_finite("teacher_cache_gib", options.teacher_cache_gib)
        if options.teacher_cache_gib == 0:
            raise wrong("--teacher-cache-gib", "must be positive")
    if options.teacher_cache and options.teacher_server and options.support == "student":
        raise wrong("--teacher-cache", "has no use with --support student, whose tokens are others at every step")


def _check_model(option: str, name: str, lora: int) -> None:
    adapter = adapter_path(name)
    if adapter is not None:
        if option == "--student":
            raise wrong(option, f"must be a model, got {name}: an adapter is on the student's base")
        if not lora:
            what = f"{name} is an adapter on the student's base, which training all weights changes: give --lora"
            raise wrong(option, what)
        name = adapter
    if name not in ("", STUDENT, "smollm2"):
        with naming(option):
            is_folder(option, name)


def _check_packages(options: RunOptions) -> None:
    needed = ["transformers", "trl", "datasets", "accelerate", "tensorboard", "jinja2", "matplotlib"]
    needed += ["peft"] if options.lora else []
    needed += ["httpx"] if options.teacher_server else []
    require_packages("distill", needed, installing.extra("train"))
