"""The models of both trainers: the checks before anything is loaded, then loading, comparing and preparing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast  # type: ignore[import-untyped]
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils.logging import get_logger
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path

from ...hooks import qualified_name
from ...token_stats import AdvantageFn, RewardScaleFn
from ..adapters import require_adapter, with_adapter
from ..cache import StoredStates, TeacherCache
from ..hub import BASE, STUDENT, adapter_path, is_own, require_model
from ..modules import require_separate
from ..tokenizers.pairs import texts_of
from ..transformers.states import require_head
from . import card
from .checks import (
    Model,
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
    routes_of,
    scores_students_tokens,
    teacher_name,
    tokenizer_of,
)
from .config import Options
from .cross import CrossTokenizer
from .phases import PhasesMixin
from .prompts import ARGUMENTS, OtherPrompt
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
        self,
        student: str | nn.Module,
        peft_config: Any,
        args: Options,
        *,
        teacher: Model | Mapping[Any, Model],
        ref_model: Model | None,
        reward_scale_fn: Callable[[int], float | RewardScaleFn] | None,
        advantage_fn: AdvantageFn | None,
        datasets: dict[str, Any],
        prompts: Mapping[str, Any],
    ) -> None:
        """Raise for every error that can be found before the student is loaded."""
        routes = routes_of(teacher, args.route_column)
        teachers = named(routes)
        for name, model in teachers.items():
            check_kind(name, model, cast("Any", args).temperature)
        loaded = any(isinstance(x, str) and adapter_path(x) is None and not is_own(x) for x in routes.values())
        if getattr(args, "teacher_model_init_kwargs", None) and not loaded:
            raise ValueError("teacher_model_init_kwargs are for a teacher that is loaded: no teacher is a model's path")
        check_reference(args, ref_model, has_function=reward_scale_fn is not None)
        if isinstance(student, nn.Module):
            for name, source in {**teachers, "ref_model": ref_model}.items():
                if isinstance(source, nn.Module) and _trains_all(student, source, peft_config):
                    _require_separate(name, source, student)
        if args.route_column is not None:
            for name, dataset in datasets.items():
                check_routes(routes, args.route_column, name, dataset)
        self._set_up_prompts(args, routes, ref_model, datasets, prompts)
        other = self._prompts.get("teacher")
        alike = [teacher_name(route) for route in routes if other is None or not other.differs(route)]
        check_student_as_teacher(args, teachers, alike, reward_scale_fn is None and not args._needs_reference)
        self._options = args._loss_options()
        if advantage_fn is not None:
            self._options["advantage_fn"] = advantage_fn
        self._cache = open_cache(args, {**teachers, "ref_model": cast("Any", ref_model)})
        rollout = getattr(args, "_rollout_options", {})
        dry_run({**self._options, **rollout}, routes, ref_model, cast("Any", args).device)
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
            elif isinstance(source, str) and (name == "model" or not is_own(source)):
                require_model(name, source, teacher_init if name in teachers else init)
        self._reward_scale_fn = reward_scale_fn
        self._card_sources = [(name, card.name_of(model, args._teacher_moves)) for name, model in teachers.items()]
        self._card_sources.append(("reference", "none" if ref_model is None else card.name_of(ref_model)))

    def _set_up_prompts(
        self,
        args: Options,
        routes: Mapping[Any, Model],
        ref_model: Model | None,
        datasets: dict[str, Any],
        given: Mapping[str, Any],
    ) -> None:
        """Keep, by role, the prompts that are not the student's. ``given`` has the trainer's arguments by role."""
        found = {
            role: OtherPrompt(role, given[role], getattr(args, f"{argument}_column"), args.route_column, routes)
            for role, argument in ARGUMENTS.items()
        }
        self._prompts = {role: prompt for role, prompt in found.items() if prompt}
        if "ref_model" in self._prompts and ref_model is None:
            raise ValueError(f"{ARGUMENTS['ref_model']} is what the reference reads, and no ref_model is given")
        for prompt in self._prompts.values():
            for name, dataset in datasets.items():
                if prompt.column is not None:
                    check_column(prompt.name, prompt.column, name, dataset)

    def _set_up_models(
        self, teacher: Model | Mapping[Any, Model], ref_model: Model | None, teacher_processing_class: Any
    ) -> None:
        """Load, check and prepare the frozen models, after the trainer's own construction."""
        self._show_phases()
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
        for prompt in self._prompts.values():
            if self._is_vlm:
                raise ValueError(f"{prompt.name} is for texts, and the student reads images, too")
            if getattr(self, "environment_factories", None) is not None:
                raise ValueError(
                    f"{prompt.name} knows the rows of the dataset, and not what an environment_factory adds to their "
                    "prompts: give one of the two"
                )
        prepared: dict[int, Any] = {}
        if self._is_vlm and self._cross_tokenizer:
            raise ValueError("cross_tokenizer=True is for texts, and the student reads images, too")
        self._stored: dict[int | str, StoredStates] = {}  # by the id of a model, or "base"
        self._copies: dict[str, StudentCopy] = {}
        if isinstance(ref_model, str) and ref_model == BASE:  # said whether or not lambda needs it
            self._require_adapter("ref_model")
        student = cast("Any", self.model)
        with without_cast(student.get_output_embeddings()):
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
        evaluates = self._evaluates_exactly and getattr(self, "eval_dataset", None) is not None
        trains = self._differs_in_any_step_from(1) or self.args._penalty is not None
        if ref_model is not None and not (trains or evaluates):
            if self.accelerator.is_main_process:
                logger.warning("reward_scale=1 has no use for ref_model: it is not loaded.")
        elif ref_model is not None:
            init = self.args.model_init_kwargs
            self._reference = self._frozen("ref_model", ref_model, init, None, prepared, sizes)
        if self._teachers[0] is None:
            self._prompts.pop("teacher", None)
        if self._reference is None:
            self._prompts.pop("ref_model", None)
        if any(copied.moves for copied in self._copies.values()):
            cast("Any", self).add_callback(_Follow(self._copies, self.accelerator))
        # models that a first batch has not been compared with yet; those of another tokenizer score other tokens
        sources = {**dict(zip(names, routes.values(), strict=True)), "ref_model": ref_model}
        self._unchecked = {n for n, x in sources.items() if x is not None and not is_own(x)} - set(self._cross.pairs)
        self._vocab_size = min(sizes)
        self._sample_from_joint_vocabulary(sizes[0])

    def _frozen(
        self, name: str, source: Model, init: Any, tokenizer: Any, prepared: dict[int, Any], sizes: list[int]
    ) -> Any:
        """Load a teacher or reference, compare it with the student, and prepare it; scorers are returned unchanged."""
        if is_own(source):
            return self._made_of_student(name, cast("str", source))
        if not isinstance(source, (str, nn.Module)):
            own = getattr(source, "tokenizer", None) if tokenizer is None else tokenizer_of(tokenizer)
            if isinstance(own, PreTrainedTokenizerBase):
                self._compare_tokenizers(name, own)
            elif name != "ref_model" and self._cross_tokenizer:
                raise ValueError(
                    f"cross_tokenizer=True needs the tokenizer of {name}, a scorer: pass teacher_processing_class, or "
                    "give the scorer an attribute tokenizer"
                )
            elif name != "ref_model" and hasattr(source, "tokenizer"):
                self._warn(
                    f"the tokenizer of {name} is not known: nothing shows that its ids are the student's. Make it with "
                    "tokenizer=, or pass teacher_processing_class"
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
        elif name != "ref_model" and self._cross_tokenizer:
            raise ValueError(
                f"cross_tokenizer=True needs the tokenizer of {name}, which is not saved with it: pass "
                "teacher_processing_class, or save it in the model's folder"
            )
        elif name != "ref_model":
            self._warn(
                f"the tokenizer of {name} is not known, so only the sizes of the vocabularies were compared. Pass "
                "teacher_processing_class to compare the tokens"
            )
        if name not in self._cross.pairs:
            size = self._vocabulary(model)
            check_vocabulary(name, size, sizes[0], self._tokenizer)
            sizes.append(size)
            if name != "ref_model":
                said = other_ends(name, self.eos_token_ids, self._tokenizer, ends_of(model), found)
                if said is not None:
                    self._warn(said)
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

    def _require_adapter(self, name: str) -> None:
        if not hasattr(self.accelerator.unwrap_model(self.model), "disable_adapter"):
            raise ValueError(
                f'{name}="base" is the student without its PEFT adapter, and the student has none: pass peft_config, '
                f'or {name}="student", the student as it is before training'
            )

    def _made_of_student(self, name: str, source: str) -> nn.Module | str:
        """A copy of the student; or ``"base"`` or ``"student"``, which the student's own modules compute."""
        self._positions[name] = self._positions["the student"]
        if source == BASE:
            self._require_adapter(name)
            self._store(name, BASE, self.model)
            return BASE
        if self._sharding is not None:
            raise ValueError(
                f'{name}="student" is a copy of the student, which {self._sharding} shards: pass the path of the model '
                "that training begins with, or train without sharding"
            )
        moves = name != "ref_model" and self.args._teacher_moves is not None
        if moves and self.args._teacher_is_live:
            return STUDENT
        kind = "moving" if moves else "initial"
        if kind not in self._copies:
            steps, decay = (self.args.teacher_sync_steps, self.args.teacher_ema) if moves else (None, None)
            copied = StudentCopy(self.accelerator.unwrap_model(self.model), every=steps, ema=decay)
            copied.model = self.accelerator.prepare_model(copied.model, evaluation_mode=True)
            state = copied.state()
            for x in state.values():  # processes may have made other adapters, and train that of the first one
                broadcast(x)
            copied.load(state)
            self._copies[kind] = copied
        model = self._copies[kind].model
        if id(model) not in self._stored:
            self._store(name, id(model), model)
        return model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self._copies and self.args.should_save:
            save_copies(Path(output_dir), self._copies)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self._copies and checkpoint is not None:
            load_copies(Path(checkpoint), self._copies)

    def _compare_tokenizers(self, name: str, other: Any) -> None:
        """Raise where a model's tokenizer is not the student's; with ``cross_tokenizer`` keep the pair, and say so."""
        pair = check_tokenizers(
            name,
            self._tokenizer,
            other,
            cross_tokenizer=self._cross_tokenizer,
            terminators=self.eos_token_ids,
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
        if self._sharding is not None:
            raise ValueError(
                f"{name} is an adapter on the student's base, whose parameters {self._sharding} gathers in the "
                "student's forward alone: pass the path of a whole model (merge_and_unload), or train without sharding"
            )
        return with_adapter(name, self.accelerator.unwrap_model(self.model), path)

    def _store(self, name: str, key: int | str, model: Any) -> None:
        """Have the cache keep the states of a model; of ``"base"`` those of the student without its adapter."""
        if self._cache is None:
            return
        if self._sharding is not None:
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
