"""The options of ``inspect``, checked before PyTorch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ... import installing
from ...integrations.hub import STUDENT, adapter_path, is_folder
from ..distill.readings import Reading, readings_of
from ..parameters import json_object, naming, panel, require_finite, require_one_of, require_packages, wrong

MODELS, TEXTS, SAMPLING = panel("Models and page"), panel("Texts"), panel("Answers and scores")
OTHERS, CHAT = panel("Prompts of the frozen models"), panel("Chat template")


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """The command's options, of the same names and meanings as those of ``distill``."""

    student: Annotated[str, MODELS(help="A folder, a hub name, or smollm2; a PEFT adapter is put on its base.")] = ""
    teacher: Annotated[
        str, MODELS(help="Likewise; `student` for the student itself; adapter:PATH for an adapter on the student.")
    ] = ""
    ref: Annotated[str, MODELS(help="The reference, likewise.")] = ""
    dtype: Annotated[str, MODELS(help="float32 or bfloat16. Default: bfloat16 on a GPU, float32 on a CPU.")] = ""
    prompts: Annotated[str, TEXTS(metavar="FILE", help="A .jsonl or .parquet file of prompts to be answered.")] = ""
    texts: Annotated[str, TEXTS(metavar="FILE", help="In its place: a file of prompts with their answers.")] = ""
    rows: Annotated[int, TEXTS(min=1, metavar="N", help="So many rows of it, from the first.")] = 8
    prompt_column: Annotated[
        str, TEXTS(help="The column of texts or lists of messages. Default: prompt, or messages.")
    ] = ""
    completion_column: Annotated[
        str, TEXTS(help="With --texts, that of the answers. Default: completion, or the last message.")
    ] = ""
    teacher_prompt_column: Annotated[str, OTHERS(help="The column of prompts that the teacher reads.")] = ""
    teacher_system: Annotated[str, OTHERS(metavar="TEXT", help="A system message that the teacher alone reads.")] = ""
    teacher_template: Annotated[
        str, OTHERS(metavar="TEXT", help="What the teacher reads: {prompt}, and {NAME} for a column.")
    ] = ""
    ref_prompt_column: Annotated[str, OTHERS(help="The column of prompts that the reference reads.")] = ""
    chat: Annotated[bool, CHAT(help="Take texts for a user's messages, where the student has a chat template.")] = True
    chat_template_kwargs: Annotated[str, CHAT(metavar="JSON", help="Variables of the chat templates.")] = ""
    reward_scale: Annotated[float, SAMPLING(help="λ of the advantage; other than 1 it needs --ref.")] = 1.0
    temperature: Annotated[float, SAMPLING(help="Of the answers and of all log-probs.")] = 1.0
    max_new_tokens: Annotated[int, SAMPLING(min=1, help="Longest answer of the student.")] = 256
    batch_size: Annotated[int, SAMPLING(min=1, help="Answers in memory at once.")] = 4
    seed: Annotated[int, SAMPLING(min=0, help="Of the answers.")] = 0

    @property
    def path(self) -> Path:
        return Path(self.prompts or self.texts)

    @property
    def file_option(self) -> str:
        return "--prompts" if self.prompts else "--texts"

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables of the chat templates."""
        return json_object("chat_template_kwargs", self.chat_template_kwargs)

    def models(self) -> dict[str, str]:
        """The models by role: ``"student"``, ``"teacher"`` and, where there is one, ``"ref"``."""
        found = {"student": self.student, "teacher": self.teacher, "ref": self.ref}
        return {role: self.student if name == STUDENT else name for role, name in found.items() if name}

    def places(self) -> list[str]:
        """Folders and hub names of models and adapters."""
        return [adapter_path(name) or name for name in self.models().values()]

    def readings(self) -> dict[str, Reading]:
        """By role the prompts that are not the student's."""
        return readings_of(self)

    def check(self) -> None:
        """Raise for options that contradict each other, missing files and packages that are not installed."""
        for name in ("student", "teacher"):
            if not getattr(self, name):
                raise wrong(f"--{name}", "must be given")
        if bool(self.prompts) == bool(self.texts):
            raise wrong("--prompts", "give either --prompts, to be answered, or --texts, which have answers")
        if self.completion_column and not self.texts:
            raise wrong("--completion-column", "is an option of --texts")
        if not self.path.is_file():
            raise wrong(self.file_option, f"there is no file {self.path}")
        if self.dtype:
            require_one_of("dtype", self.dtype, ("float32", "bfloat16"))
        require_finite("reward_scale", self.reward_scale)
        require_finite("temperature", self.temperature)
        if self.temperature <= 0:
            raise wrong("--temperature", f"must be positive, got {self.temperature:g}")
        if self.reward_scale != 1 and not self.ref:
            raise wrong("--ref", f"must be given for --reward-scale {self.reward_scale:g}: only 1 does without")
        if self.ref_prompt_column and not self.ref:
            raise wrong("--ref-prompt-column", "is an option of --ref")
        if self.teacher == STUDENT and not self.ref and not self.readings():
            raise wrong(
                "--teacher",
                "student reads the prompt that the student reads, so that both say the same of every token: give it "
                "another prompt (--teacher-template, --teacher-system, --teacher-prompt-column), or a --ref",
            )
        for reading in self.readings().values():
            reading.check()
        json_object("chat_template_kwargs", self.chat_template_kwargs)
        for role, name in self.models().items():
            option, adapter = f"--{role}", adapter_path(name)
            if role == "student" and adapter is not None:
                raise wrong(option, f"must be a model, or the folder of an adapter with its base in it, got {name}")
            if (adapter or name) != "smollm2":
                with naming(option):
                    is_folder(option, adapter or name)
        needed = ["transformers", "trl", "datasets", "jinja2", "matplotlib"]
        needed += ["peft"] if any(adapter_path(name) for name in self.models().values()) else []
        require_packages("inspect", needed, installing.extra("train"))
