"""One run: the inputs are checked, the models loaded, trained and saved; an interrupted run can be resumed."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ...integrations.hub import BASE, STUDENT, adapter_path
from ...integrations.trl import GOPDConfig, GOPDTrainer, check_tokenizers
from ...integrations.trl.phases import Phase
from ...integrations.trl.report import FILE as REPORT
from .. import durable, quiet
from ..outputs import OutputFolder
from ..parameters import naming
from ..processes import Processes
from . import card, checkpoints, dryrun, figures, inputs, models, prompts, runfile
from .dataset import columns_of, dataset_of, order_of
from .interrupt import Abandoned, Interrupt
from .options import FILE as OPTIONS_FILE
from .options import RunOptions, resume_command, with_bases, write


class MetricsCallback(TrainerCallback):
    """Records and shows the metrics that the trainer logs after each step."""

    def __init__(self, record: figures.Record, display: figures.Display) -> None:
        self._record, self._display = record, display

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:  # the summary after the last step has no loss
            self._display.step(self._record.add(state.global_step, logs))
        elif logs is not None and "eval_loss" in logs:
            self._display.evaluation(self._record.add(state.global_step, logs))


class EvaluationCallback(TrainerCallback):
    """Evaluates every so many steps, and after the last one."""

    def __init__(self, every: int | None) -> None:
        self._every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = self._every is not None and state.global_step % self._every == 0
        control.should_evaluate = due or state.global_step >= state.max_steps


class PhaseCallback(TrainerCallback):
    """Shows what the trainer does within a step."""

    def __init__(self, display: figures.Display) -> None:
        self._display = display

    def on_phase(self, args: Any, state: Any, control: Any, *, phase: Phase) -> None:
        self._display.phase(phase)


class CheckpointCallback(TrainerCallback):
    """Moves each checkpoint of the trainer to its final place, with a copy of the run's options."""

    def __init__(self, found: checkpoints.Checkpoints, saved: Path, processes: Processes) -> None:
        self._checkpoints, self._options, self._processes = found, saved, processes

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._processes.wait()  # each process writes its own random numbers
        if self._processes.first:
            shutil.copy(self._options, self._checkpoints.partial / f"checkpoint-{state.global_step}")
            self._checkpoints.add(state.global_step)
        self._processes.wait()


def _tensorboard(path: Path, done: int) -> Any:
    """The callback that writes TensorBoard's events; it hides those of steps after ``done``, which are repeated."""
    board: Any = importlib.import_module("torch.utils.tensorboard")
    integrations: Any = importlib.import_module("transformers.integrations")
    return integrations.TensorBoardCallback(board.SummaryWriter(str(path), purge_step=done + 1))


