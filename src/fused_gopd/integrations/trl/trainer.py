"""TRL's distillation trainer with the G-OPD loss."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed
from trl import DistillationTrainer
from trl.trainer.utils import RepeatSampler

from ... import distributed, token_logprobs
from ...token_stats import AdvantageFn, RewardScaleFn
from ..modules import evaluation, without_dropout
from .batch import Batch
from .config import GOPDConfig, resolve_config
from .frozen import Given, Model, PromptFn
from .models import ScoringMixin
from .rollouts import COMPLETION, RecordedEngine, Turns, sampler_logprobs, samples, token_ids_of


class GOPDTrainer(ScoringMixin, DistillationTrainer):  # type: ignore[misc]
    """TRL's ``DistillationTrainer`` with the G-OPD loss.

    The student samples, teachers and reference score, and the loss is computed from the hidden states of all models.
    The gradients are those of :func:`fused_gopd.gopd_loss` over the tokens of all ranks and accumulated batches.
    Generation, logging, checkpoints and everything else around the loss are TRL's.

    Args:
        model: the student: a model, a PEFT model, or a path.
        teacher: a model, its path, ``"adapter:PATH"`` (the base of a student with a PEFT adapter, under another one,
            which is all that it adds in memory), ``"student"`` (the student as the trainer gets it, frozen: a copy of
            what is trained; ``args.teacher_sync_steps`` and ``args.teacher_ema`` have it follow the student),
            ``"base"`` (the student without its PEFT adapter, no copy), or a scorer, a function ``(input_ids,
            attention_mask, completion_mask)`` that returns :class:`fused_gopd.TokenLogProbs` or
            :class:`fused_gopd.TopKLogProbs` of the
            completions' shape (B, K), or a :class:`fused_gopd.LogLinear` or :class:`fused_gopd.Mixture` of
            TokenLogProbs; or a dict from route to one of these, where ``args.route_column`` names the route of each
            prompt. A teacher only runs on the prompts that are routed to it.
        args: a :class:`GOPDConfig`.
        train_dataset, eval_dataset, processing_class, callbacks, optimizers, quantization_config, peft_config, tools:
            as in TRL.
        ref_model: the reference, likewise; ``"student"`` and ``"base"`` are the student before training.
            Needed for lambda other than 1; it is not run while lambda is 1.
        reward_scale_fn: lambda of an optimizer step, ``step -> float``, in place of ``args.reward_scale``; called with
            the number of completed steps. For a lambda of each token it returns a function of
            :class:`fused_gopd.TokenStats`, the ``reward_scale_fn`` of :func:`fused_gopd.gopd_loss`.
        advantage_fn: of ``estimator="sampled"``, see :func:`fused_gopd.gopd_loss`.
        teacher_prompt: what teachers read in place of the student's prompt: a function of a row of the dataset (a dict,
            with the student's ``prompt`` in it) that returns a text or a list of messages, or a dict from route to such
            functions. A function that needs a second argument gets the answer that is scored, a text. The completions
            that are scored are the student's own. ``args.teacher_prompt_column`` names a column instead.
        ref_prompt: what the reference reads, likewise.
        teacher_processing_class: the teacher's tokenizer, to be compared with the student's, or a dict from route to
            tokenizer. By default the one that is saved with the teacher, or a scorer's attribute ``tokenizer``. Another
            one than the student's needs ``args.cross_tokenizer``.

    Logs TRL's metrics, and means over all tokens since the last log: ``gopd/reward`` (the implicit reward log q -
    log r), ``gopd/kl_target``, ``gopd/kl_teacher_k3``, ``gopd/kl_ref_k3``, ``gopd/advantage``, ``gopd/clip_fraction``
    and the others of :class:`fused_gopd.Metrics`, and ``gopd/reward_scale``. With vLLM also ``gopd/sampler_kl``, the
    KL of the engine's policy to the student's, ``gopd/importance_max`` and ``gopd/staleness``, the optimizer steps that
    the engine's weights are old; with ``lmbda`` below 1 ``gopd/on_policy``, the share of sampled batches.
    Of the seconds of an optimizer step, TRL's ``step_time``, those that sampling and scoring took
    (``gopd/sample_seconds``, ``gopd/score_seconds``), and the tokens of all ranks that were trained on in each second
    (``gopd/tokens_per_second``).

    A callback with a method ``on_phase(args, state, control, phase=phase)`` is told what the trainer does: ``load``,
    ``sample``, ``score`` or ``step``, how far it is, and its tokens per second. The progress bar of transformers shows
    it.

    An evaluation of ``eval_dataset`` samples with the same random numbers each time, and leaves those of the training
    alone. It also logs the exact ``eval_gopd/kl_teacher`` and ``eval_gopd/kl_ref`` of models whose heads are here, and
    the reward, whatever estimator and lambda the training has. For that a reference is loaded even if lambda is 1.

    ``args.report_to="gopd-html"``, also in a list with others, writes ``report.html`` into ``output_dir``: the metrics
    as curves, and answers with the log-probs and the advantage of each token.

    Raises:
        TypeError, ValueError: before the student is loaded, or at the latest before the first step, naming the
            argument, what was expected and what was found.
    """

    _evaluates_exactly = True
    _tag_names = ["trl", "gopd"]  # noqa: RUF012
    _name = "G-OPD"
    _paper = {  # noqa: RUF012
        "title": "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
        "id": "2602.12125",
        "citation": textwrap.dedent("""\
            @article{yang2026learning,
                title   = {{Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation}},
                author  = {Wenkai Yang and Weijie Liu and Ruobing Xie and Kai Yang and Saiyong Yang and Yankai Lin},
                year    = 2026,
                journal = {arXiv preprint arXiv:2602.12125}
            }"""),
    }

    vllm_generation: Any

    def __init__(
        self,
        model: str | nn.Module,
        teacher: Model | Mapping[Any, Model] | None = None,
        args: GOPDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        ref_model: Model | None = None,
        reward_scale_fn: Callable[[int], float | RewardScaleFn] | None = None,
        advantage_fn: AdvantageFn | None = None,
        teacher_prompt: PromptFn | Mapping[Any, PromptFn] | None = None,
        ref_prompt: PromptFn | Mapping[Any, PromptFn] | None = None,
        teacher_processing_class: Any = None,
        **trainer_arguments: Any,
    ) -> None:
        if "teacher_model" in trainer_arguments:
            raise TypeError("GOPDTrainer has no argument teacher_model: it is called teacher, and may be a dict")
        args = resolve_config(GOPDConfig, args, model, "GOPD")
        given = Given(
            teacher=teacher,
            ref_model=ref_model,
            reward_scale_fn=reward_scale_fn,
            advantage_fn=advantage_fn,
            teacher_prompt=teacher_prompt,
            ref_prompt=ref_prompt,
            teacher_processing_class=teacher_processing_class,
        )
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        with self._constructing(model, args, given, datasets, trainer_arguments.get("peft_config")):
            self.num_iterations = args.num_iterations
            _check_data(args, train_dataset, trainer_arguments.get("tools"))
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **trainer_arguments,
            )
        self._rollout_options = args._rollout_options
        self._turns: Turns = {}  # of the engine, for this batch
        self._given: list[tuple[Any, Any]] | None = None  # prompts and completions of the dataset, for this batch
        if self.use_vllm:
            self.vllm_generation.logprobs = 0  # those of the sampled tokens; TRL asks for none

    # --------------------------------------------------------------------------------------------------- completions

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.args.lmbda < 1 and COMPLETION not in self._signature_columns:
            self._signature_columns.append(COMPLETION)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **options: Any) -> Any:
        if self._given is not None:
            return self._tokenize_completions(prompt_ids, self._given)
        engine = getattr(self, "vllm_generation", None)
        if engine is not None:
            self.vllm_generation = RecordedEngine(engine, self._turns, required=bool(self._rollout_options))
        try:
            with evaluation(self.model), self._sampling() as phase:  # without dropout, as it is scored
                completions = super()._generate_single_turn(prompt_ids, *args, **options)
                phase.tokens_at_end = sum(map(len, completions))
        finally:
            if engine is not None:
                self.vllm_generation = engine
        if not self.tools and not all(len(completion) for completion in completions):
            empty = [i for i, completion in enumerate(completions) if not len(completion)]
            raise ValueError(
                f"completions {empty} of {len(completions)} are empty: an engine must return one token at least, the "
                "end of sequence if nothing else; check its limits on prompt and completion length"
            )
        return completions

    def _tokenize_completions(self, prompt_ids: list[list[int]], given: list[tuple[Any, Any]]) -> list[list[int]]:
        """Token ids of completions of the dataset, given as (prompt, completion)."""
        template = self.processing_class.apply_chat_template
        options = {"chat_template": self.chat_template, **self.chat_template_kwargs}
        return [
            token_ids_of(
                prompt,
                completion,
                ids,
                tokenizer=self._tokenizer,
                render=partial(template, tokenize=False, **options),
                end_ids=self.eos_token_ids,
                longest=self.max_completion_length,
            )
            for ids, (prompt, completion) in zip(prompt_ids, given, strict=True)
        ]

    def _completions_in(self, inputs: list[dict[str, Any]]) -> list[tuple[Any, Any]] | None:
        """Prompts and completions of the dataset for a batch, or None where it is sampled, as in evaluation."""
        if self.args.lmbda == 1 or not self.model.training:
            return None
        sampled = samples(self.args.seed, self.state.global_step // self.num_iterations, self.args.lmbda)
        if sampled:
            return None
        for row in inputs:
            if row.get(COMPLETION) is None:
                raise ValueError(
                    f"lmbda={self.args.lmbda} needs a column {COMPLETION!r}, and a row has none, or None in it: it has "
                    f"{', '.join(row)}"
                )
            if row.get("image") is not None or row.get("images"):
                raise ValueError(f"lmbda={self.args.lmbda} is for texts, and a row has images")
        return [(row["prompt"], row[COMPLETION]) for row in inputs]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._turns.clear()
        given = self._given = self._completions_in(inputs)
        try:
            output = cast("dict[str, Any]", super()._generate_and_score_completions(inputs))
        finally:
            self._given = None
        if self.args.route_column is not None:
            output["teacher_index"] = self._routes_in(inputs)
        self._add_readings(inputs, output)
        batch = Batch.from_trl(output)
        self._check_positions(batch)
        # in the whole generation batch, as num_items_in_batch
        output["num_sequences"] = self.accelerator.gather(batch.mask.any(dim=1).sum()).sum()
        if self.args.lmbda < 1 and self.model.training:
            output["sampled"] = torch.tensor(given is None)
        if self.args.estimator == "sampled" and (self.num_iterations > 1 or self._cross.pairs):
            output["old_logprobs"] = self._logprobs(batch)
        if given is not None:
            if self.args.sft_weight:
                output["sft_labels"] = batch.token_ids.masked_fill(batch.mask == 0, -100)
            return output
        if self._turns:
            output["rollout_logprobs"] = self._without_gaps(sampler_logprobs(self._turns, output), batch, output)
        if self.use_vllm or self.num_iterations > 1:
            output["sampler_step"] = torch.tensor(self._last_loaded_step if self.use_vllm else self.state.global_step)
        return output

    def _without_gaps(self, logprobs: Tensor, batch: Batch, output: dict[str, Any]) -> Tensor:
        """The engine's log-probs, with the student's own where it gave none: their importance weight is 1."""
        gaps = logprobs.isnan()
        if not bool(self.accelerator.gather(gaps.any()).any()):
            return logprobs
        own = output["old_logprobs"] if "old_logprobs" in output else self._logprobs(batch)
        return torch.where(gaps, own.to(logprobs.dtype), logprobs)

    @torch.no_grad()
    def _logprobs(self, batch: Batch) -> Tensor:
        """(B, K) log-probs of the completions under the current student."""
        student = self.accelerator.unwrap_model(self.model_wrapped)

        def logprobs(part: Batch) -> Tensor:
            options = {"chunk_size": self.args.chunk_size, "backend": self.args.backend}
            score = partial(token_logprobs, token_ids=part.token_ids, mask=part.mask, vocab_size=self._vocab_size)
            found = self._at_head(student, self._hidden(student, part), partial(score, **options))
            return cast("Tensor", found)

        with self.accelerator.autocast():
            parts = batch.split(self.args.per_device_train_batch_size)
            return torch.cat([distributed.in_forward(self.model_wrapped, partial(logprobs, part)) for part in parts])

    # ---------------------------------------------------------------------------- several steps on the same completions

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        own = super()._get_train_sampler(dataset)
        return _EpochSampler(
            data_source=own.data_source,
            mini_repeat_count=own.mini_repeat_count,
            batch_size=own.batch_size,
            repeat_count=own.repeat_count * self.num_iterations,
            shuffle=own.shuffle,
            seed=own.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # decided by the step, which checkpoints save, so that a run can be resumed between the iterations
        if self.model.training and self._buffered_inputs is not None and self.state.global_step % self.num_iterations:
            return self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        return super()._prepare_inputs(generation_batch)

    # ---------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """TRL's, with the same random numbers in each evaluation; those of the training go on as if there were none."""
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        with torch.random.fork_rng():
            set_seed(self.args.seed + self.accelerator.process_index)  # of each rank, as TRL does before the training
            try:
                return super().evaluate(*args, **options)
            finally:
                random.setstate(python)
                np.random.set_state(numpy)  # noqa: NPY002

    # ---------------------------------------------------------------------------------------------------------- loss

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        normalizer = num_items_in_batch
        if normalizer is not None and self.args.reduction != "token-mean":
            normalizer = inputs["num_sequences"].clamp(min=1) / self.accelerator.num_processes
        batch = Batch.from_trl(inputs)
        # of two policies; with dropout it would be one of two random masks
        ratio = batch.old_logprobs is not None
        options: dict[str, Any] = {}
        if batch.rollout_logprobs is not None and self._rollout_options:
            options = {"rollout_logprobs": batch.rollout_logprobs, **self._rollout_options}
        if batch.sft_labels is not None:
            options |= {"sft_labels": batch.sft_labels, "sft_weight": self.args.sft_weight}
            if self._cross.pairs:  # labels that are no tokens of the teacher's count, too
                options["sft_temperature"] = self.temperature
        with without_dropout(unwrapped_student) if ratio else nullcontext():
            out = self._loss(unwrapped_student, batch, normalizer=normalizer, **options)
        self._record(out, batch)
        if "sampled" in inputs:  # in each step on the batch
            self._metrics["train"]["gopd/on_policy"].append(float(inputs["sampled"]))
        self._record_sampler(out, batch, inputs.get("sampler_step"))
        self._count_in_step(batch.mask)
        return out.loss, out.entropy.sum(), batch.mask.sum()


