"""The models of both trainers: the checks before anything is loaded, then loading, comparing and preparing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast  # type: ignore[import-untyped]
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils.logging import get_logger
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path

from ...hooks import qualified_name
from ..adapters import require_adapter, with_adapter
from ..cache import StoredStates, TeacherCache
from ..hub import BASE, adapter_path, is_own, require_model
from ..modules import require_separate
from ..tokenizers import TokenizerPair
from ..tokenizers.pairs import texts_of
from ..transformers.states import require_head
from . import card
from .checks import (
    check_column,
    check_kind,
    check_reference,
    check_routes,
    check_scored_tokens,
    check_student_as_teacher,
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
    scores_students_tokens,
    tokenizer_of,
)
from .config import Options
from .cross import CrossTokenizer
from .frozen import REF, REF_MODEL, TEACHER, FrozenModel, Given, Model, teacher_name
from .phases import PhasesMixin
from .prompts import OtherPrompt
from .student import StudentCopy, load_copies, save_copies
from .watch import ends_of, other_ends

logger = get_logger(__name__)

# of so many prompts it is said how much two tokenizers have in common
_SHOWN_PROMPTS = 64


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
    require_separate(name, source, student, ', or "student", which makes that copy')


@contextmanager
def without_cast(head: Any) -> Iterator[bool]:
    """Restore the head's own forward. Yields whether GRPOTrainer had replaced it by one that computes in float32."""
    cast_to_fp32 = qualified_name(vars(head).get("forward")).startswith("trl.trainer.grpo_trainer.")
    replaced = vars(head).pop("forward") if cast_to_fp32 else None
    try:
        yield cast_to_fp32
    finally:
        if cast_to_fp32:
            head.forward = replaced


class _Follow(TrainerCallback):
    """Has the copies of the student follow it after each optimizer step, before the step's checkpoint is saved."""

    def __init__(self, copies: Mapping[str, StudentCopy], accelerator: Any) -> None:
        self._copies, self._accelerator = copies, accelerator

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for copied in self._copies.values():
            copied.follow(self._accelerator.unwrap_model(model), state.global_step)


