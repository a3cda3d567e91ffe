"""The mixin of both trainers: scores of teachers and reference, and the loss of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from trl.trainer.utils import maybe_gather_lm_head_ctx, pad

from ... import Metrics, distributed, gopd_loss, token_topk
from ...heads import LinearHead, Logits, TokenLogProbs, TopKLogProbs
from ...output import GOPDOutput
from ...targets import Composite, Frozen, LogLinear, Mixture
from ...token_stats import RewardScaleFn
from ...values import require_number
from ..cache import StoredStates
from ..hub import BASE
from ..transformers import head_of, last_hidden_state
from .batch import Batch, PromptIds, flat, flat_prompt, spread
from .checks import positions_of, require_route, takes_token_ids
from .cross import as_batch
from .frozen import FrozenModel, Given
from .loading import LoadingMixin, without_cast
from .report import without_html
from .reporting import ReportingMixin

T = TypeVar("T")
# metrics that an evaluation has whatever the loss computes
_EXACT = ("reward", "kl_teacher", "kl_ref", "kl_ref_k3")


def _has_vocabulary(source: Frozen) -> bool:
    """Whether a model has scored all tokens of the vocabulary."""
    if isinstance(source, Composite):
        return all(_has_vocabulary(model) for model in source.models)
    return isinstance(source, (LinearHead, Logits))


class ScoringMixin(LoadingMixin, ReportingMixin):
    """Adds teachers, reference, lambda and metrics to one of TRL's trainers."""

    state: Any
    temperature: float
    _signature_columns: list[str]

    @contextmanager
    def _constructing(
        self, student: str | nn.Module, args: Any, given: Given, datasets: Mapping[str, Any], peft_config: Any
    ) -> Iterator[None]:
        """Around TRL's construction of the trainer: checks before it; the frozen models and the report after it."""
        self._validate(student, args, given, datasets, peft_config)
        self._begin_reports()
        with without_html(args) as wants_report:
            yield
        self._set_up_models(given)
        if wants_report:
            self.add_report()

    def _check_positions(self, batch: Batch) -> None:
        """Raise for a sequence longer than a model's positions, where its scores are meaningless. Needs a host sync."""
        read = [("the student", positions_of(self.model.config), batch.attention_mask)]
        for frozen in self._frozen:
            mask = batch.read_by(frozen.role).attention_mask
            mask = mask * frozen.rows_of(batch).to(mask.device)[:, None]
            aligned = batch.aligned.get(frozen.name)
            read.append((frozen.name, frozen.positions, mask if aligned is None else aligned.attention_mask))
        for name, positions, mask in read:
            if positions is None:
                continue
            longest = int(mask.sum(dim=1).max())
            if longest > positions:
                raise ValueError(
                    f"a prompt and its completion have {longest} tokens, and {name} has {positions} positions "
                    "(max_position_embeddings of its config): leave such prompts out, or lower max_completion_length"
                )

    @property
    def reward_scale(self) -> float | RewardScaleFn:
        """lambda of the current optimizer step, or the function that gives each token its own.

        It depends on the step alone, so that a resumed run continues with it.
        """
        if self._reward_scale_fn is not None:
            scale = self._reward_scale_fn(self.state.global_step)
            return scale if callable(scale) else require_number("reward_scale_fn(step)", scale)
        start: float = self.args.reward_scale
        end: float | None = self.args.reward_scale_end
        if end is None:
            return start
        done: float = min(self.state.global_step / max(self.args.reward_scale_steps or self.state.max_steps, 1), 1.0)
        return (1 - done) * start + done * end

    def _hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, K, H) states that predict the completions. To be called inside the forward of the model's wrapper."""
        keep = batch.token_ids.shape[1]
        return last_hidden_state(model, batch.input_ids, batch.attention_mask, keep=keep, **batch.multimodal)

    def _frozen_states(
        self,
        stored: StoredStates | None,
        model: Any,
        batch: Batch,
        gathered: ExitStack,
        run: Callable[[Batch], Tensor],
    ) -> LinearHead:
        """The head of a frozen model on its states: from the cache, or as far as they are not there from ``run``."""
        if stored is None or not bool(batch.completion_mask.any()):
            return self._frozen_head(model, run(batch), gathered)
        if batch.multimodal:
            raise ValueError("teacher_cache finds scores by token ids, which do not tell one image from another")
        device = batch.input_ids.device
        masks = batch.attention_mask, batch.completion_mask
        now = stored.now(device)
        found = now.lookup(batch.input_ids, *masks, lambda rows: {"hidden": run(batch.take(rows.to(device)))})
        head = self._frozen_head(model, found["hidden"], gathered)
        now.remember_head(head)
        return head

    def _head(self, model: nn.Module, hidden: Tensor) -> LinearHead:
        """A model's head, at the temperature at which completions are sampled."""
        return head_of(model, hidden, temperature=self.temperature)

    def _frozen_head(self, model: Any, hidden: Tensor, gathered: ExitStack) -> LinearHead:
        """The head of a frozen model. ZeRO-3 keeps its weight gathered while ``gathered`` is open."""
        embeddings = model.get_output_embeddings()
        gathered.enter_context(maybe_gather_lm_head_ctx(*embeddings.parameters()))
        with without_cast(embeddings) as cast_to_fp32:
            return self._head(model, hidden.float() if cast_to_fp32 else hidden)

    def _at_head(self, model: Any, hidden: Tensor, function: Callable[[LinearHead], T]) -> T:
        """Call ``function`` with the model's head, inside the head's forward: wrappers gather its weight there."""
        embeddings = model.get_output_embeddings()
        with without_cast(embeddings) as cast_to_fp32:

            def at(hidden: Tensor) -> T:
                return function(self._head(model, hidden.float() if cast_to_fp32 else hidden))

            if not isinstance(embeddings, nn.Linear):  # an adapter layer of PEFT
                return at(hidden)
            return distributed.through_head(embeddings, hidden, lambda given: at(given.hidden))

    def _score(self, frozen: FrozenModel, batch: Batch, gathered: ExitStack) -> Frozen:
        """Score a batch at the student's tokens."""
        batch = batch.read_by(frozen.role)
        aligned = batch.aligned.get(frozen.name)
        if aligned is None:
            return self._score_own(frozen, batch, gathered)
        scored = self._score_own(frozen, as_batch(aligned), gathered)
        return self._cross.carry(frozen.name, scored, aligned, batch.old_logprobs)

    def _score_own(self, frozen: FrozenModel, batch: Batch, gathered: ExitStack) -> Frozen:
        """Score the tokens of a batch with the model that they belong to."""
        model = frozen.model
        if isinstance(model, str):  # "base" or "student": to be called inside the forward of the student's wrapper
            student = self.accelerator.unwrap_model(self.model)
            with student.disable_adapter() if model == BASE else nullcontext():
                return self._frozen_states(frozen.stored, student, batch, gathered, partial(self._hidden, student))
        if isinstance(model, nn.Module):
            unwrapped = self.accelerator.unwrap_model(model)

            def run(part: Batch) -> Tensor:
                return distributed.in_forward(model, partial(self._hidden, unwrapped, part))

            return self._frozen_states(frozen.stored, unwrapped, batch, gathered, run)
        asked = () if batch.asked_ids is None or not takes_token_ids(model) else (batch.asked_ids,)
        scored = model(batch.input_ids, batch.attention_mask, batch.completion_mask, *asked)
        if not isinstance(scored, (TokenLogProbs, TopKLogProbs, LinearHead, Logits, LogLinear, Mixture)):
            raise TypeError(
                f"the scorer {frozen.name} must return fused_gopd.TokenLogProbs, TopKLogProbs or LinearHead, got "
                f"{type(scored).__name__}"
            )
        device = batch.token_ids.device
        if isinstance(scored, TokenLogProbs):
            return TokenLogProbs(scored.logprobs.to(device))
        if isinstance(scored, TopKLogProbs):
            return TopKLogProbs(**{name: x.to(device) for name, x in scored.tensors.items()})
        return scored

    def _score_teachers(self, batch: Batch, gathered: ExitStack) -> tuple[Frozen | list[Frozen], Tensor | None]:
        """Score each sequence with its teacher. Returns scores by teacher, and the teacher of each sequence, (B,)."""
        index = batch.teacher_index
        if index is None:
            return self._score(self._teachers[0], batch, gathered), None
        # ranks that share a model must all call it; without a sequence of its route, a rank scores one and ignores it
        shared = self.accelerator.num_processes > 1
        used, sources = [], []
        for i, teacher in enumerate(self._teachers):
            rows = (index == i).nonzero()[:, 0]
            if len(rows) or (shared and isinstance(teacher.model, (str, nn.Module))):
                part = batch.take(rows if len(rows) else torch.zeros(1, dtype=torch.int64))
                used.append(i)
                sources.append(spread(self._score(teacher, part, gathered), rows, len(index)))
        return sources, torch.bucketize(index, torch.tensor(used)).to(batch.token_ids.device)

    def _loss(self, student: nn.Module, batch: Batch, **options: Any) -> GOPDOutput:
        """The loss of a batch. To be called inside the forward of the student's wrapper."""
        scale = self.reward_scale
        evaluates = self._evaluates_exactly and not self.model.training
        needs_ref = scale != 1 or self.args._penalty is not None or (evaluates and self._reference is not None)
        teacher: Frozen | list[Frozen] | None = None
        ref: Frozen | None = None
        index = None
        own = {**self._options, **options}
        hidden = None
        with ExitStack() as gathered, self.accelerator.autocast():
            if self._asks_about_student and scale != 0:
                hidden = self._hidden(student, batch)
                batch = replace(batch, asked_ids=self._likeliest(student, hidden, batch))
                own["support"] = "teacher"  # what scorers are asked about is what they list
            with torch.no_grad(), self._phase("score") as phase:
                phase.tokens_at_end = batch.mask.sum()
                # models that lambda cancels are not run
                if scale != 0:
                    teacher, index = self._score_teachers(batch, gathered)
                if needs_ref:
                    ref = self._score(cast("FrozenModel", self._reference), batch, gathered)
            loss: Callable[[LinearHead], GOPDOutput] = partial(
                gopd_loss,
                teacher=teacher,
                ref=ref if scale != 1 or self.args._penalty is not None else None,
                token_ids=batch.token_ids,
                teacher_index=index,
                mask=batch.mask,
                **({"reward_scale_fn": scale} if callable(scale) else {"reward_scale": scale}),
                old_logprobs=batch.old_logprobs,
                vocab_size=self._vocab_size,
                **own,
            )

            def compute(head: LinearHead) -> GOPDOutput:
                out = loss(head)
                if evaluates:
                    self._record_exact(head, teacher, ref, index, batch, out)
                return out

            out = self._at_head(student, self._hidden(student, batch) if hidden is None else hidden, compute)
            self._name_misfits(out, teacher, ref, index, batch)
            return out

    @torch.no_grad()
    def _record_exact(
        self,
        student: LinearHead,
        teacher: Frozen | list[Frozen] | None,
        ref: Frozen | None,
        index: Tensor | None,
        batch: Batch,
        out: GOPDOutput,
    ) -> None:
        """In an evaluation: the exact KLs to teacher and reference, whatever estimator and lambda the loss has."""
        exact = partial(
            gopd_loss,
            token_ids=batch.token_ids,
            mask=batch.mask,
            estimator="full",
            reward_scale=1.0,
            vocab_size=self._vocab_size,
            chunk_size=self.args.chunk_size,
            backend=self.args.backend,
        )
        found: dict[str, Tensor] = {}
        whole_ref = ref if ref is not None and _has_vocabulary(ref) else None
        if teacher is not None and all(map(_has_vocabulary, teacher if isinstance(teacher, list) else [teacher])):
            given: dict[str, Any] = {} if whole_ref is None else {"ref": whole_ref, "score_cancelled": True}
            metrics = exact(student, teacher=teacher, teacher_index=index, **given).metrics()
            found = dict(zip(metrics._names, metrics.sums, strict=True))
        if whole_ref is not None:
            metrics = exact(student, teacher=whole_ref).metrics()
            found["kl_ref"] = metrics.sums[metrics._names.index("kl_teacher")]
        own = set(out.metrics()._names)
        added = {name: sums for name, sums in found.items() if name in _EXACT and name not in own}
        if added:
            self._gopd_metrics["eval"].append(("", Metrics(tuple(added), torch.stack(list(added.values())))))

    @torch.no_grad()
    def _likeliest(self, student: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
        """(B, K, k) likeliest tokens of the student, -1 where the mask is 0."""
        chosen = {name: getattr(self.args, name) for name in ("k", "chunk_size", "backend")}
        ids, _ = self._at_head(
            student, hidden.detach(), partial(token_topk, mask=batch.mask, vocab_size=self._vocab_size, **chosen)
        )
        return ids

    # ----------------------------------------------------------------------------------------- what other models read

    def _add_readings(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> None:
        """Add to a batch what models read that have prompts, or tokenizers, of their own."""
        answers = list(zip(output["completion_ids"], output["completion_mask"], strict=True))

        def answer(i: int) -> str:
            ids, mask = answers[i]
            return str(cast("Any", self)._tokenizer.decode(ids[mask.bool()], skip_special_tokens=True))

        prompts = {
            role: [prompt.of(row, partial(answer, i)) for i, row in enumerate(inputs)]
            for role, prompt in self._prompts.items()
        }
        for role, own in prompts.items():
            output.update(flat_prompt(role, self._prompt_ids(role, own, Batch.from_trl(output), output)))
        if self._cross.pairs:
            self._align(inputs, prompts, output)

    def _prompt_ids(self, role: str, prompts: list[Any], batch: Batch, output: dict[str, Any]) -> PromptIds:
        """Prompts as the student's tokenizer and chat template encode them, padded on the left.

        A model with a tokenizer of its own does not read these: its prompts may be no prompts for the student's.
        """
        ids = [row[mask.bool()].cpu() for row, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]
        trainer = cast("Any", self)
        for frozen in self._frozen:
            if frozen.role != role or frozen.pair is not None:
                continue
            for i in frozen.rows_of(batch).nonzero()[:, 0].tolist():
                found, *_ = trainer._tokenize_prompts([prompts[i]])  # one by one: texts and messages may be mixed
                if not len(found[0]):
                    raise ValueError(f"{self._prompts[role].name} gives a prompt without tokens: {prompts[i]!r}")
                ids[i] = torch.tensor(found[0])
        device = batch.token_ids.device
        multiple = getattr(self, "pad_to_multiple_of", None) or 1
        padding = {"padding_side": "left", "pad_to_multiple_of": multiple}
        masks = [torch.ones_like(x) for x in ids]
        return PromptIds(
            pad(ids, padding_value=trainer._tokenizer.pad_token_id, **padding).to(device),
            pad(masks, padding_value=0, **padding).to(device),
            torch.tensor([multiple * math.ceil(len(x) / multiple) for x in ids]),
        )

    def _align(self, inputs: list[dict[str, Any]], prompts: dict[str, list[Any]], output: dict[str, Any]) -> None:
        """Add to a batch what models with a tokenizer of their own read of it, and mask what they cannot score."""
        batch = Batch.from_trl(output)
        scored = {frozen.name: frozen.rows_of(batch) for frozen in self._frozen}
        own = [row["prompt"] for row in inputs]
        read = {frozen.name: prompts.get(frozen.role, own) for frozen in self._frozen}
        aligned, mask = self._cross.align(read, batch.token_ids, batch.mask, scored)
        output.update(flat(aligned, mask))
        nbytes = next(iter(aligned.values())).nbytes
        for one in aligned.values():
            nbytes = torch.maximum(nbytes, one.nbytes)
        counts = [mask.sum(), batch.mask.sum(), (mask * nbytes).sum(), (batch.mask * nbytes).sum()]
        tokens, of, size, of_size = self.accelerator.reduce(torch.stack(counts).double(), reduction="sum").tolist()
        output["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["gopd/aligned_tokens"].append(tokens / max(of, 1))
        metrics["gopd/aligned_bytes"].append(size / max(of_size, 1))

    # --------------------------------------------------------------------------------------------- the dataset's routes

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = [self.args.route_column, *(prompt.column for prompt in self._prompts.values())]
        self._signature_columns += [x for x in columns if x is not None and x not in self._signature_columns]

    def _routes_in(self, examples: list[dict[str, Any]]) -> Tensor:
        """(B,) index of each prompt's teacher."""
        column = self.args.route_column
        for example in examples:
            if column not in example:
                raise ValueError(f"a prompt has no column {column!r} (route_column), only {', '.join(example)}")
            require_route(self._routes, f"column {column!r} of the dataset", example[column])
        return torch.tensor([self._routes[example[column]] for example in examples])
