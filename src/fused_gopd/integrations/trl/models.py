"""The mixin of both trainers: teachers, reference, lambda and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import get_logger
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path, maybe_gather_lm_head_ctx

from ... import Metrics, distributed, gopd_loss, token_topk
from ...heads import LinearHead, Logits, TokenLogProbs, TopKLogProbs
from ...hooks import qualified_name
from ...output import GOPDOutput
from ...targets import Frozen, LogLinear, Mixture
from ...token_stats import AdvantageFn, RewardScaleFn
from ...values import require_number
from .. import misfit
from ..adapters import require_adapter, with_adapter
from ..cache import StoredStates
from ..hub import adapter_path, require_model
from ..modules import require_separate
from ..tokenizers.pairs import texts_of
from ..transformers import head_of, last_hidden_state
from ..transformers.states import require_head
from . import card
from .batch import Batch, flat, spread
from .checks import (
    Model,
    check_kind,
    check_routes,
    check_scored_tokens,
    check_tokenizers,
    check_vocabulary,
    check_weights,
    dry_run,
    find_tokenizer,
    head_of_scorer,
    named,
    open_cache,
    positions_of,
    require_route,
    routes_of,
    scores_students_tokens,
    takes_token_ids,
    teacher_name,
    tokenizer_of,
)
from .config import Options
from .cross import CrossTokenizer, as_batch

logger = get_logger(__name__)

# of so many prompts it is said how much two tokenizers have in common
_SHOWN_PROMPTS = 64
# metrics that TRL itself logs
_LOGGED = ("tokens", "loss", "entropy")
T = TypeVar("T")


def _trains_all(student: nn.Module, source: nn.Module, peft_config: Any) -> bool:
    """Whether training changes modules that the source shares with the student, as far as known before PEFT adapts it.

    PEFT freezes the parameters and puts adapters into some modules. Only a source that shares all modules certainly
    shares those too. Prompt tuning changes no module of the model.
    """
    if peft_config is None:
        return True
    whole = set(student.modules()) - {student} <= set(source.modules())  # without the root, which copy.copy replaces
    return whole and not getattr(peft_config, "is_prompt_learning", False)


def _require_separate(name: str, source: nn.Module, student: nn.Module) -> None:
    base = ', or, for a student with a PEFT adapter, "base"' if name == "ref_model" else ""
    require_separate(name, source, student, base)


@contextmanager
def _without_cast(head: Any) -> Iterator[bool]:
    """Restore the head's own forward. Yields whether GRPOTrainer had replaced it by one that computes in float32."""
    cast_to_fp32 = qualified_name(vars(head).get("forward")).startswith("trl.trainer.grpo_trainer.")
    replaced = vars(head).pop("forward") if cast_to_fp32 else None
    try:
        yield cast_to_fp32
    finally:
        if cast_to_fp32:
            head.forward = replaced


