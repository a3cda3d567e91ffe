"""One run: everything is checked, then the models are loaded, trained, and saved; an interrupt loses nothing."""

from __future__ import annotations

import importlib
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ...integrations.trl import GOPDConfig, GOPDTrainer, check_tokenizers
from .. import durable
from ..demo import smollm
from ..outputs import OutputFolder
from . import card, checkpoints, figures, inputs, models, options, prompts
from .interrupt import Abandoned, Interrupt

# the dataset's own, whatever the file's are called
_ROUTE = "route"


class Watch(TrainerCallback):
    """Passes on what is logged at each step."""

    def __init__(self, record: figures.Record, display: figures.Display) -> None:
        self._record, self._display = record, display

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:  # the summary at the end has none
            self._display.step(self._record.add(state.global_step, logs))


class Save(TrainerCallback):
    """Takes over each checkpoint that the trainer has written, with a copy of the run's options."""

    def __init__(self, found: checkpoints.Checkpoints, saved: Path) -> None:
        self._checkpoints, self._options = found, saved

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        shutil.copy(self._options, self._checkpoints.partial / f"checkpoint-{state.global_step}")
        self._checkpoints.add(state.global_step)


def _tensorboard(path: Path, done: int) -> Any:
    """Writes TensorBoard's events; what an earlier part of the run wrote of steps that were lost is left out."""
    board: Any = importlib.import_module("torch.utils.tensorboard")
    integrations: Any = importlib.import_module("transformers.integrations")
    return integrations.TensorBoardCallback(board.SummaryWriter(str(path), purge_step=done + 1))


