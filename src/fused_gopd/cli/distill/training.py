"""One run: everything is checked, then the models are loaded, trained, and saved; an interrupt loses nothing."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ...integrations.trl import GOPDConfig, GOPDTrainer, check_tokenizers
from ..demo import smollm
from . import figures, options, prompts

# the dataset's own, whatever the file's are called
_ROUTE = "route"


class Interrupt(TrainerCallback):
    """A first Ctrl-C (or SIGTERM) ends the step that is under way and saves; a second one ends at once."""

    def __init__(self, say: Any) -> None:
        self.asked = False
        self._say = say

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._say("interrupted: this step is ended, then all is saved; again: stop now, from the last checkpoint")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_training_stop = control.should_save = True


class Watch(TrainerCallback):
    """Passes on what is logged at each step."""

    def __init__(self, record: figures.Record, display: figures.Display) -> None:
        self._record, self._display = record, display

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:  # the summary at the end has none
            self._display.step(self._record.add(state.global_step, logs))


def _last_checkpoint(output: Path) -> tuple[str | None, int]:
    """The newest checkpoint of a run, if there is one, and the steps that it has done.

    The trainer's state is what the trainer writes last: a checkpoint without it was cut off, and does not count.
    """
    whole = [state.parent for state in output.glob("checkpoint-*/trainer_state.json")]
    steps = {int(folder.name.removeprefix("checkpoint-")): str(folder) for folder in whole}
    done = max(steps, default=0)
    return steps.get(done), done


def _tensorboard(output: Path, done: int) -> Any:
    """Writes TensorBoard's events; what an earlier part of the run wrote of steps that were lost is left out."""
    board: Any = importlib.import_module("torch.utils.tensorboard")
    integrations: Any = importlib.import_module("transformers.integrations")
    return integrations.TensorBoardCallback(board.SummaryWriter(str(output / "tensorboard"), purge_step=done + 1))


class Run:
    """A run of given options in a folder."""

    def __init__(self, said: options.Options, output: Path, server_key: str | None = None) -> None:
        self.options, self.output, self._server_key = said, output, server_key
        self.display = figures.Display(Console(), said.steps)
        self.say = self.display.say
        self._foreseen: tuple[type[Exception], ...] = ()  # failures whose message says all
        low = (said.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")) == "bfloat16"
        self._frozen = "bfloat16" if low else "float32"  # of weights that are not trained, and of products

    @property
    def _result(self) -> Path:
        return self.output / ("adapter" if self.options.save == "adapter" else "model")

    def carry_out(self) -> bool:
        """Train; whether the run is finished."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise typer.BadParameter(
                "runs in one process: for several, call fused_gopd.integrations.trl.GOPDTrainer from a script under "
                "`accelerate launch`"
            )
        logging: Any = importlib.import_module("transformers.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        said = self.options
        checkpoint, done = _last_checkpoint(self.output)
        if done >= said.steps and self._result.is_dir():
            raise typer.BadParameter(
                f"the run in {self.output} has done its {said.steps} steps: give more to go on", param_hint="--steps"
            )
        listed = prompts.read(Path(said.prompts), said.prompt_column, said.route_column, self._route_names())
        tokenizer = self._tokenizers()
        dataset = self._dataset(listed, tokenizer)
        teacher = self._teacher(tokenizer)
        config = self._config()
        self._announce(done, len(listed.prompts))
        interrupt = Interrupt(self.say)
        with interrupt.listening():
            trainer = self._trainer(config, dataset, tokenizer, teacher)
            options.write(self.output, said)  # where no model could be loaded there is no run to resume
            record = figures.Record(self.output / "metrics.jsonl", done)
            for callback in (interrupt, Watch(record, self.display), _tensorboard(self.output, done)):
                trainer.add_callback(callback)
            with self.display.running(done):
                self._train(trainer, checkpoint)
        return self._end(trainer, tokenizer, record)

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

    def _tokenizer(self, option: str, name: str) -> Any:
        try:
            return AutoTokenizer.from_pretrained(self._local(name), padding_side="left", truncation_side="left")
        except (OSError, ValueError) as error:
            raise typer.BadParameter(
                f"{name!r} has no tokenizer: it is neither a model's folder nor a model on the hub that can be reached "
                f"({str(error).splitlines()[0]})",
                param_hint=option,
            ) from None

    def _tokenizers(self) -> Any:
        """The student's, once the others' have been compared with it."""
        said = self.options
        own = self._tokenizer("--student", said.student)
        others = [("--teacher", model) for model in said.routes().values()]
        if said.ref not in ("", "student"):
            others.append(("--ref", said.ref))
        for option, model in others:
            if model != said.student:
                try:
                    check_tokenizers(model, own, self._tokenizer(option, model))
                except ValueError as error:
                    raise typer.BadParameter(str(error), param_hint=option) from None
        return own

    def _dataset(self, listed: prompts.Prompts, tokenizer: Any) -> Any:
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
        return importlib.import_module("datasets").Dataset.from_dict(columns).select(order[:needed])

    def _teacher(self, tokenizer: Any) -> Any:
        """A model's place, one for each route, or a scorer."""
        said = self.options
        if not said.teacher_server:
            routes = {route: self._local(model) for route, model in said.routes().items()}
            return routes.get(None, routes)
        server = importlib.import_module("fused_gopd.integrations.server")
        self._foreseen = (server.TeacherServerError,)
        try:
            return server.ServerTeacher(
                said.teacher_server,
                said.teacher_server_model,
                api=said.teacher_server_api,
                top_k=said.k,
                timeout=said.teacher_server_timeout,
                api_key=self._server_key,
                tokenizer=tokenizer,
            )
        except (ValueError, server.TeacherServerError) as error:
            raise typer.BadParameter(str(error), param_hint="--teacher-server") from None

    def _config(self) -> Any:
        said, gpu = self.options, torch.cuda.is_available()
        try:
            return GOPDConfig(
                output_dir=str(self.output),
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
                save_total_limit=2,
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

    def _train(self, trainer: Any, checkpoint: str | None) -> None:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except BaseException as error:
            _, done = _last_checkpoint(self.output)
            self.say(f"the run ended early; it goes on after step {done} by: {self._resume_command()}")
            if isinstance(error, self._foreseen):
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(1) from None
            raise

    def _resume_command(self) -> str:
        return f"fused-gopd distill --resume --output {self.output}"

    def _end(self, trainer: Any, tokenizer: Any, record: figures.Record) -> bool:
        said = self.options
        picture = self.output / "metrics.png"
        figures.draw(record.rows, picture, f"{Path(said.student).name}, λ = {said.reward_scale:g}, {said.estimator}")
        finished = bool(trainer.state.global_step >= said.steps)
        if not finished:
            self.say(f"saved after step {trainer.state.global_step}; go on by: {self._resume_command()}")
            return False
        self._save(trainer.accelerator.unwrap_model(trainer.model), tokenizer)
        self.say(f"trained {self._result.name}: {self._result}")
        self.say(f"figures: {record.path}, {picture}, tensorboard --logdir {self.output / 'tensorboard'}")
        return True

    def _save(self, model: Any, tokenizer: Any) -> None:
        """The result, written beside its place and moved there: what is there is whole."""
        if self.options.lora and self.options.save == "merged":
            model = model.merge_and_unload()
        scratch = self.output / f"{self._result.name}.partial"
        for folder in (scratch, self._result):
            shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(self._result)