class ScoringMixin:
    """Adds teachers, reference, lambda and metrics to one of TRL's trainers."""

    accelerator: Any
    args: Any
    model: Any
    state: Any
    temperature: float
    generation_config: Any
    generation_kwargs: dict[str, Any]
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _metrics: Any
    _signature_columns: list[str]
    _tokenizer: PreTrainedTokenizerBase
    _is_vlm: bool
    warn: Callable[[str], None] = staticmethod(logger.warning)
    """Tells of a teacher or reference that cannot be the one that was meant."""

    # -------------------------------------------------------------------------------------------------- construction

    def _validate(
        self,
        student: str | nn.Module,
        peft_config: Any,
        args: Options,
        teacher: Model | Mapping[Any, Model],
        ref_model: Model | None,
        reward_scale_fn: Callable[[int], float | RewardScaleFn] | None,
        advantage_fn: AdvantageFn | None,
        datasets: dict[str, Any],
    ) -> None:
        """Raise for every error that can be found before the student is loaded."""
        routes = routes_of(teacher, args.route_column)
        teachers = named(routes)
        for name, model in teachers.items():
            check_kind(name, model, cast("Any", args).temperature)
        loaded = any(isinstance(x, str) and adapter_path(x) is None for x in routes.values())
        if getattr(args, "teacher_model_init_kwargs", None) and not loaded:
            raise ValueError("teacher_model_init_kwargs are for a teacher that is loaded: no teacher is a model's path")
        scale = f"reward_scale={args.reward_scale}"
        if args.reward_scale_end is not None:
            scale += f" to reward_scale_end={args.reward_scale_end}"
        if reward_scale_fn is not None and args._needs_reference:
            raise ValueError(f"reward_scale_fn is in the place of {scale}, which would be ignored: give one of the two")
        if ref_model is not None:
            check_kind("ref_model", ref_model, cast("Any", args).temperature)
        elif reward_scale_fn is not None or args._needs_reference or args._penalty is not None:
            what = scale if args._needs_reference else args._penalty
            raise ValueError(
                f"ref_model must be given for {'a reward_scale_fn' if reward_scale_fn is not None else what}: only "
                "reward_scale=1 without a KL penalty does without a reference. It is usually the student before "
                'training: pass its path, a copy of it, or, for a student with a PEFT adapter, "base"'
            )
        if isinstance(student, nn.Module):
            for name, source in {**teachers, "ref_model": ref_model}.items():
                if isinstance(source, nn.Module) and _trains_all(student, source, peft_config):
                    _require_separate(name, source, student)
        if args.route_column is not None:
            for name, dataset in datasets.items():
                check_routes(routes, args.route_column, name, dataset)
        self._options = args._loss_options()
        if advantage_fn is not None:
            self._options["advantage_fn"] = advantage_fn
        self._cache_logged: dict[str, int] = {}
        self._cache = open_cache(args, {**teachers, "ref_model": cast("Any", ref_model)})
        dry_run(self._options, routes, ref_model, cast("Any", args).device)
        self._asks_about_student = scores_students_tokens(self._options, teachers)
        if self._asks_about_student and getattr(args, "cross_tokenizer", False):
            raise ValueError(
                "support='student' names the student's tokens to a scorer, which has others with cross_tokenizer=True: "
                "use support='teacher'"
            )
        if self._asks_about_student:
            check_scored_tokens({**teachers, "ref_model": cast("Any", ref_model)}, self._options["k"])
        init, teacher_init = (getattr(args, f"{x}model_init_kwargs", None) for x in ("", "teacher_"))
        for name, source in {"model": student, **teachers, "ref_model": ref_model}.items():
            path = adapter_path(source)
            if path is not None and name != "model":
                require_model(name, path)
                require_adapter(name, path)
            elif isinstance(source, str) and (name, source) != ("ref_model", "base"):
                require_model(name, source, teacher_init if name in teachers else init)
        self._reward_scale_fn = reward_scale_fn
        self._card_sources = [(name, card.name_of(model)) for name, model in teachers.items()]
        reference = "none" if ref_model is None else "the base" if ref_model == "base" else card.name_of(ref_model)
        self._card_sources.append(("reference", reference))
        self._gopd_metrics: dict[str, list[Metrics]] = {"train": [], "eval": []}

    def _set_up_models(
        self, teacher: Model | Mapping[Any, Model], ref_model: Model | None, teacher_processing_class: Any
    ) -> None:
        """Load, check and prepare the frozen models, after the trainer's own construction."""
        routes = routes_of(teacher, self.args.route_column)
        if self._is_vlm and len(routes) > 1:
            raise ValueError("several teachers of multimodal prompts are not supported: give one teacher")
        self._routes = {route: i for i, route in enumerate(routes)}
        names = [teacher_name(route) for route in routes]
        if isinstance(teacher_processing_class, Mapping):
            for route in teacher_processing_class:
                require_route(routes, "teacher_processing_class", route)
            tokenizers = [teacher_processing_class.get(route) for route in routes]
        else:
            tokenizers = [teacher_processing_class] * len(routes)
        prepared: dict[int, Any] = {}
        if self._is_vlm and getattr(self.args, "cross_tokenizer", False):
            raise ValueError("cross_tokenizer=True is for texts, and the student reads images, too")
        self._stored: dict[int | str, StoredStates] = {}  # by the id of a model, or "base"
        student = cast("Any", self.model)
        with _without_cast(student.get_output_embeddings()):
            require_head(student)
        sizes = [self._vocabulary(self.model)]
        credit = getattr(self.args, "span_credit", None) or "spread"
        self._cross = CrossTokenizer(sizes[0], self._options, credit)
        self._positions = {"the student": positions_of(self.model.config)}
        init = getattr(self.args, "teacher_model_init_kwargs", None)
        self._teachers: list[Any] = [None] * len(names)
        if self._differs_in_any_step_from(0):
            self._teachers = [
                self._frozen(name, source, init, tokenizer, prepared, sizes)
                for name, source, tokenizer in zip(names, routes.values(), tokenizers, strict=True)
            ]
        elif self.accelerator.is_main_process:
            logger.warning("reward_scale=0 has no use for the teacher: it is not loaded.")
        self._reference: Any = None
        if isinstance(ref_model, str) and ref_model == "base" and not hasattr(self.model, "disable_adapter"):
            raise ValueError(
                'ref_model="base" is the student without its PEFT adapter, and the student has none: pass '
                "peft_config, or the path or a copy of the student before training"
            )
        if ref_model is not None and not (self._differs_in_any_step_from(1) or self.args._penalty is not None):
            if self.accelerator.is_main_process:
                logger.warning("reward_scale=1 has no use for ref_model: it is not loaded.")
        elif isinstance(ref_model, str) and ref_model == "base":
            self._reference = "base"
            self._store("ref_model", "base", self.model)
        elif ref_model is not None:
            init = self.args.model_init_kwargs
            self._reference = self._frozen("ref_model", ref_model, init, None, prepared, sizes)
        # models that a first batch has not been compared with yet; those of another tokenizer score other tokens
        known = [*names, *(["ref_model"] if self._reference not in (None, "base") else [])]
        self._unchecked = set(known) - set(self._cross.pairs)
        self._vocab_size = min(sizes)
        self._sample_from_joint_vocabulary(sizes[0])

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **_: Any
    ) -> None:
        """Write this package's card instead of TRL's, unless there is another card, or one that was edited."""
        path = Path(self.args.output_dir) / "README.md"
        if not cast("Any", self).is_world_process_zero() or (
            path.exists() and not card.is_unchanged(path.read_text(encoding="utf-8"))
        ):
            return
        text = card.of_trainer(self, self._card_sources, model_name or path.parent.name, dataset_name)
        path.write_text(text, encoding="utf-8")

    def _frozen(
        self, name: str, source: Model, init: Any, tokenizer: Any, prepared: dict[int, Any], sizes: list[int]
    ) -> Any:
        """Load a teacher or reference, compare it with the student, and prepare it; scorers are returned unchanged."""
        if not isinstance(source, (str, nn.Module)):
            own = getattr(source, "tokenizer", None) if tokenizer is None else tokenizer_of(tokenizer)
            if isinstance(own, PreTrainedTokenizerBase):
                self._compare_tokenizers(name, own)
            elif name != "ref_model" and getattr(self.args, "cross_tokenizer", False):
                raise ValueError(
                    f"cross_tokenizer=True needs the tokenizer of {name}, a scorer: pass teacher_processing_class, or "
                    "give the scorer an attribute tokenizer"
                )
            head = head_of_scorer(source)
            if head is not None and name not in self._cross.pairs:
                check_vocabulary(name, head.vocab_size, sizes[0], self._tokenizer)
                sizes.append(head.vocab_size)
            return source
        if isinstance(source, nn.Module):
            _require_separate(name, source, self.accelerator.unwrap_model(self.model))
        if isinstance(source, nn.Module) and id(source) in prepared:
            before, prepared_model = prepared[id(source)]
            if before in self._cross.pairs:
                self._cross.pairs[name] = self._cross.pairs[before]
            self._positions[name] = self._positions[before]
            return prepared_model
        adapter = adapter_path(source)
        if adapter is not None:
            model = self._with_adapter(name, adapter)
        else:
            model = source if isinstance(source, nn.Module) else self._load(name, source, init)
        require_head(model)
        trust = {"trust_remote_code": getattr(self.args, "trust_remote_code", False)}
        found = tokenizer_of(tokenizer) if tokenizer is not None else find_tokenizer(adapter or source, model, **trust)
        if found is None and adapter is not None:
            found = self._tokenizer  # the base's
        if found is not None:
            self._compare_tokenizers(name, found)
        elif name != "ref_model" and getattr(self.args, "cross_tokenizer", False):
            raise ValueError(
                f"cross_tokenizer=True needs the tokenizer of {name}, which is not saved with it: pass "
                "teacher_processing_class, or save it in the model's folder"
            )
        elif name != "ref_model" and self.accelerator.is_main_process:
            logger.warning(
                f"The tokenizer of {name} is not known, so only the sizes of the vocabularies were compared. Pass "
                "teacher_processing_class to compare the tokens."
            )
        if name not in self._cross.pairs:
            size = self._vocabulary(model)
            check_vocabulary(name, size, sizes[0], self._tokenizer)
            sizes.append(size)
        self._positions[name] = positions_of(model.config)
        if self.is_deepspeed_enabled:
            model = prepare_deepspeed(model, self.accelerator)
        elif self.is_fsdp_enabled:
            # as GRPOTrainer does for its reference: accelerate neither shards nor moves models in evaluation mode
            model = prepare_fsdp(model, self.accelerator)
        else:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        prepared[id(source)] = name, model
        self._store(name, id(model), model)
        return model

    def _compare_tokenizers(self, name: str, other: Any) -> None:
        """Raise where a model's tokenizer is not the student's; with ``cross_tokenizer`` keep the pair, and say so."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        pair = check_tokenizers(
            name,
            self._tokenizer,
            other,
            cross_tokenizer=getattr(self.args, "cross_tokenizer", False),
            terminators=ends if isinstance(ends, list) else None if ends is None else [ends],
            chat_template_kwargs=getattr(self, "chat_template_kwargs", None),
        )
        if pair is None:
            return
        self._cross.pairs[name] = pair
        if self.accelerator.is_main_process:
            data = cast("Any", self).train_dataset
            prompts = data[:_SHOWN_PROMPTS]["prompt"] if hasattr(data, "__len__") else []
            logger.warning(pair.describe(texts_of(prompts)))

    def _with_adapter(self, name: str, path: str) -> nn.Module:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            sharding = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
            raise ValueError(
                f"{name} is an adapter on the student's base, whose parameters {sharding} gathers in the student's "
                "forward alone: pass the path of a whole model (merge_and_unload), or train without sharding"
            )
        return with_adapter(name, self.accelerator.unwrap_model(self.model), path)

    def _store(self, name: str, key: int | str, model: Any) -> None:
        """Have the cache keep the states of a model; of ``"base"`` those of the student without its adapter."""
        if self._cache is None:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "teacher_cache needs whole models on every rank: under FSDP and DeepSpeed all ranks run a model "
                "together, and some would find their sequences in the cache"
            )
        whole = self.accelerator.unwrap_model(model)
        try:
            self._stored[key] = StoredStates(self._cache, card.name_of(whole), whole, frozen=key == "base")
        except ValueError as error:
            raise ValueError(f"teacher_cache cannot tell {name} from other models: {error}") from None

    def _load(self, name: str, path: str, init: dict[str, Any] | None) -> nn.Module:
        options = dict(init or {})
        options.setdefault("trust_remote_code", getattr(self.args, "trust_remote_code", False))
        if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None  # as TRL does: "auto" would spread the model over the ranks' devices
        model, found = create_model_from_path(path, output_loading_info=True, **options)
        check_weights(f"{name} ({path})", found)
        return cast("nn.Module", model)

    @staticmethod
    def _vocabulary(model: Any) -> int:
        return int(model.config.get_text_config().vocab_size)

    def _sample_from_joint_vocabulary(self, student: int) -> None:
        """Exclude rows past the smallest vocabulary from sampling: they are padding (152064 against 151936)."""
        if student > self._vocab_size:
            padding = list(range(self._vocab_size, student))
            padding += self.generation_kwargs.get("suppress_tokens") or []
            self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = padding

    def _check_positions(self, batch: Batch) -> None:
        """Raise for a sequence longer than a model's positions, where its scores are meaningless. Needs a host sync."""
        limits = {name: positions for name, positions in self._positions.items() if positions is not None}
        read = {name: aligned.attention_mask for name, aligned in batch.aligned.items()}
        lengths = {name: int(read.get(name, batch.attention_mask).sum(dim=1).max()) for name in limits}
        for name, positions in limits.items():
            longest = lengths[name]
            if longest > positions:
                raise ValueError(
                    f"a prompt and its completion have {longest} tokens, and {name} has {positions} positions "
                    "(max_position_embeddings of its config): leave such prompts out, or lower max_completion_length"
                )

    # ------------------------------------------------------------------------------------------------------- scoring

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

    def _differs_in_any_step_from(self, scale: float) -> bool:
        """Whether lambda is another number in some step. A model that it cancels in all steps is not loaded."""
        ends = {self.args.reward_scale, self.args.reward_scale_end} - {None}
        return self._reward_scale_fn is not None or ends != {scale}

    def _hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, K, H) states that predict the completions. To be called inside the forward of the model's wrapper."""
        keep = batch.token_ids.shape[1]
        return last_hidden_state(model, batch.input_ids, batch.attention_mask, keep=keep, **batch.multimodal)

    def _frozen_states(
        self, key: int | str, model: Any, batch: Batch, gathered: ExitStack, run: Callable[[Batch], Tensor]
    ) -> LinearHead:
        """The head of a frozen model on its states: from the cache, or as far as they are not there from ``run``."""
        stored = self._stored.get(key)
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
        with _without_cast(embeddings) as cast_to_fp32:
            return self._head(model, hidden.float() if cast_to_fp32 else hidden)

    def _at_head(self, model: Any, hidden: Tensor, function: Callable[[LinearHead], T]) -> T:
        """Call ``function`` with the model's head, inside the head's forward: wrappers gather its weight there."""
        embeddings = model.get_output_embeddings()
        with _without_cast(embeddings) as cast_to_fp32:

            def at(hidden: Tensor) -> T:
                return function(self._head(model, hidden.float() if cast_to_fp32 else hidden))

            if not isinstance(embeddings, nn.Linear):  # an adapter layer of PEFT
                return at(hidden)
            return distributed.through_head(embeddings, hidden, lambda given: at(given.hidden))

    def _score(self, name: str, model: Any, batch: Batch, gathered: ExitStack) -> Frozen:
        """Score a batch with a frozen model or a scorer, at the student's tokens."""
        aligned = batch.aligned.get(name)
        if aligned is None:
            return self._score_own(name, model, batch, gathered)
        scored = self._score_own(name, model, as_batch(aligned), gathered)
        return self._cross.carry(name, scored, aligned, batch.old_logprobs)

    def _score_own(self, name: str, model: Any, batch: Batch, gathered: ExitStack) -> Frozen:
        """Score the tokens of a batch with the model that they belong to."""
        if isinstance(model, nn.Module):
            unwrapped = self.accelerator.unwrap_model(model)

            def run(part: Batch) -> Tensor:
                return distributed.in_forward(model, partial(self._hidden, unwrapped, part))

            return self._frozen_states(id(model), unwrapped, batch, gathered, run)
        asked = () if batch.asked_ids is None or not takes_token_ids(model) else (batch.asked_ids,)
        scored = model(batch.input_ids, batch.attention_mask, batch.completion_mask, *asked)
        if not isinstance(scored, (TokenLogProbs, TopKLogProbs, LinearHead, Logits, LogLinear, Mixture)):
            raise TypeError(
                f"the scorer {name} must return fused_gopd.TokenLogProbs, TopKLogProbs or LinearHead, got "
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
            return self._score("teacher", self._teachers[0], batch, gathered), None
        # ranks that share a model must all call it; without a sequence of its route, a rank scores one and ignores it
        shared = self.accelerator.num_processes > 1
        used, sources = [], []
        for i, (route, model) in enumerate(zip(self._routes, self._teachers, strict=True)):
            rows = (index == i).nonzero()[:, 0]
            if len(rows) or (shared and isinstance(model, nn.Module)):
                part = batch.take(rows if len(rows) else torch.zeros(1, dtype=torch.int64))
                used.append(i)
                source = self._score(teacher_name(route), model, part, gathered)
                sources.append(spread(source, rows, len(index)))
        return sources, torch.bucketize(index, torch.tensor(used)).to(batch.token_ids.device)

    def _loss(self, student: nn.Module, batch: Batch, **options: Any) -> GOPDOutput:
        """The loss of a batch. To be called inside the forward of the student's wrapper."""
        scale = self.reward_scale
        needs_ref = scale != 1 or self.args._penalty is not None
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
            with torch.no_grad():
                # models that lambda cancels are not run
                if scale != 0:
                    teacher, index = self._score_teachers(batch, gathered)
                if needs_ref and self._reference == "base":
                    with cast("Any", student).disable_adapter():
                        run = partial(self._hidden, student)
                        ref = self._frozen_states("base", student, batch, gathered, run)
                elif needs_ref:
                    ref = self._score("ref_model", self._reference, batch, gathered)
            loss = partial(
                gopd_loss,
                teacher=teacher,
                ref=ref,
                token_ids=batch.token_ids,
                teacher_index=index,
                mask=batch.mask,
                **({"reward_scale_fn": scale} if callable(scale) else {"reward_scale": scale}),
                old_logprobs=batch.old_logprobs,
                vocab_size=self._vocab_size,
                **own,
            )
            out = self._at_head(student, self._hidden(student, batch) if hidden is None else hidden, loss)
            self._name_misfits(out, teacher, ref, index, batch)
            return out

    def _name_misfits(
        self, out: GOPDOutput, teacher: Frozen | list[Frozen] | None, ref: Frozen | None, index: Any, batch: Batch
    ) -> None:
        """Warn once of a teacher or reference that cannot be the one that was meant, by the first tokens it scored."""
        if not self._unchecked or out.student_logprobs is None or batch.mask.numel() < misfit.LEAST_TOKENS:
            return
        every = torch.ones(len(batch.token_ids), dtype=torch.bool)
        scored: list[tuple[str, Any, Tensor | None, Tensor]] = [("ref_model", ref, out.ref_logprobs, every)]
        for route, i in self._routes.items():
            rows = every if batch.teacher_index is None else batch.teacher_index == i
            if teacher is not None and bool(rows.any()):
                source = teacher[int(index[rows][0])] if isinstance(teacher, list) else teacher
                scored.append((teacher_name(route), source, out.teacher_logprobs, rows))
        for name, source, logprobs, rows in scored:
            if name not in self._unchecked or logprobs is None:
                continue
            mask = batch.mask.bool() & rows.to(batch.mask.device)[:, None]
            if int(mask.sum()) < misfit.LEAST_TOKENS:
                continue
            self._unchecked.remove(name)
            shifted = misfit.shifts_of(source, batch.token_ids, self._vocab_size)
            found = misfit.misfit_of(logprobs, out.student_logprobs, mask, self._vocab_size, shifted)
            if found is not None and self.accelerator.is_main_process:
                self.warn(f"{name} {found}")

    @torch.no_grad()
    def _likeliest(self, student: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
        """(B, K, k) likeliest tokens of the student, -1 where the mask is 0."""
        chosen = {name: getattr(self.args, name) for name in ("k", "chunk_size", "backend")}
        ids, _ = self._at_head(
            student, hidden.detach(), partial(token_topk, mask=batch.mask, vocab_size=self._vocab_size, **chosen)
        )
        return ids

    # ----------------------------------------------------------------------------------------- tokenizers of their own

    def _align(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> None:
        """Add to a batch what models with a tokenizer of their own read of it, and mask what they cannot score."""
        batch = Batch.from_trl(output)
        everywhere = torch.ones(len(inputs), dtype=torch.bool)
        index = everywhere.long() - 1 if batch.teacher_index is None else batch.teacher_index
        scored = {teacher_name(route): index == i for route, i in self._routes.items()}
        scored["ref_model"] = everywhere
        prompts = [example["prompt"] for example in inputs]
        aligned, mask = self._cross.align(prompts, batch.token_ids, batch.mask, scored)
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
        column = self.args.route_column
        if column is not None and column not in self._signature_columns:
            self._signature_columns.append(column)

    def _routes_in(self, examples: list[dict[str, Any]]) -> Tensor:
        """(B,) index of each prompt's teacher."""
        column = self.args.route_column
        for example in examples:
            if column not in example:
                raise ValueError(f"a prompt has no column {column!r} (route_column), only {', '.join(example)}")
            require_route(self._routes, f"column {column!r} of the dataset", example[column])
        return torch.tensor([self._routes[example[column]] for example in examples])

    # ------------------------------------------------------------------------------------------------------- metrics

    def _record(self, out: GOPDOutput) -> None:
        """Keep the metrics of a batch until the next log."""
        mode = "train" if self.model.training else "eval"
        self._gopd_metrics[mode].append(out.metrics())
        if not isinstance(out.reward_scale, Tensor):  # of one per token the mean is among the metrics
            self._metrics[mode]["gopd/reward_scale"].append(out.reward_scale)

    def _log_gopd_metrics(self) -> None:
        """Add the means over all tokens of all ranks since the last log to TRL's metrics, with one host sync."""
        mode = "train" if self.model.training else "eval"
        if not self._gopd_metrics[mode]:
            return
        sums = _sums_by_name(self._gopd_metrics[mode])
        total = Metrics(tuple(sums), self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum"))
        self._gopd_metrics[mode].clear()
        if self._cache is not None:
            now = self._cache.stats()
            hits, misses = (now[name] - self._cache_logged.get(name, 0) for name in ("hits", "misses"))
            self._cache_logged = now
            if hits + misses:
                self._metrics[mode]["gopd/cache_hits"].append(hits / (hits + misses))
        for name, value in total.to_dict().items():
            if name not in _LOGGED:
                self._metrics[mode][f"gopd/{name}"].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._log_gopd_metrics()
        super().log(logs, start_time)  # type: ignore[misc]


def _sums_by_name(metrics: list[Metrics]) -> dict[str, Tensor]:
    """Sums and counts by name. Steps in which lambda cancels a model lack the metrics that need it."""
    total: dict[str, Tensor] = {}
    for each in metrics:
        for name, sums in zip(each._names, each.sums, strict=True):
            total[name] = total[name] + sums if name in total else sums
    return total