def _check_data(args: GOPDConfig, dataset: Any, tools: Any) -> None:
    """Raise for a dataset, or tools, that options have no place for."""
    if args.cross_tokenizer and tools:
        raise ValueError(
            "cross_tokenizer=True has no place for tools: their results are written with the student's template into "
            "the completions"
        )
    if args.num_iterations > 1 and not hasattr(dataset, "__len__"):
        raise ValueError(
            f"num_iterations={args.num_iterations} needs a train_dataset of known length (a datasets.Dataset), got "
            f"{type(dataset).__name__}"
        )
    if args.lmbda < 1 and tools:
        raise ValueError(f"lmbda={args.lmbda} has no place for tools: a completion of the dataset would call them anew")
    columns = getattr(dataset, "column_names", None)  # None of a stream whose columns are not known
    if args.lmbda < 1 and columns is not None and COMPLETION not in columns:
        raise ValueError(
            f"lmbda={args.lmbda} needs a column {COMPLETION!r} in train_dataset, which has only {', '.join(columns)}"
        )


class _EpochSampler(RepeatSampler):  # type: ignore[misc]
    """TRL's sampler with an order that depends on the epoch alone, so that a resumed run continues with it.

    TRL's own draws one permutation per epoch from a generator, and repeats the first when a later epoch is resumed.
    """

    def __init__(self, *, epoch: Callable[[], int], **options: Any) -> None:
        super().__init__(**options)
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self._epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        return cast("Iterator[int]", super().__iter__())
