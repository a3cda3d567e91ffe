"""The answers of ``inspect``, and their log-probs under each model."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from ... import LinearHead, TokenLogProbs, gopd_loss, token_logprobs
from ...html import ScoredText, write_report
from ...html.texts import visible
from ...integrations.hub import adapter_path
from ...integrations.tokenizers.texts import token_texts
from ...integrations.transformers import head_of, last_hidden_state
from ...integrations.trl import card, check_tokenizers
from ...integrations.trl.report import token_numbers
from ...integrations.trl.watch import ends_of
from ...output import GOPDOutput
from ...run_metrics import line
from .. import outputs, quiet
from ..distill import inputs, models, prompts
from ..distill.options import with_bases
from ..parameters import naming
from ..progress import StepProgress
from .options import InspectOptions

T = TypeVar("T")

_ROLES = {"student": "the student", "teacher": "the teacher", "ref": "the reference"}
# metrics whose means over all tokens are shown at the end
_SAID = ("reward", "kl_teacher_k3", "kl_ref_k3", "advantage", "entropy")


@dataclass(frozen=True, kw_only=True)
class _Row:
    number: int  # in the file, from 1
    prompt_ids: dict[str, list[int]]  # by role
    token_ids: list[int]  # of the completion


class Inspection:
    """The command at work."""

    def __init__(self, options: InspectOptions, output: Path, overwrite: bool) -> None:
        self.options = options
        self.console = Console()
        self.places = {role: _local(name) for role, name in options.models().items()}
        reads = {_ROLES[role]: Path(place) for role, place in self.places.items() if Path(place).is_dir()}
        with outputs.option("--output"):
            self.output = outputs.new_file(output, overwrite, {"the file of the texts": options.path, **reads})
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, models.dtype_of(options.dtype))

    def run(self) -> None:
        """Write the page."""
        options = self.options
        quiet.after_import()
        known = self._read_models()
        self.tokenizer = models.read_tokenizer("--student", options.student, self.places["student"])
        self._check_models(known)
        self.vocab_size = min(model.vocab for model in known.values())
        rows = self._rows()
        self._check_rows(rows, known)
        cuts = [slice(start, start + options.batch_size) for start in range(0, len(rows), options.batch_size)]
        with StepProgress(self.console, "part") as bar:
            task = bar.add_task("loading", total=len(cuts) * (len(known) + bool(options.prompts)))

            def each(what: str, function: Callable[[list[_Row]], T]) -> list[T]:
                found = []
                for cut in cuts:
                    bar.update(task, description=what)
                    found.append(function(rows[cut]))
                    bar.update(task, advance=1)
                return found

            student = self._load("student")
            if options.prompts:
                torch.manual_seed(options.seed)
                rows = list(chain(*each("the student answers", partial(self._answered, student))))
            scores = {}
            for role in list(known)[1:]:
                bar.update(task, description=f"loading {_ROLES[role]}")
                model = student if self.places[role] == self.places["student"] else self._load(role)
                scores[role] = each(f"{_ROLES[role]} scores", partial(self._logprobs, model, role))
                del model
                gc.collect()
            by_batch = iter([dict(zip(scores, batch, strict=True)) for batch in zip(*scores.values(), strict=True)])
            outs = each("the student scores", lambda batch: self._loss(student, batch, next(by_batch)))
        texts = [
            self._text(row, i, out) for cut, out in zip(cuts, outs, strict=True) for i, row in enumerate(rows[cut])
        ]
        write_report(
            self.output,
            title=", ".join(f"{_ROLES[role]} {card.name_of(name)}" for role, name in options.models().items()),
            settings=self._settings(len(rows)),
            samples={f"{'answers to' if options.prompts else 'texts of'} {options.path.name}": texts},
        )
        self._say(sum(len(text.tokens) for text in texts), len(rows), sum((out.metrics() for out in outs), start=0))

    # ------------------------------------------------------------------------------------------------ models and texts

    def _read_models(self) -> dict[str, models.Model]:
        """The models' sizes by role."""
        known: dict[str, models.Model] = {}
        for role, name in self.options.models().items():
            adapter = adapter_path(name)
            if adapter is None:
                known[role] = models.read(f"--{role}", name, self.places[role], peft=True)
            else:
                models.read_adapter(f"--{role}", adapter, _base(self.places["student"]))
                known[role] = replace(known["student"], option=f"--{role}", name=name)
        return known

    def _check_models(self, known: Mapping[str, models.Model]) -> None:
        """Raise for models whose tokens are not the student's."""
        for role, model in known.items():
            if self.places[role] == self.places["student"] or adapter_path(model.name) is not None:
                continue
            other = models.read_tokenizer(model.option, model.name, self.places[role])
            with naming(model.option):
                check_tokenizers(model.name, self.tokenizer, other)
        models.check_sizes(list(known.values()), self.tokenizer, None)

    def _rows(self) -> list[_Row]:
        options, tokenizer = self.options, self.tokenizer
        try:
            data = prompts.read(options.path, options.prompt_column, "", [])
            completions = prompts.completions(data, options.completion_column) if options.texts else data.prompts
            whole, chat = prompts.as_read(data, tokenizer, options.student, options.chat)
        except typer.BadParameter as error:
            if error.param_hint in ("--prompts", "--lmbda"):
                error.param_hint = options.file_option
            raise
        answered = sum(answer is not None for answer in data.answers)
        if answered and options.prompts:
            self._line(f"{answered} conversations end with an assistant's message: it is left out")
        count = slice(options.rows)
        read = whole[count]
        models.check_template_variables(tokenizer, read, options.template_variables)
        by_role = dict.fromkeys(options.models(), read)
        by_role |= {role: reading.of(data, read, chat)[count] for role, reading in options.readings().items()}
        rows = []
        for n, number in enumerate(data.rows[count]):
            where = f"{options.path}, row {number}"
            ids = {
                role: models.encoded(found[n], tokenizer, options.template_variables, where, _ROLES[role])
                for role, found in by_role.items()
            }
            rows.append(_Row(number=number, prompt_ids=ids, token_ids=[]))
            if options.texts:
                rows[-1] = self._with_text(rows[-1], read[n], completions[n])
        return rows

    def _with_text(self, row: _Row, prompt: Any, completion: Any) -> _Row:
        where, variables = f"{self.options.path}, row {row.number}", self.options.template_variables
        ids = models.completion_ids(
            prompt, completion, row.prompt_ids["student"], self.tokenizer, variables, where, "--texts"
        )
        return replace(row, token_ids=ids)

    def _check_rows(self, rows: Sequence[_Row], known: Mapping[str, models.Model]) -> None:
        """Raise for tokens that a model does not have, and for rows that are longer than its positions."""
        options = self.options
        for row in rows:
            for role, ids in row.prompt_ids.items():
                length = len(ids) + (len(row.token_ids) if options.texts else options.max_new_tokens)
                model = known[role]
                if model.positions is not None and length > model.positions:
                    what = "" if options.texts else f" with --max-new-tokens {options.max_new_tokens}"
                    raise typer.BadParameter(
                        f"{options.path}, row {row.number}, has {length} tokens{what}, and {model.name} "
                        f"({model.option}) has {model.positions} positions",
                        param_hint=options.file_option,
                    )
                if (largest := max([*ids, *row.token_ids])) >= self.vocab_size:
                    raise typer.BadParameter(
                        f"{options.path}, row {row.number}, has the token of id {largest}, and the models have "
                        f"{self.vocab_size} tokens in common",
                        param_hint=options.file_option,
                    )

    def _load(self, role: str) -> Any:
        place = self.places[role]
        adapter = adapter_path(place)
        model = AutoModelForCausalLM.from_pretrained(
            place if adapter is None else _base(self.places["student"]), dtype=self.dtype
        )
        if adapter is not None:
            model = importlib.import_module("peft").PeftModel.from_pretrained(model, adapter)
        return model.to(cast("Any", self.device)).eval()

    # ------------------------------------------------------------------------------------------------ answers, scores

    def _answered(self, student: Any, rows: list[_Row]) -> list[_Row]:
        """The rows with the student's answers."""
        ends = _end_ids(student, self.tokenizer)
        ids, mask = self._padded([row.prompt_ids["student"] for row in rows], left=True)
        own = student.get_output_embeddings().weight.shape[0]
        beyond = list(range(self.vocab_size, own))
        config: Any = cast("Any", GenerationConfig)(
            do_sample=True,
            temperature=self.options.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.options.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=self._padding,
            bos_token_id=self.tokenizer.bos_token_id,
            suppress_tokens=beyond or None,
        )
        found = student.generate(input_ids=ids, attention_mask=mask, generation_config=config)[
            :, ids.shape[1] :
        ].tolist()
        answers = []
        for row, answer in zip(rows, found, strict=True):
            end = next((t for t, token in enumerate(answer) if token in ends), len(answer))
            answers.append(replace(row, token_ids=answer[: end + 1]))
        return answers

    @property
    def _padding(self) -> int:
        padding = self.tokenizer.pad_token_id
        return int(padding if padding is not None else self.tokenizer.eos_token_id or 0)

    def _padded(self, ids: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        """(B, T) ids and mask."""
        width = max(map(len, ids))
        padded, mask = (torch.full((len(ids), width), x, device=self.device) for x in (self._padding, 0))
        for i, found in enumerate(ids):
            part = slice(width - len(found), None) if left else slice(len(found))
            padded[i, part] = torch.tensor(found, device=self.device)
            mask[i, part] = 1
        return padded, mask

    def _head(self, model: Any, role: str, rows: list[_Row]) -> tuple[LinearHead, Tensor, Tensor]:
        """A model's head at the tokens of the completions, these (B, K), and their mask."""
        prompt, seen = self._padded([row.prompt_ids[role] for row in rows], left=True)
        token_ids, mask = self._padded([row.token_ids for row in rows], left=False)
        ids, attended = torch.cat([prompt, token_ids], dim=1), torch.cat([seen, mask], dim=1)
        hidden = last_hidden_state(model, ids, attended, keep=token_ids.shape[1])
        return head_of(model, hidden, temperature=self.options.temperature), token_ids, mask

    @torch.no_grad()
    def _logprobs(self, model: Any, role: str, rows: list[_Row]) -> Tensor:
        head, token_ids, mask = self._head(model, role, rows)
        return cast("Tensor", token_logprobs(head, token_ids, mask=mask, vocab_size=self.vocab_size))

    @torch.no_grad()
    def _loss(self, student: Any, rows: list[_Row], scores: Mapping[str, Tensor]) -> GOPDOutput:
        """The loss of a batch, whose output has the log-probs, entropy and advantage of each token."""
        head, token_ids, mask = self._head(student, "student", rows)
        return gopd_loss(
            head,
            TokenLogProbs(scores["teacher"]),
            TokenLogProbs(scores["ref"]) if "ref" in scores else None,
            token_ids=token_ids,
            mask=mask,
            reward_scale=self.options.reward_scale,
            estimator="sampled",
            score_cancelled="ref" in scores,
            vocab_size=self.vocab_size,
        )

    # ------------------------------------------------------------------------------------------------- what is shown

    def _text(self, row: _Row, i: int, out: GOPDOutput) -> ScoredText:
        length = len(row.token_ids)
        numbers: dict[str, Any] = {name: x[i, :length].tolist() for name, x in token_numbers(out).items()}
        read = {role: self.tokenizer.decode(ids, skip_special_tokens=False) for role, ids in row.prompt_ids.items()}
        own = read.pop("student")
        return ScoredText(
            title=f"row {row.number}",
            prompt=own,
            tokens=token_texts(self.tokenizer, row.token_ids),
            **numbers,
            **{f"{role}_prompt": text for role, text in read.items() if text != own},
        )

    def _settings(self, count: int) -> card.Lines:
        options = self.options
        read = inputs.fingerprints(
            {inputs.PROMPTS: options.path}, with_bases({_ROLES[role]: place for role, place in self.places.items()})
        )
        found = []
        for role, name in options.models().items():
            found.append((_ROLES[role], f"{card.name_of(name)}, {inputs.digest(read[_ROLES[role]])}"))
            if role in options.readings():
                found.append((f"{_ROLES[role]} reads", options.readings()[role].describe()))
        sampled = f"of the student, at most {options.max_new_tokens} tokens, seed {options.seed}"
        return [
            *found,
            ("λ (reward scale)", f"{options.reward_scale:g}"),
            ("temperature", f"{options.temperature:g}"),
            ("answers", sampled if options.prompts else "of the file"),
            ("data", f"{count} rows of {options.path.name}, {inputs.digest(read[inputs.PROMPTS])}"),
            *card.versions(),
        ]

    def _say(self, tokens: int, count: int, metrics: Any) -> None:
        said = line(metrics.to_dict(), _SAID, between=", ")
        answers = f"{count} answer{'s' * (count > 1)}"
        self._line(f"{answers} of {tokens} tokens; means: {said}")
        self._line(f"the page: {self.output}")

    def _line(self, text: str) -> None:
        self.console.print(visible(text), highlight=False, markup=False, soft_wrap=True)


def _local(name: str) -> str:
    adapter = adapter_path(name)
    return models.local(name) if adapter is None else name


def _base(place: str) -> str:
    """The base of a PEFT adapter's folder; other folders and names as they are."""
    return with_bases({"model": place}).get("the base of model", place)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model."""
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *ends_of(model)] if i is not None))