class Run:
    """A run of given options in a folder."""

    def __init__(
        self, said: options.Options, folder: OutputFolder, server_key: str | None = None, server_url: str | None = None
    ) -> None:
        """``server_key`` and ``server_url``, with user name and password, are used and neither written nor shown."""
        self.options, self.folder, self.output = said, folder, folder.path
        self._server_key, self._server_url = server_key, server_url
        self.display = figures.Display(Console(), said.steps)
        self.say = self.display.say
        self.checkpoints = checkpoints.Checkpoints(folder)
        self._foreseen: tuple[type[Exception], ...] = ()  # failures whose message says all
        low = (said.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")) == "bfloat16"
        self._frozen = "bfloat16" if low else "float32"  # of weights that are not trained, and of products

    @property
    def _result(self) -> Path:
        return self.output / ("adapter" if self.options.save == "adapter" else "model")

    def carry_out(self, resume: bool = False, accept_changed_inputs: bool = False) -> bool:
        """Train; whether the run is finished."""
        logging: Any = importlib.import_module("transformers.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        said = self.options
        self.folder.check("metrics.jsonl", "metrics.png", "tensorboard", self._result.name)
        self._check_result()
        self.checkpoints.find(self.say)
        done = self.checkpoints.done
        listed = prompts.read(Path(said.prompts), said.prompt_column, said.route_column, self._route_names())
        known, tokenizer = self._models()
        dataset = self._dataset(listed, tokenizer, known)
        self._inputs = self._read_inputs(done, resume, accept_changed_inputs)
        teacher = self._teacher(tokenizer, known[0].vocab)
        config = self._config()
        self._announce(done, len(listed.prompts))
        interrupt = Interrupt(self.say)
        if said.teacher_server:
            teacher = interrupt.scorer(teacher)
        with interrupt.listening(), self.folder.scratch(self.checkpoints.partial.name):
            trainer = self._trainer(config, dataset, tokenizer, teacher)
            durable.write_sealed(self.folder.extend(inputs.FILE), self._inputs)
            self.folder.extend(options.FILE)
            options.write(self.output, said)  # where no model could be loaded there is no run to resume
            record = figures.Record(self.folder.create("metrics.jsonl"), self.checkpoints.history())
            save = Save(self.checkpoints, self.output / options.FILE)
            board = _tensorboard(self.folder.extend("tensorboard"), done)
            for callback in (interrupt, Watch(record, self.display), save, board):
                trainer.add_callback(callback)
            with self.display.running(done):
                self._train(trainer, interrupt)
        return self._end(trainer, tokenizer, record, len(listed.prompts))

    # ---------------------------------------------------------------------------------------------- before any model

    def _route_names(self) -> list[str]:
        return [route for route in self.options.routes() if route is not None]

    def _local(self, name: str) -> str:
        """Where a model is; smollm2 is made from its package the first time."""
        if name != "smollm2" or Path(name).is_dir():
            return name
        try:
            return str(smollm.local_copy())
        except smollm.DemoError as error:
            raise typer.BadParameter(str(error), param_hint="smollm2") from None

    def _others(self) -> list[tuple[str, str]]:
        """The models beside the student that are loaded here, each with its option."""
        said = self.options
        ref = [("--ref", said.ref)] if said.ref not in ("", "student") and said.reward_scale != 1 else []
        return [*(("--teacher", model) for model in said.routes().values()), *ref]

    def _models(self) -> tuple[list[models.Model], Any]:
        """What is known of the models, the student first, and the student's tokenizer, once they fit each other."""
        said = self.options
        known = [
            models.read(option, name, self._local(name))
            for option, name in [("--student", said.student), *self._others()]
        ]
        tokenizer = models.read_tokenizer("--student", said.student, self._local(said.student))
        for model in known[1:]:
            if model.name != said.student:
                other = models.read_tokenizer(model.option, model.name, self._local(model.name))
                try:
                    check_tokenizers(model.name, tokenizer, other)
                except ValueError as error:
                    raise typer.BadParameter(str(error), param_hint=model.option) from None
        models.check_sizes(known, tokenizer, said.k)
        return known, tokenizer

    def _read_inputs(self, done: int, resume: bool, accept_changes: bool) -> dict[str, Any]:
        """Fingerprints of the prompts and models, which a resumed run compares with those that it began with."""
        local = {role: self._local(model) for role, model in self.options.roles().items()}
        now = inputs.fingerprints(Path(self.options.prompts), options.with_bases(local))
        return inputs.check(self.folder, now, done, accept_changes) if resume else {"inputs": now, "changes": []}

    def _dataset(self, listed: prompts.Prompts, tokenizer: Any, known: Sequence[models.Model]) -> Any:
        """One row for each answer of the run, in the order of seeded permutations.

        All of it is one epoch, so that a resumed run has no earlier epochs' shuffles to repeat, and a longer run
        begins with the shorter one's prompts.
        """
        said = self.options
        rows: Any = listed.prompts
        if listed.conversational and tokenizer.chat_template is None:
            raise typer.BadParameter(
                f"{said.prompts} has conversations, and the tokenizer of {said.student} has no chat template: give "
                "texts, or a student that was trained on conversations",
                param_hint="--prompts",
            )
        if listed.answered:
            self.say(f"{listed.answered} conversations end with an assistant's message: it is left out")
        if not listed.conversational and tokenizer.chat_template is not None and said.chat:
            self.say("texts are taken for a user's messages, by the student's chat template (--no-chat: as they are)")
            rows = [[{"role": "user", "content": text}] for text in rows]
        columns = {"prompt": rows} if listed.routes is None else {"prompt": rows, _ROUTE: listed.routes}
        generator = torch.Generator().manual_seed(said.seed)
        order: list[int] = []
        needed = said.steps * said.batch_size * said.accumulation
        while len(order) < needed:
            order += torch.randperm(len(rows), generator=generator).tolist()
        order = order[:needed]
        try:
            dataset: Any = importlib.import_module("datasets").Dataset.from_dict(columns)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise typer.BadParameter(
                f"{said.prompts} has fields of messages that are of one type in some rows and of another in others: "
                f"{models.first_line(error)}",
                param_hint="--prompts",
            ) from None
        used = sorted(set(order))
        models.check_prompts(
            dataset.select(used), [listed.rows[i] for i in used], said.prompts, known, tokenizer, said.max_new_tokens
        )
        return dataset.select(order)

    def _teacher(self, tokenizer: Any, vocab_size: int) -> Any:
        """A model's place, one for each route, or a scorer."""
        said = self.options
        if not said.teacher_server:
            routes = {route: self._local(model) for route, model in said.routes().items()}
            return routes.get(None, routes)
        server = importlib.import_module("fused_gopd.integrations.server")
        self._foreseen = (server.TeacherServerError,)
        try:
            return server.ServerTeacher(
                self._server_url or said.teacher_server,
                said.teacher_server_model,
                api=said.teacher_server_api,
                top_k=said.k,
                timeout=said.teacher_server_timeout,
                patience=said.teacher_server_patience,
                api_key=self._server_key,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
            )
        except (ValueError, ImportError, server.TeacherServerError) as error:
            raise typer.BadParameter(str(error), param_hint="--teacher-server") from None

    def _config(self) -> Any:
        said, gpu = self.options, torch.cuda.is_available()
        try:
            return GOPDConfig(
                output_dir=str(self.checkpoints.partial),
                reward_scale=said.reward_scale,
                estimator=said.estimator,
                divergence=said.divergence,
                k=said.k,
                route_column=_ROUTE if said.route_column else None,
                max_steps=said.steps,
                per_device_train_batch_size=said.batch_size,
                gradient_accumulation_steps=said.accumulation,
                learning_rate=said.learning_rate,
                lr_scheduler_type="constant",  # a run may be made longer
                max_completion_length=said.max_new_tokens,
                temperature=said.temperature,
                seed=said.seed,
                bf16=self._frozen == "bfloat16",
                use_cpu=not gpu,
                gradient_checkpointing=gpu,
                # trained weights are float32, whatever the products are
                model_init_kwargs={"dtype": self._frozen if said.lora else "float32"},
                teacher_model_init_kwargs=None if said.teacher_server else {"dtype": self._frozen},
                shuffle_dataset=False,
                logging_steps=1,
                save_strategy="steps",
                save_steps=said.save_every,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=gpu,
            )
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(str(error)) from None

    def _announce(self, done: int, count: int) -> None:
        said = self.options
        teachers = said.teacher_server or ", ".join(said.teacher)
        self.say(f"student {said.student}, teacher {teachers}, reference {said.ref or 'none'}")
        trained = f"LoRA of rank {said.lora}" if said.lora else "all weights"
        if done >= said.steps:
            self.say("no step is left: the result is written")
            return
        where = f"steps {done + 1} to {said.steps}" if done else f"{said.steps} steps"
        self.say(
            f"{where} of {said.batch_size * said.accumulation} answers to {count} prompts, λ = {said.reward_scale:g}, "
            f"{said.estimator}, {trained} at {said.learning_rate:g}"
        )
        if said.ref and said.reward_scale == 1:
            self.say("the reference is not loaded: λ = 1 has no use for it")

    # --------------------------------------------------------------------------------------------------------- training

    def _trainer(self, config: Any, dataset: Any, tokenizer: Any, teacher: Any) -> Any:
        said = self.options
        adapter = None
        if said.lora:
            adapter = importlib.import_module("peft").LoraConfig(
                r=said.lora, lora_alpha=said.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            )
        trainer = GOPDTrainer(
            self._local(said.student),
            teacher,
            config,
            train_dataset=dataset,
            processing_class=tokenizer,
            ref_model=self._reference(),
            peft_config=adapter,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _reference(self) -> Any:
        """Nothing, the student without its adapter, or a model."""
        said = self.options
        if said.reward_scale == 1:
            return None
        if said.ref == "student" and said.lora:
            return "base"
        name = said.student if said.ref == "student" else said.ref
        return AutoModelForCausalLM.from_pretrained(self._local(name), dtype=getattr(torch, self._frozen))

    def _train(self, trainer: Any, interrupt: Interrupt) -> None:
        done = self.checkpoints.done
        try:
            try:
                trainer.train(resume_from_checkpoint=str(self.checkpoints.path(done)) if done else None)
            except BaseException as error:
                if isinstance(error, (Abandoned, *self._foreseen)):
                    self._save_last_step(trainer, interrupt)
                raise
        except Abandoned:
            return
        except BaseException as error:
            self.say(f"the run ended early; it goes on after step {self.checkpoints.done} by: {self._resume_command()}")
            if isinstance(error, self._foreseen):
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(1) from None
            raise

    def _save_last_step(self, trainer: Any, interrupt: Interrupt) -> None:
        """The checkpoint after the last step that was done, while the one after it is given up."""
        if trainer.state.global_step > self.checkpoints.done:
            interrupt.restore_random_numbers()
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)

    def _resume_command(self) -> str:
        return shlex.join(("fused-gopd", "distill", "--resume", "--output", str(self.output)))

    def _end(self, trainer: Any, tokenizer: Any, record: figures.Record, prompt_count: int) -> bool:
        said = self.options
        picture = self.folder.create("metrics.png")
        figures.draw(record.rows, picture, f"{Path(said.student).name}, λ = {said.reward_scale:g}, {said.estimator}")
        for path in (picture, record.path):
            self.folder.finish(path.name)
        finished = bool(trainer.state.global_step >= said.steps)
        if not finished:
            self.say(f"saved after step {trainer.state.global_step}; go on by: {self._resume_command()}")
            return False
        text = card.text(said, self._inputs, prompt_count, record.rows)
        self._save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, text, trainer.state.global_step)
        self.say(f"trained {self._result.name}: {self._result}")
        self.say(f"figures: {record.path}, {picture}, tensorboard --logdir {self.output / 'tensorboard'}")
        return True

    def _check_result(self) -> None:
        """A result is replaced by a longer run's only where it is what this command wrote."""
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
        (partial / "README.md").write_text(model_card, encoding="utf-8")  # in the place of PEFT's, which is empty
        durable.seal(partial, step)
        self.folder.move(partial.name, self._result.name)
