"""``report_to="gopd-html"``: one HTML page about a run of the trainers, with what its own batches have shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback

from ...html import ScoredText, write_report
from ...installing import extra
from ...output import GOPDOutput
from ...run_metrics import rows_of, thinned
from .. import needs
from ..tokenizers.texts import token_texts
from . import card
from .batch import Batch, PromptIds

NAME = "gopd-html"
FILE = "report.html"
_SHOWN = 4  # sequences of a batch
_DIGITS = 5
_HEADINGS = {"train": "", "eval": "held-out prompts, "}  # what precedes "before" and "after 100 steps"


@contextmanager
def without_html(args: Any) -> Iterator[bool]:
    """Hide this report's name from transformers, which knows its own alone. Yields whether it was there."""
    given = args.report_to
    args.report_to = [name for name in given or () if name != NAME]
    try:
        yield NAME in (given or ())
    finally:
        args.report_to = given


def token_numbers(out: GOPDOutput) -> dict[str, Tensor]:
    """What the loss has computed of each token (B, K), by the fields of :class:`ScoredText`."""
    found = {
        "student": out.student_logprobs,
        "teacher": out.teacher_logprobs,
        "ref": out.ref_logprobs,
        "entropy": out.entropy,
        "advantage": out.advantages,
    }
    return {name: x for name, x in found.items() if x is not None}


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """Scored sequences, and how many optimizer steps the student had done that wrote them."""

    step: int
    texts: list[ScoredText]


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """The same while they are on the device."""

    step: int
    titles: list[str]
    prompts: dict[str, PromptIds]  # (n, P), by the fields of ScoredText
    token_ids: Tensor  # (n, K)
    completion_mask: Tensor  # (n, K)
    mask: Tensor  # (n, K) tokens that the loss has scored
    values: dict[str, Tensor]  # (n, K) each

    def read(self, tokenizer: Any) -> _Texts:
        texts = []
        for i, title in enumerate(self.titles):
            written = self.completion_mask[i].bool()
            unscored = ~self.mask[i].bool()
            numbers: dict[str, Any] = {}
            for name, x in self.values.items():
                found = x[i].masked_fill(unscored, math.nan)[written].tolist()
                numbers[name] = [float(f"{value:.{_DIGITS}g}") for value in found]
            prompts: dict[str, Any] = {
                name: tokenizer.decode(x.ids[i][x.mask[i].bool()].tolist(), skip_special_tokens=False)
                for name, x in self.prompts.items()
            }
            texts.append(
                ScoredText(
                    title=title,
                    **prompts,
                    tokens=token_texts(tokenizer, self.token_ids[i][written].tolist()),
                    **numbers,
                )
            )
        return _Texts(step=self.step, texts=texts)