class DistillationRun:
    """A run with given options in a folder."""

    def __init__(
        self,
        options: RunOptions,
        folder: OutputFolder,
        processes: Processes,
        server_key: str | None = None,
        server_url: str | None = None,
    ) -> None:
        """``server_key`` and ``server_url``, which may have a user name and password, are neither written nor shown."""
        self.options, self.folder, self.output = options, folder, folder.path
        self._server_key, self._server_url = server_key, server_url
        self.processes = processes
        self.display = figures.Display(Console(quiet=not processes.first), options.steps)
        self.say = self.display.say
        self.checkpoints = checkpoints.Checkpoints(folder)
        self._server_tokenizer: Any = None  # of a teacher behind a server, where it may be another
        self._expected_errors: tuple[type[Exception], ...] = ()  # shown by their message, without a traceback
        self._frozen_dtype = models.dtype_of(options.dtype)  # of frozen weights, and of the matrix products

    @property
    def _result(self) -> Path:
        return self.output / ("adapter" if self.options.save == "adapter" else "model")

    @property
    def _answers(self) -> int:
        """The answers of a step."""
        return self.options.batch_size * self.options.accumulation * self.processes.count

    def _quiet(self) -> None:
        quiet.after_import()
        with self.processes.agreeing():
            # made once on each machine, before the others look for it
            if self.processes.first_of_machine and "smollm2" in self.options.models():
                models.local("smollm2")

    def dry_run(self) -> bool:
        """Check all that a run checks, load its models, and time steps in a temporary folder."""
        self._quiet()
        options = self.options
        with self.processes.agreeing():
            data = self._prompts(options.prompts)
            with self.display.loading("sizes and tokenizers of the models"):
                known, tokenizer = self._read_models()
            dataset = self._dataset(data, tokenizer, known)
            if options.eval_prompts:
                self._held_out(tokenizer, known)
            self._inputs = self._read_inputs(0, False, False)
            teacher = self._teacher(tokenizer, known[0].vocab)
        folder = self.processes.shared(tempfile.mkdtemp(prefix="fused-gopd-") if self.processes.first else "")
        try:
            no_cache = dict.fromkeys(options.cache_options)
            own = {"output_dir": folder, "max_steps": dryrun.STEPS, "save_strategy": "no", **no_cache}
            with self.processes.agreeing():
                config = self._config(evaluates=False, **own)
            self._print_summary(0, len(data.prompts))
            with self.display.loading(f"the student {options.student}"):
                trainer = self._trainer(config, dataset, None, tokenizer, teacher)
            with self.display.running(0):
                trainer.train()
            for line in dryrun.describe(trainer, options):
                self.say(line)
        finally:
            if self.processes.first:
                shutil.rmtree(folder, ignore_errors=True)
        self.say("nothing was written: without --dry-run the run begins")
        return True

    def run(self, resume: bool = False, accept_changed_inputs: bool = False) -> bool:
        """Train. Returns whether all steps are done."""
        self._quiet()
        options = self.options
        with self.processes.agreeing():
            self.folder.check("metrics.jsonl", REPORT, "tensorboard", self._result.name)
            self._check_result()
            self.checkpoints.find(self.say)
            done = self.checkpoints.done
            data = self._prompts(options.prompts)
            cache = self._cache()
            with self.display.loading("sizes and tokenizers of the models"):
                known, tokenizer = self._read_models()
            dataset = self._dataset(data, tokenizer, known)
            held_out = self._held_out(tokenizer, known) if options.eval_prompts else None
            self._inputs = self._read_inputs(done, resume, accept_changed_inputs)
            teacher = self._teacher(tokenizer, known[0].vocab)
            config = self._config(evaluates=held_out is not None and not done)
        self._print_summary(done, len(data.prompts))
        interrupt = Interrupt(self.say, self.processes)
        if options.teacher_server and cache is not None:
            teacher = cache.scorer(teacher, revision=options.teacher_server_revision or None)
        with interrupt.listening(), self.folder.scratch(self.checkpoints.partial.name):
            with self.display.loading(f"the student {options.student}"):
                trainer = self._trainer(config, dataset, held_out, tokenizer, teacher)
            trainer.add_callback(interrupt)
            if options.teacher_server:
                interrupt.guard(trainer)
            if held_out is not None:
                trainer.add_callback(EvaluationCallback(options.eval_every))
            # only once the models are loaded: before that there is nothing to resume
            record = self._begin(trainer, len(data.prompts)) if self.processes.first else None
            trainer.add_callback(CheckpointCallback(self.checkpoints, self.output / OPTIONS_FILE, self.processes))
            with self.display.running(done):
                self._train(trainer, interrupt)
        if (cache := trainer._cache) is not None:
            found, scored = (cache.stats()[name] for name in ("hits", "misses"))
            self.say(f"{cache.path}: {found} sequences were there, {scored} were not; {cache.nbytes / 2**20:,.1f} MiB")
        finished = bool(trainer.state.global_step >= options.steps)
        if record is not None:
            self._end(trainer, tokenizer, record, len(data.prompts), finished)
        return finished

    def _begin(self, trainer: Any, prompt_count: int) -> figures.Record:
        """Write what the run is, and have the trainer write its metrics."""
        durable.write_sealed(self.folder.extend(inputs.FILE), self._inputs)
        durable.replace(self.folder.create(runfile.FILE), runfile.text(self.options))
        self.folder.finish(runfile.FILE)
        self.folder.extend(OPTIONS_FILE)
        write(self.output, self.options, self.processes.count)
        record = figures.Record(self.folder.create("metrics.jsonl"), self.checkpoints.history())
        trainer.add_callback(MetricsCallback(record, self.display))
        trainer.add_callback(_tensorboard(self.folder.extend("tensorboard"), self.checkpoints.done))
        self._add_report(trainer, prompt_count)
        return record

    # ---------------------------------------------------------------------------------------------- before any model

    def _cache(self) -> Any:
        """The cache of a teacher's scores, or None."""
        options = self.options.cache_options
        if options["teacher_cache"] is None:
            return None
        cache = importlib.import_module("fused_gopd.integrations.cache")
        self._expected_errors = (cache.TeacherCacheError,)
        try:
            return cache.TeacherCache(options["teacher_cache"], max_bytes=options["teacher_cache_max_bytes"])
        except ValueError as error:
            raise typer.BadParameter(str(error).removeprefix("path "), param_hint="--teacher-cache") from None
        except OSError as error:
            raise typer.BadParameter(f"cannot be used: {error}", param_hint="--teacher-cache") from None

    def _route_names(self) -> list[str]:
        return [route for route in self.options.routes() if route is not None]

    def _frozen_models(self) -> list[tuple[str, str]]:
        """(flag, name) of the teachers and the reference that are loaded in this process."""
        options = self.options
        ref = [("--ref", options.ref)] if options.uses_ref else []
        found = [*(("--teacher", model) for model in options.routes().values()), *ref]
        return [(option, name) for option, name in found if name not in ("", STUDENT)]

    def _read_models(self) -> tuple[list[models.Model], Any]:
        """The models' sizes, the student's first, and the student's tokenizer; raises where models do not match."""
        options = self.options
        known = [models.read("--student", options.student, models.local(options.student))]
        for option, name in self._frozen_models():
            adapter = adapter_path(name)
            if adapter is None:
                known.append(models.read(option, name, models.local(name)))
            else:
                models.read_adapter(option, adapter, models.local(options.student))
        tokenizer = models.read_tokenizer("--student", options.student, models.local(options.student))
        for n, model in enumerate(known[1:], 1):
            if model.name != options.student:
                other = models.read_tokenizer(model.option, model.name, models.local(model.name))
                if self._is_other(model.option, model.name, tokenizer, other):
                    known[n] = replace(model, own_tokenizer=other)
        if name := options.server_tokenizer():
            option = "--teacher-tokenizer"
            other = models.read_tokenizer(option, name, models.local(name))
            self._server_tokenizer = other
            if self._is_other(option, name, tokenizer, other):
                known.append(models.Model(option, name, len(other), None, other))
        models.check_sizes([model for model in known if model.own_tokenizer is None], tokenizer, options.k)
        return known, tokenizer

    def _is_other(self, option: str, name: str, tokenizer: Any, other: Any) -> bool:
        """Whether a model's tokenizer is not the student's; raises unless such are meant."""
        with naming(option):
            return check_tokenizers(name, tokenizer, other, cross_tokenizer=self.options.cross_tokenizer) is not None

    def _read_inputs(self, done: int, resume: bool, accept_changes: bool) -> dict[str, Any]:
        """Fingerprints of the prompts and models; a resumed run compares them with those that it was started with."""
        local = {role: models.local(model) for role, model in self.options.roles().items()}
        now = inputs.fingerprints(self.options.files(), with_bases(local))
        return inputs.check(self.folder, now, done, accept_changes) if resume else {"inputs": now, "changes": []}

    def _prompts(self, file: str) -> prompts.Prompts:
        options = self.options
        return prompts.read(Path(file), options.prompt_column, options.route_column, self._route_names())

    def _held_out(self, tokenizer: Any, known: Sequence[models.Model]) -> Any:
        """The dataset of --eval-prompts, each prompt once."""
        try:
            data = self._prompts(self.options.eval_prompts)
            count = len(data.prompts)
            found = dataset_of(data, self.options, known, tokenizer, range(count), None)
        except typer.BadParameter as error:
            if error.param_hint == "--prompts":
                error.param_hint = "--eval-prompts"
            raise
        if over := -count % (self.options.batch_size * self.processes.count) if self.processes.count > 1 else 0:
            self.say(f"{count} evaluation prompts do not fill the batches of all processes: {over} count twice")
        return found

    def _dataset(self, data: prompts.Prompts, tokenizer: Any, known: Sequence[models.Model]) -> Any:
        """The prompt of each answer of the run."""
        order = order_of(len(data.prompts), self.options.steps * self._answers, self.options.seed)
        return dataset_of(data, self.options, known, tokenizer, order, self.say)

    def _teacher(self, tokenizer: Any, vocab_size: int) -> Any:
        """A model's path, a dict of paths by route, or the scorer of a server."""
        options = self.options
        if not options.teacher_server:
            routes = {route: models.local(model) for route, model in options.routes().items()}
            return routes.get(None, routes)
        server = importlib.import_module("fused_gopd.integrations.server")
        self._expected_errors += (server.TeacherServerError,)
        try:
            if options.teacher_server_head:
                kind = server.HiddenStateTeacher
                own: dict[str, Any] = {
                    "head": options.teacher_server_head,
                    "states_dir": options.teacher_server_states or None,
                }
            else:
                kind = server.ServerTeacher
                own = {
                    "top_k": None if options.support == "student" else options.k,
                    "vocab_size": None if self._server_tokenizer else vocab_size,
                }
            teacher = kind(  # no variable has the key or the address's password, which a traceback may show
                self._server_url or options.teacher_server,
                options.teacher_server_model,
                api=options.teacher_server_api,
                timeout=options.teacher_server_timeout,
                patience=options.teacher_server_patience,
                api_key=self._server_key,
                tokenizer=self._server_tokenizer or tokenizer,
                temperature=options.temperature,
                **own,
            )
            if options.support == "student":
                teacher.require_requested_ids(options.k)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:  # TeacherServerError is a RuntimeError
            raise typer.BadParameter(str(error), param_hint="--teacher-server") from None
        self.say(f"the teacher's server: {teacher.capabilities}")
        return teacher

    def _config(self, evaluates: bool, **own: Any) -> Any:
        """``evaluates``: before the first step. ``own`` replaces what the options give."""
        options, gpu = self.options, torch.cuda.is_available()
        loaded = any(adapter_path(model) is None and model != STUDENT for model in options.routes().values())
        try:
            given = dict(
                output_dir=str(self.checkpoints.partial),
                reward_scale=options.reward_scale,
                **options.loss_options(),
                **columns_of(options),
                cross_tokenizer=options.cross_tokenizer,
                teacher_ema=options.teacher_ema,
                teacher_sync_steps=options.teacher_sync_steps,
                chat_template_kwargs=options.template_variables,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=options.batch_size,
                eval_on_start=evaluates,
                gradient_accumulation_steps=options.accumulation,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",  # a decay would depend on the number of steps, which --resume may raise
                max_completion_length=options.max_new_tokens,
                lmbda=options.lmbda,
                sft_weight=options.sft_weight,
                temperature=options.temperature,
                seed=options.seed,
                bf16=self._frozen_dtype == "bfloat16",
                use_cpu=not gpu,
                gradient_checkpointing=gpu,
                ddp_find_unused_parameters=False,  # every parameter is used; on a CPU the search is the default
                # trained weights are float32, whatever the dtype of the products
                model_init_kwargs={"dtype": self._frozen_dtype if options.lora else "float32"},
                teacher_model_init_kwargs={"dtype": self._frozen_dtype} if loaded else None,
                **options.cache_options,
                shuffle_dataset=False,
                logging_steps=1,
                save_strategy="steps",
                save_steps=options.save_every,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=gpu,
            )
            config = GOPDConfig(**{**given, **own})
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(str(error)) from None
        if config.n_gpu > 1:
            self.say(
                f"{config.n_gpu} GPUs are here, and one process uses one of them. For all: accelerate launch "
                f"--num_processes {config.n_gpu} -m fused_gopd.cli distill ..."
            )
            config._n_gpu = 1  # else transformers has nn.DataParallel
        return config

    def _print_summary(self, done: int, count: int) -> None:
        options = self.options
        teachers = options.teacher_server or ", ".join(options.teacher)
        teachers += f" ({options.teacher_moves})" if options.teacher_moves else ""
        self.say(f"student {options.student}, teacher {teachers}, reference {options.ref or 'none'}")
        trained = f"LoRA of rank {options.lora}" if options.lora else "all weights"
        if done >= options.steps:
            self.say("no step is left: the result is written")
            return
        processes = f", {self.processes.count} processes" if self.processes.count > 1 else ""
        where = f"steps {done + 1} to {options.steps}" if done else f"{options.steps} steps"
        given = f"{1 - options.lmbda:.0%} of the steps with the file's answers, " if options.lmbda < 1 else ""
        self.say(
            f"{where} of {self._answers} answers to {count} prompts{processes}, {given}"
            f"λ = {options.reward_scale:g}, {options.estimator}, {trained} at {options.learning_rate:g}"
        )
        if options.ref and not options.uses_ref:
            self.say("the reference is not loaded: λ = 1 has no use for it")

    # --------------------------------------------------------------------------------------------------------- training

    def _trainer(self, config: Any, dataset: Any, held_out: Any, tokenizer: Any, teacher: Any) -> Any:
        options = self.options
        adapter = None
        if options.lora:
            adapter = importlib.import_module("peft").LoraConfig(
                r=options.lora, lora_alpha=options.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            )
        shows = self.processes.first and self.display.console.is_terminal
        trainer = GOPDTrainer(
            models.local(options.student),
            {route: self._own(model) for route, model in teacher.items()}
            if isinstance(teacher, dict)
            else self._own(teacher),
            config,
            train_dataset=dataset,
            eval_dataset=held_out,
            processing_class=tokenizer,
            ref_model=self._reference(),
            teacher_processing_class=self._server_tokenizer,
            peft_config=adapter,
            callbacks=[PhaseCallback(self.display)] if shows else [],
        )
        trainer.remove_callback(PrinterCallback)
        for text in trainer.warnings:  # those of the models, which the silenced log has not shown
            self.say(text)
        trainer.warn = self.say
        return trainer

    def _add_report(self, trainer: Any, prompt_count: int) -> None:
        options = self.options
        trainer.add_report(
            path=self.folder.create(REPORT),
            title=f"{Path(options.student).name}, λ = {options.reward_scale:g}, {options.estimator}",
            settings=lambda: card.report_settings(
                options, self._inputs, prompt_count, trainer.state.global_step, self._answers
            ),
        )

    def _reference(self) -> Any:
        """None, ``"base"`` (the student without its adapter), ``"adapter:PATH"``, or a model."""
        options = self.options
        if not options.uses_ref:
            return None
        if options.ref == STUDENT:
            return self._initial_student
        return options.ref if adapter_path(options.ref) is not None else self._load(options.ref)

    def _own(self, teacher: Any) -> Any:
        """The trainer's argument for a teacher: for a ``"student"`` that does not move, the student before training."""
        if not isinstance(teacher, str) or teacher != STUDENT or self.options.teacher_moves:
            return teacher
        return self._initial_student

    @cached_property
    def _initial_student(self) -> Any:
        """The student before training: ``"base"`` (a new adapter changes nothing), or a model, of the frozen dtype."""
        return BASE if self.options.lora else self._load(self.options.student)

    def _load(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(models.local(name), dtype=getattr(torch, self._frozen_dtype))

    def _train(self, trainer: Any, interrupt: Interrupt) -> None:
        done = self.checkpoints.done
        try:
            trainer.train(resume_from_checkpoint=str(self.checkpoints.path(done)) if done else None)
            return
        except BaseException as raised:
            error = raised
        message, in_all = str(error), isinstance(error, Abandoned)
        # of several processes, the others may wait in a step that this one alone gives up
        if in_all or (self.processes.count == 1 and isinstance(error, self._expected_errors)):
            self._save_last_step(trainer, interrupt)
        if in_all:
            if not message:
                return
            error = error.__cause__ or typer.Exit(1)  # of another process
        self.say(f"the run ended early; it goes on after step {self.checkpoints.done} by: {self._resume_command()}")
        if isinstance(error, (typer.Exit, *self._expected_errors)):
            if self.processes.first or not in_all:
                typer.echo(f"error: {message}", err=True)
            raise typer.Exit(1) from None
        raise error

    def _save_last_step(self, trainer: Any, interrupt: Interrupt) -> None:
        """Write a checkpoint after the last complete step; the step under way is given up."""
        if trainer.state.global_step > self.processes.shared(self.checkpoints.done):
            interrupt.restore_random_numbers()
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)

    def _resume_command(self) -> str:
        return resume_command(self.output, self.processes.count)

    def _end(self, trainer: Any, tokenizer: Any, record: figures.Record, prompt_count: int, finished: bool) -> None:
        options = self.options
        for name in (REPORT, record.path.name):
            self.folder.finish(name)
        if not finished:
            self.say(f"saved after step {trainer.state.global_step}; go on by: {self._resume_command()}")
            return
        rows = [row for row in record.rows if "loss" in row]
        text = card.text(options, self._inputs, prompt_count, rows, self._answers)
        self._save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, text, trainer.state.global_step)
        self.say(f"trained {self._result.name}: {self._result}")
        self.say(f"report: {self.output / REPORT}")
        self.say(f"figures: {record.path}, tensorboard --logdir {self.output / 'tensorboard'}")

    def _check_result(self) -> None:
        """Refuse to replace a result that this command did not write, or that has all steps already."""
        if not self._result.exists():
            return
        try:
            written = durable.verify(self._result)
        except durable.Damaged as error:
            raise typer.BadParameter(
                f"{self._result} is not as this command wrote it ({error}): move it away, and --resume writes the "
                "run's result again",
                param_hint="--output",
            ) from None
        if written >= self.options.steps:
            raise typer.BadParameter(
                f"the run in {self.output} has done its {self.options.steps} steps: give more to go on",
                param_hint="--steps",
            )

    def _save(self, model: Any, tokenizer: Any, model_card: str, step: int) -> None:
        if self.options.lora and self.options.save == "merged":
            model = model.merge_and_unload()
        partial = self.folder.create(f"{self._result.name}.partial")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card, encoding="utf-8")  # replaces the empty card that PEFT writes
        durable.seal(partial, step)
        self.folder.move(partial.name, self._result.name)
