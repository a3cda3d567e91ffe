"""Prompts that teachers or the reference read in place of the student's, made from the rows of a file."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from . import prompts
from .prompts import Prompts

_PROMPT = "prompt"  # the name of the student's prompt in a template


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the models of a role read.

    Args:
        role: ``"teacher"`` or ``"ref"``, as the flags begin.
        column: a column of the file, with texts or lists of messages.
        system: a system message, in place of the prompt's own.
        template: the text in place of the prompt's, or of its last message: ``{prompt}`` is that, and ``{name}`` a
            column. In both texts ``\\n`` is a new line, and ``\\\\n`` a backslash and an n.
    """

    role: str
    column: str = ""
    system: str = ""
    template: str = ""

    def __bool__(self) -> bool:
        """Whether it is another prompt than the student's."""
        return bool(self.column or self.system or self.template)

    @property
    def reader(self) -> str:
        return "the teacher" if self.role == "teacher" else "the reference"

    @property
    def owner(self) -> str:
        return f"{self.reader}'s"

    def describe(self) -> str:
        """One line for the model card."""
        texts = {"system message": _unescaped(self.system), "template": _unescaped(self.template)}
        parts = {"column": self.column, **texts}
        return ", ".join(f"{name} {part!r}" for name, part in parts.items() if part)

    def _flag(self, name: str) -> str:
        return f"--{self.role}-{name}"

    def check(self) -> None:
        """Raise for options that exclude each other, and a template that is none."""
        other = "system" if self.system else "template"
        if self.column and (self.system or self.template):
            raise typer.BadParameter(
                f"has the whole prompt: it goes without {self._flag(other)}", param_hint=self._flag("prompt-column")
            )
        if self.template and not any(name for _, name in self._pieces()):
            raise typer.BadParameter(
                "must have {prompt} in it, the prompt itself, or the name of a column: it would be the same text for "
                f"every prompt, got {self.template!r}",
                param_hint=self._flag("template"),
            )

    def _pieces(self) -> list[tuple[str, str | None]]:
        """(text, name of a column behind it) of the template."""
        try:
            pieces = list(string.Formatter().parse(_unescaped(self.template)))
            wrong = [name for _, name, spec, conversion in pieces if name == "" or spec or conversion]
        except ValueError as error:
            wrong = [str(error)]
            pieces = []
        names = [name for _, name, _, _ in pieces if name]
        wrong += [name for name in names if set(name) & set(".[")]
        if wrong:
            raise typer.BadParameter(
                f"must be a text with names of columns such as {{solution}}, and {{{{ and }}}} for braces, got "
                f"{self.template!r} ({', '.join(map(repr, wrong))})",
                param_hint=self._flag("template"),
            )
        return [(text, name) for text, name, _, _ in pieces]

    def of(self, data: Prompts, read: Sequence[Any], chat: bool) -> list[Any]:
        """The prompts of all rows.

        Args:
            data: the file.
            read: the student's prompts, as its tokenizer gets them.
            chat: whether texts are taken for a user's messages.

        Raises:
            typer.BadParameter: naming the option, the row and what is wrong.
        """
        if self.column:
            found, _ = prompts.of_column(data.path, data.table, self.column, self._flag("prompt-column"))
            return prompts.as_messages(found) if chat and isinstance(found[0], str) else found
        if self.system and isinstance(read[0], str):
            raise typer.BadParameter(
                "needs prompts of messages: the prompts are texts, and are read as they are (--no-chat, or a student "
                f"without a chat template). {self._flag('template')} puts a text around them",
                param_hint=self._flag("system"),
            )
        return [self._of_row(data, n, prompt) for n, prompt in enumerate(read)]

    def _of_row(self, data: Prompts, n: int, prompt: Any) -> Any:
        if isinstance(prompt, str):
            return self._filled(data, n, prompt)
        *front, last = prompt
        if self.template:
            last = {**last, "content": self._filled(data, n, last["content"])}
        if self.system:
            front = [message for message in front if message["role"] != "system"]
            front.insert(0, {"role": "system", "content": _unescaped(self.system)})
        return [*front, last]

    def _filled(self, data: Prompts, n: int, prompt: str) -> str:
        """The template with the values of a row."""
        number, row = data.table[n]
        parts = []
        for text, name in self._pieces():
            parts.append(text)
            if name == _PROMPT:
                parts.append(prompt)
            elif name is not None:
                parts.append(self._value(f"{data.path}, row {number},", row, name))
        return "".join(parts)

    def _value(self, where: str, row: Mapping[str, Any], name: str) -> str:
        if name not in row:
            raise typer.BadParameter(
                f"{where} has no {name!r}, only {', '.join(row)}", param_hint=self._flag("template")
            )
        value = row[name]
        if not isinstance(value, (str, int, float)):
            raise typer.BadParameter(
                f"{where} must have a text or a number in {name!r}, got {prompts.shown(value)}",
                param_hint=self._flag("template"),
            )
        if (wrong := prompts.fault_of_text(str(value))) is not None:
            raise typer.BadParameter(f"{where} {name!r}: {wrong}", param_hint="--prompts")
        return str(value)


def readings_of(options: Any) -> dict[str, Reading]:
    """By role, ``"teacher"`` or ``"ref"``, the prompts that are not the student's, from options of these names."""
    found = {
        "teacher": Reading(
            role="teacher",
            column=options.teacher_prompt_column,
            system=options.teacher_system,
            template=options.teacher_template,
        ),
        "ref": Reading(role="ref", column=options.ref_prompt_column),
    }
    return {role: reading for role, reading in found.items() if reading}


def _unescaped(text: str) -> str:
    """A text of the command line, where a new line is hard to type."""
    return re.sub(r"\\\\n|\\n", lambda found: "\\n" if len(found[0]) == 3 else "\n", text)