class HtmlReport(TrainerCallback):
    """Writes the page at every save, at the end, and where a resumed run begins.

    Of the first batch and of the last one a few sequences are kept, with what the loss has computed of them anyway: on
    the device, until a page is written. They are in the trainer's checkpoints, too, so that a resumed run has those of
    its beginning. With several processes they are the main one's.

    Args:
        trainer: a trainer with :class:`.models.ScoringMixin`.
        path: of the page; default ``report.html`` in ``output_dir``.
        title, settings: of the page; default those of the model card.
    """

    def __init__(
        self,
        trainer: Any,
        path: Path | None = None,
        title: str | None = None,
        settings: Callable[[], card.Lines] | None = None,
    ) -> None:
        with needs(__name__, "jinja2", "matplotlib", install=partial(extra, "train")):
            import jinja2  # noqa: F401
            import matplotlib  # noqa: F401
        self._trainer = trainer
        self._path = Path(trainer.args.output_dir, FILE) if path is None else path
        self._title = f"{card.base_of(trainer)}, distilled" if title is None else title
        self._settings = partial(card.report_settings, trainer) if settings is None else settings
        self._written: dict[str, Any] = {}
        self._kept: dict[str, _Taken | _Texts] = {}  # by one of _HEADINGS and "first" or "last"

    # ------------------------------------------------------------------------------------------------------- batches

    def take(self, out: GOPDOutput, batch: Batch) -> None:
        """Keep a few sequences of a batch. Nothing is read from the device."""
        step = int(self._trainer.state.global_step)
        mode = "train" if self._trainer.model.training else "eval"
        last = self._kept.get(f"{mode} last")
        if mode == "eval" and last is not None and last.step == step:
            return  # of an evaluation the first batch is kept, which has the same prompts each time
        rows, titles = self._rows(batch)

        def some(x: Tensor) -> Tensor:
            return torch.stack([x[i].detach() for i in rows])

        width = batch.token_ids.shape[1]
        read = {"prompt": PromptIds(batch.input_ids[:, :-width], batch.attention_mask[:, :-width])}
        read |= {f"{role}_prompt": prompt for role, prompt in batch.prompts.items()}
        taken = _Taken(
            step=step,
            titles=titles,
            prompts={name: PromptIds(some(x.ids), some(x.mask)) for name, x in read.items()},
            token_ids=some(batch.token_ids),
            completion_mask=some(batch.completion_mask),
            mask=some(batch.mask),
            values={name: some(x) for name, x in token_numbers(out).items()},
        )
        self._kept.setdefault(f"{mode} first", taken)
        self._kept[f"{mode} last"] = taken

    def _rows(self, batch: Batch) -> tuple[list[int], list[str]]:
        """Which sequences are kept, one of each route first, and what they are called."""
        count = len(batch.token_ids)
        routes: list[Any] = [None] * count
        if batch.teacher_index is not None:
            names = list(self._trainer._routes)
            routes = [names[i] for i in batch.teacher_index.tolist()]  # it is on the CPU
        firsts = [routes.index(route) for route in dict.fromkeys(routes)]
        rows = sorted([*firsts, *(i for i in range(count) if i not in firsts)][:_SHOWN])
        named = ["" if routes[i] is None else f", {routes[i]}" for i in rows]
        return rows, [f"answer {n}{name}" for n, name in enumerate(named, 1)]

    def _read(self) -> dict[str, _Texts]:
        for name, kept in self._kept.items():
            if isinstance(kept, _Taken):
                self._kept[name] = kept.read(self._trainer._tokenizer)
        return cast("dict[str, _Texts]", self._kept)

    def _samples(self) -> dict[str, list[ScoredText]]:
        """The texts by their heading. Those of two evaluations, which have the same prompts, are in place of others."""
        found = {}
        read = self._read()
        steps = {kept.step for name, kept in read.items() if name.startswith("eval")}
        for name, kept in read.items():
            mode = name.partition(" ")[0]
            if len(steps) > 1 and mode != "eval":
                continue
            when = "before" if kept.step == 0 else f"after {kept.step} step{'s' * (kept.step > 1)}"
            found[_HEADINGS[mode] + when] = kept.texts
        return found

    # ------------------------------------------------------------------------------------------------- the trainer's

    def state(self) -> dict[str, Any]:
        """What is kept, for a checkpoint."""
        return {name: asdict(kept) for name, kept in self._read().items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(NAME)
        if saved is None:  # evaluations before the training are its beginning
            self._kept = {name: kept for name, kept in self._kept.items() if name.startswith("eval")}
            return
        self._kept = {
            name: _Texts(step=kept["step"], texts=[ScoredText(**text) for text in kept["texts"]])
            for name, kept in saved.items()
        }
        self._write()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write()

    def _write(self) -> None:
        trainer = self._trainer
        if not trainer.is_world_process_zero():
            return
        page: dict[str, Any] = {
            "title": self._title,
            "settings": self._settings(),
            "rows": rows_of(thinned(trainer.state.log_history)),
            "samples": self._samples(),
            "warnings": list(trainer.warnings),
        }
        if page != self._written or not self._path.exists():  # at the end, where the last step was saved, too
            write_report(self._path, **page)
            self._written = page