class LoadingMixin(PhasesMixin):
    """Checks the arguments of a trainer, and sets up teachers, reference and cache."""

    accelerator: Any
    args: Any
    model: Any
    eos_token_ids: list[int]
    generation_config: Any
    generation_kwargs: dict[str, Any]
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _tokenizer: PreTrainedTokenizerBase
    _is_vlm: bool
    _cache: TeacherCache | None
    _card_sources: list[tuple[str, str]]
    _unchecked: set[str]
    _vocab_size: int
    _warn: Callable[[str], None]
    _evaluates_exactly = False
    """Whether evaluations have the exact KLs to all models that are given."""

    @property
    def _cross_tokenizer(self) -> bool:
        """Whether models may have tokenizers of their own, an option of GOPDTrainer."""
        return bool(getattr(self.args, "cross_tokenizer", False))

    @property
    def _sharding(self) -> str | None:
        """What shards the student, if anything does."""
        return "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else None

    def _validate(
        self, student: str | nn.Module, args: Options, given: Given, datasets: Mapping[str, Any], peft_config: Any
    ) -> None:
        """Raise for every error that can be found before the student is loaded."""
        ref_model = given.ref_model
        routes = given.routes(args.route_column)
        teachers = named(routes)
        models = {**teachers, REF_MODEL: ref_model}
        for name, model in teachers.items():
            check_kind(name, model, cast("Any", args).temperature)
        loaded = any(isinstance(x, str) and adapter_path(x) is None and not is_own(x) for x in routes.values())
        if getattr(args, "teacher_model_init_kwargs", None) and not loaded:
            raise ValueError("teacher_model_init_kwargs are for a teacher that is loaded: no teacher is a model's path")
        check_reference(args, ref_model, has_function=given.reward_scale_fn is not None)
        if isinstance(student, nn.Module):
            for name, source in models.items():
                if isinstance(source, nn.Module) and _trains_all(student, source, peft_config):
                    _require_separate(name, source, student)
        if args.route_column is not None:
            for name, dataset in datasets.items():
                check_routes(routes, args.route_column, name, dataset)
        self._set_up_prompts(args, routes, given, datasets)
        other = self._prompts.get(TEACHER)
        alike = [teacher_name(route) for route in routes if other is None or not other.differs(route)]
        check_student_as_teacher(args, teachers, alike, given.reward_scale_fn is None and not args._needs_reference)
        self._options = args._loss_options()
        if given.advantage_fn is not None:
            self._options["advantage_fn"] = given.advantage_fn
        self._cache = open_cache(args, models)
        rollout = getattr(args, "_rollout_options", {})
        dry_run({**self._options, **rollout}, routes, ref_model, cast("Any", args).device)
        self._asks_about_student = scores_students_tokens(self._options, teachers)
        if self._asks_about_student and getattr(args, "cross_tokenizer", False):
            raise ValueError(
                "support='student' names the student's tokens to a scorer, which has others with cross_tokenizer=True: "
                "use support='teacher'"
            )
        if self._asks_about_student:
            check_scored_tokens(models, self._options["k"])
        init, teacher_init = (getattr(args, f"{x}model_init_kwargs", None) for x in ("", "teacher_"))
        for name, source in {"model": student, **models}.items():
            path = adapter_path(source)
            if path is not None and name != "model":
                require_model(name, path)
                require_adapter(name, path)
            elif isinstance(source, str) and (name == "model" or not is_own(source)):
                require_model(name, source, teacher_init if name in teachers else init)
        self._reward_scale_fn = given.reward_scale_fn
        self._card_sources = [(name, card.name_of(model, args._teacher_moves)) for name, model in teachers.items()]
        self._card_sources.append(("reference", "none" if ref_model is None else card.name_of(ref_model)))

    def _set_up_prompts(
        self, args: Options, routes: Mapping[Any, Model], given: Given, datasets: Mapping[str, Any]
    ) -> None:
        """Set up and check what teachers and reference read in place of the student's prompt."""
        own = {TEACHER: given.teacher_prompt, REF: given.ref_prompt}
        found = {
            role: OtherPrompt(role, prompt, getattr(args, f"{role}_prompt_column"), args.route_column, routes)
            for role, prompt in own.items()
        }
        self._prompts = {role: prompt for role, prompt in found.items() if prompt}
        if REF in self._prompts and given.ref_model is None:
            raise ValueError(f"{found[REF].argument} is what the reference reads, and no ref_model is given")
        for prompt in self._prompts.values():
            for name, dataset in datasets.items():
                if prompt.column is not None:
                    check_column(prompt.name, prompt.column, name, dataset)

    def _set_up_models(self, given: Given) -> None:
        """Load, check and prepare the frozen models, after the trainer's own construction."""
        self._show_phases()
        routes = given.routes(self.args.route_column)
        if self._is_vlm and len(routes) > 1:
            raise ValueError("several teachers of multimodal prompts are not supported: give one teacher")
        self._routes = {route: i for i, route in enumerate(routes)}
        tokenizers = given.teacher_processing_class
        if isinstance(tokenizers, Mapping):
            for route in tokenizers:
                require_route(routes, "teacher_processing_class", route)
        else:
            tokenizers = dict.fromkeys(routes, tokenizers)
        for prompt in self._prompts.values():
            if self._is_vlm:
                raise ValueError(f"{prompt.name} is for texts, and the student reads images, too")
            if getattr(self, "environment_factories", None) is not None:
                raise ValueError(
                    f"{prompt.name} knows the rows of the dataset, and not what an environment_factory adds to their "
                    "prompts: give one of the two"
                )
        if self._is_vlm and self._cross_tokenizer:
            raise ValueError("cross_tokenizer=True is for texts, and the student reads images, too")
        self._copies: dict[str, StudentCopy] = {}
        if isinstance(given.ref_model, str) and given.ref_model == BASE:  # said whether or not lambda needs it
            self._require_adapter(REF_MODEL)
        student = cast("Any", self.model)
        with without_cast(student.get_output_embeddings()):
            require_head(student)
        prepared: dict[int | str, FrozenModel] = {}
        self._teachers: list[FrozenModel] = []
        if self._differs_in_any_step_from(0):
            init = getattr(self.args, "teacher_model_init_kwargs", None)
            for i, (route, source) in enumerate(routes.items()):
                tokenizer = tokenizers.get(route)
                self._teachers.append(self._set_up(teacher_name(route), i, source, init, tokenizer, prepared))
        else:
            self._prompts.pop(TEACHER, None)
            if self.accelerator.is_main_process:
                logger.warning("reward_scale=0 has no use for the teacher: it is not loaded.")
        self._reference: FrozenModel | None = None
        evaluates = self._evaluates_exactly and getattr(self, "eval_dataset", None) is not None
        trains = self._differs_in_any_step_from(1) or self.args._penalty is not None
        if given.ref_model is not None and (trains or evaluates):
            init = self.args.model_init_kwargs
            self._reference = self._set_up(REF_MODEL, None, given.ref_model, init, None, prepared)
        else:
            self._prompts.pop(REF, None)
            if given.ref_model is not None and self.accelerator.is_main_process:
                logger.warning("reward_scale=1 has no use for ref_model: it is not loaded.")
        if any(copied.moves for copied in self._copies.values()):
            cast("Any", self).add_callback(_Follow(self._copies, self.accelerator))
        self._frozen = [*self._teachers, *([] if self._reference is None else [self._reference])]
        # models that a first batch has not been compared with yet; those of another tokenizer score other tokens
        self._unchecked = {x.name for x in self._frozen if not x.of_student and x.pair is None}
        size = self._vocabulary(self.model)
        pairs = {x.name: x.pair for x in self._frozen if x.pair is not None}
        self._cross = CrossTokenizer(pairs, size, self._options, getattr(self.args, "span_credit", None) or "spread")
        self._vocab_size = min([size, *(x.vocab_size for x in self._frozen if x.vocab_size is not None)])
        self._sample_from_joint_vocabulary(size)

    def _set_up(
        self,
        name: str,
        index: int | None,
        source: Model,
        init: Any,
        tokenizer: Any,
        prepared: dict[int | str, FrozenModel],
    ) -> FrozenModel:
        """Load a teacher or the reference, compare it with the student, and prepare it.

        Args:
            name: what messages call it.
            index: of its route; None of the reference.
            source: as it was given.
            init: arguments of ``from_pretrained``.
            tokenizer: as it was given.
            prepared: what has been set up, by the id of a given module or the kind of a student; this one is added.
        """
        if is_own(source):
            return self._made_of_student(name, index, cast("str", source), prepared)
        if not isinstance(source, (str, nn.Module)):
            return self._set_up_scorer(name, index, source, tokenizer)
        if isinstance(source, nn.Module):
            _require_separate(name, source, self.accelerator.unwrap_model(self.model))
            if id(source) in prepared:
                return replace(prepared[id(source)], name=name, index=index)
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
        pair = None
        if found is not None:
            pair = self._pair_with(name, found)
        elif index is not None and self._cross_tokenizer:
            raise ValueError(
                f"cross_tokenizer=True needs the tokenizer of {name}, which is not saved with it: pass "
                "teacher_processing_class, or save it in the model's folder"
            )
        elif index is not None:
            self._warn(
                f"the tokenizer of {name} is not known, so only the sizes of the vocabularies were compared. Pass "
                "teacher_processing_class to compare the tokens"
            )
        size = self._checked_vocabulary(name, self._vocabulary(model)) if pair is None else None
        if pair is None and index is not None:
            said = other_ends(name, self.eos_token_ids, self._tokenizer, ends_of(model), found)
            if said is not None:
                self._warn(said)
        positions = positions_of(cast("Any", model).config)
        if self.is_deepspeed_enabled:
            model = prepare_deepspeed(model, self.accelerator)
        elif self.is_fsdp_enabled:
            # as GRPOTrainer does for its reference: accelerate neither shards nor moves models in evaluation mode
            model = prepare_fsdp(model, self.accelerator)
        else:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        prepared[id(source)] = FrozenModel(
            name=name,
            index=index,
            model=model,
            vocab_size=size,
            positions=positions,
            pair=pair,
            stored=self._stored(name, model),
        )
        return prepared[id(source)]

    def _set_up_scorer(self, name: str, index: int | None, source: Any, tokenizer: Any) -> FrozenModel:
        """Compare a scorer with the student; it is used as it is."""
        own = getattr(source, "tokenizer", None) if tokenizer is None else tokenizer_of(tokenizer)
        pair = None
        if isinstance(own, PreTrainedTokenizerBase):
            pair = self._pair_with(name, own)
        elif index is not None and self._cross_tokenizer:
            raise ValueError(
                f"cross_tokenizer=True needs the tokenizer of {name}, a scorer: pass teacher_processing_class, or "
                "give the scorer an attribute tokenizer"
            )
        elif index is not None and hasattr(source, "tokenizer"):
            self._warn(
                f"the tokenizer of {name} is not known: nothing shows that its ids are the student's. Make it with "
                "tokenizer=, or pass teacher_processing_class"
            )
        head = head_of_scorer(source)
        size = None if head is None or pair is not None else self._checked_vocabulary(name, head.vocab_size)
        return FrozenModel(name=name, index=index, model=source, vocab_size=size, pair=pair)

    def _checked_vocabulary(self, name: str, size: int) -> int:
        check_vocabulary(name, size, self._vocabulary(self.model), self._tokenizer)
        return size

    def _require_adapter(self, name: str) -> None:
        if not hasattr(self.accelerator.unwrap_model(self.model), "disable_adapter"):
            raise ValueError(
                f'{name}="base" is the student without its PEFT adapter, and the student has none: pass peft_config, '
                f'or {name}="student", the student as it is before training'
            )

    def _made_of_student(
        self, name: str, index: int | None, source: str, prepared: dict[int | str, FrozenModel]
    ) -> FrozenModel:
        """A copy of the student; or ``"base"`` or ``"student"``, which the student's own modules compute."""
        moves = index is not None and self.args._teacher_moves is not None
        kind = BASE if source == BASE else "moving" if moves else "initial"
        if kind == BASE:
            self._require_adapter(name)
        elif self._sharding is not None:
            raise ValueError(
                f'{name}="student" is a copy of the student, which {self._sharding} shards: pass the path of the model '
                "that training begins with, or train without sharding"
            )
        if kind not in prepared:
            live = kind == "moving" and self.args._following.is_live
            model = source if kind == BASE or live else self._copied(kind)
            prepared[kind] = FrozenModel(
                name=name,
                index=index,
                model=model,
                of_student=True,
                positions=positions_of(self.model.config),
                stored=None if live else self._stored(name, self.model if kind == BASE else model, frozen=kind == BASE),
            )
        return replace(prepared[kind], name=name, index=index)

    def _copied(self, kind: str) -> nn.Module:
        """A copy of the student, which follows it if its kind is ``"moving"``."""
        every, ema = (self.args.teacher_sync_steps, self.args.teacher_ema) if kind == "moving" else (None, None)
        copied = StudentCopy(self.accelerator.unwrap_model(self.model), every=every, ema=ema)
        copied.model = self.accelerator.prepare_model(copied.model, evaluation_mode=True)
        state = copied.state()
        for x in state.values():  # processes may have made other adapters, and train that of the first one
            broadcast(x)
        copied.load(state)
        self._copies[kind] = copied
        return copied.model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self._copies and self.args.should_save:
            save_copies(Path(output_dir), self._copies)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self._copies and checkpoint is not None:
            load_copies(Path(checkpoint), self._copies)

    def _pair_with(self, name: str, other: Any) -> TokenizerPair | None:
        """Raise where a model's tokenizer is not the student's; with ``cross_tokenizer`` say so and return the pair."""
        pair = check_tokenizers(
            name,
            self._tokenizer,
            other,
            cross_tokenizer=self._cross_tokenizer,
            terminators=self.eos_token_ids,
            chat_template_kwargs=getattr(self, "chat_template_kwargs", None),
        )
        if pair is not None and self.accelerator.is_main_process:
            data = cast("Any", self).train_dataset
            prompts = data[:_SHOWN_PROMPTS]["prompt"] if hasattr(data, "__len__") else []
            logger.warning(pair.describe(texts_of(prompts)))
        return pair

    def _with_adapter(self, name: str, path: str) -> nn.Module:
        if self._sharding is not None:
            raise ValueError(
                f"{name} is an adapter on the student's base, whose parameters {self._sharding} gathers in the "
                "student's forward alone: pass the path of a whole model (merge_and_unload), or train without sharding"
            )
        return with_adapter(name, self.accelerator.unwrap_model(self.model), path)

    def _stored(self, name: str, model: Any, frozen: bool = False) -> StoredStates | None:
        """The cache of a model's states, or None; ``frozen``: of ``"base"``, the student without its adapter."""
        if self._cache is None:
            return None
        if self._sharding is not None:
            raise ValueError(
                "teacher_cache needs whole models on every rank: under FSDP and DeepSpeed all ranks run a model "
                "together, and some would find their sequences in the cache"
            )
        whole = self.accelerator.unwrap_model(model)
        try:
            return StoredStates(self._cache, card.name_of(whole), whole, frozen=frozen)
        except ValueError as error:
            raise ValueError(f"teacher_cache cannot tell {name} from other models: {error}") from None

    def _load(self, name: str, path: str, init: dict[str, Any] | None) -> nn.Module:
        options = dict(init or {})
        options.setdefault("trust_remote_code", getattr(self.args, "trust_remote_code", False))
        if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None  # as TRL does: "auto" would spread the model over the ranks' devices
        with self._phase("load", name):
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

    def _differs_in_any_step_from(self, scale: float) -> bool:
        """Whether lambda is another number in some step. A model that it cancels in all steps is not loaded."""
        ends = {self.args.reward_scale, self.args.reward_scale_end} - {None}
        return self._reward_scale_fn is not None or ends != {scale}
