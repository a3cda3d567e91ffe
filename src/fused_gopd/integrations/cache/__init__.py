"""Scores of teachers and references on disk, for sequences that are scored more than once.

:class:`TeacherCache` is a folder, and :meth:`TeacherCache.scorer` a scorer that looks there before it asks a model or
another scorer. ``docs/teachers.md`` says what this is useful for. The folder has ::

    teacher-cache.json                               the version of this format
    MODEL/model.json                                 the model, its settings, the names under which it was used
    MODEL/2 digits/62 digits.safetensors             one sequence

``MODEL`` is a hash of fingerprint and settings, the digits of a file are the hash of the sequence's token ids and of
the positions that are scored. A file has the tensors ``ids`` (T,) int32, the sequence without padding; ``positions``
(N,) int32, the places in it of the scored tokens; and their scores: ``hidden`` (N, H), the states that predict them, or
``logprobs`` (N,), or ``token_ids`` (N, K), ``logprobs`` (N, K) and ``sampled_logprobs`` (N,). Its metadata has a CRC-32
over names, dtypes, shapes and bytes of all tensors.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ...heads import LinearHead, TokenLogProbs, TopKLogProbs
from ...installing import packages
from ...values import require_count, require_positive
from .. import needs
from ..batches import sequences_to_score

with needs(__name__, "safetensors", install=partial(packages, "safetensors>=0.6")):
    from . import files
from .fingerprint import adapters_of, fingerprint, head_fingerprint, sample_of

__all__ = ["CachedTeacher", "TeacherCache", "TeacherCacheError", "fingerprint"]

# What a position has that is not scored. Its mask is 0, so that nothing reads it.
_EMPTY = {"token_ids": -1}
# How far a teacher's scores may be from what it gave before, in the mean over a sequence, before it is another teacher:
# nats of log-probs, and the share of the states' norm. Both are several times what the order of sums makes in bfloat16.
_SAME_LOGPROBS, _SAME_STATES = 0.2, 0.1
# The attributes of a scorer that trainers look at.
_LOOKED_AT = ("temperature", "top_k", "head", "tokenizer")


class TeacherCacheError(RuntimeError):
    """Scores are missing, damaged, or of another teacher; the message says which, and what to do."""


class TeacherCache:
    """A folder with scores of sequences, for several runs, epochs and processes at once.

    Scores are found by the token ids of a sequence without its padding, the positions that are scored, and the model
    and its settings. Each sequence is a file, which is complete or not there, has a checksum, and is read by
    safetensors alone: nothing is unpickled.

    Args:
        path: the folder; new, empty, or a cache.
        max_bytes: the size that it may have. When it is exceeded, the least recently used sequences are removed, down
            to 0.9 of it. That never disturbs a run which has its teacher at hand. While a scorer without a teacher is
            open anywhere nothing is removed, and nothing more is kept. Every process looks at the size once it has
            written a sixteenth of ``max_bytes``.

    Raises:
        ValueError, TypeError: another folder, a wrong argument.
    """

    def __init__(self, path: str | Path, *, max_bytes: int | None = None) -> None:
        if not isinstance(path, (str, Path)):
            raise TypeError(f"path must be a folder, got {type(path).__name__}")
        self.max_bytes = None if max_bytes is None else require_count("max_bytes", max_bytes)
        self.path = Path(path).expanduser().absolute()
        self._folder = files.Folder(self.path)
        self._counts = dict.fromkeys(("hits", "misses", "damaged", "removed", "unwritten"), 0)
        self._room = 0  # bytes that may be written before the size is looked at
        self._warned: set[str] = set()

    def __len__(self) -> int:
        """Sequences in the folder."""
        return len(self._folder.usage())

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences in the folder."""
        return sum(size for _, size, _ in self._folder.usage())

    def stats(self) -> dict[str, int]:
        """What this object did: ``hits`` and ``misses`` in sequences, ``damaged`` files, ``removed`` ones for want of
        room, and ``unwritten`` ones."""
        return dict(self._counts)

    def models(self) -> dict[str, dict[str, Any]]:
        """Whose scores there are: names, fingerprint and settings, by the name of the model's folder."""
        try:
            return self._folder.models()
        except files.Damaged as error:
            raise TeacherCacheError(str(error)) from None

    def scorer(
        self,
        teacher: Any = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        head: Any = None,
        temperature: float = 1.0,
    ) -> CachedTeacher:
        """A scorer that looks here first, and asks the teacher for the sequences that are missing.

        Args:
            teacher: a model of transformers (its hidden states are stored, its head is used as it is), a scorer such as
                :class:`fused_gopd.integrations.server.ServerTeacher`, or None: what is missing is then an error.
            name: what to call it here; a scorer without a teacher finds its scores by it. Default: the name of the
                model, or for a scorer its ``model``.
            revision: what tells weights of one name apart, such as a commit. A model in this process is known by its
                weights; of a scorer they cannot be seen, and scores of another revision are not found. Required for a
                scorer that has no attribute ``fingerprint``.
            head: for hidden states without a teacher: the path of the teacher's folder, of which only the head is read,
                or what :func:`fused_gopd.integrations.checkpoint.load_head` read. The head of another model is an
                error.
            temperature: of that head, or of a model's. A scorer has its own. Hidden states do not depend on it: those
                of a model, or of a scorer with an attribute ``head``, are found at any.

        Raises:
            TypeError, ValueError: a wrong argument.
            TeacherCacheError: without a teacher, no scores of that name, or of several models.
        """
        return CachedTeacher(self, teacher, name, revision, head, temperature)

    # --------------------------------------------------------------------------------------------------------- storage

    def _read(self, path: Path, row: _Row) -> files.Scores | None:
        """The scores of a sequence; raises :class:`files.Damaged`."""
        found = self._folder.read(path)
        if found is None:
            return None
        ids, positions = found.pop("ids", None), found.pop("positions", None)
        same = (
            ids is not None
            and positions is not None
            and torch.equal(ids.long(), row.ids)
            and torch.equal(positions.long(), row.positions)
        )
        if not same or any(len(x) != len(row.positions) for x in found.values()) or not found:
            raise files.Damaged("it has the scores of another sequence than its name says")
        return found

    def _write(self, path: Path, row: _Row, scores: files.Scores) -> None:
        """Keep the scores of a sequence. A full or read-only disk is a warning, since the run has the scores."""
        # a sum has NaN where a term has, and takes a fraction of the time
        if any(bool(x.sum().isnan()) for x in scores.values() if x.is_floating_point()):
            self._counts["unwritten"] += 1
            self._warn(f"the teacher's scores of a sequence of {len(row.ids)} tokens have NaN: they are not kept")
            return
        own = {"ids": row.ids.to(torch.int32), "positions": row.positions.to(torch.int32)}
        content = files.encoded({**own, **scores})
        try:
            if self._has_room(len(content)):
                self._folder.write(path, content)
                return
        except OSError as error:
            self._warn_unwritable(error)
        self._counts["unwritten"] += 1

    def _has_room(self, size: int) -> bool:
        """Whether ``size`` more bytes may be written; removes what was not used for longest."""
        if self.max_bytes is None or size <= self._room:
            self._room -= size
            return True
        left = 0
        if size <= self.max_bytes:
            removed, left = self._folder.make_room(size, self.max_bytes)
            self._counts["removed"] += removed
        if left + size > self.max_bytes:
            why = "a scorer without a teacher is open, which may need them" if left else "a sequence alone has more"
            self._warn(f"{self.path} is full (max_bytes={self.max_bytes}): {why}. New scores are not kept")
            return False
        # other processes write too: look again before long
        self._room = min(self.max_bytes - left, self.max_bytes // 16) - size
        return True

    def _warn_unwritable(self, error: OSError) -> None:
        self._warn(f"scores cannot be written to {self.path} ({error.strerror}): the run goes on without")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


@dataclass(frozen=True)
class _Row:
    """A sequence to score."""

    index: int  # in its batch
    ids: Tensor  # (T,) int64, without padding and without what comes after the last scored token
    positions: Tensor  # (N,) int64, the places in it of the scored tokens
    key: str

    @staticmethod
    def of_batch(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> list[_Row]:
        """The sequences of a batch that have a token to score."""
        mask, sequences, wanted = sequences_to_score(input_ids, attention_mask, completion_mask)
        rows = []
        for i, ids, positions in zip(mask.any(1).nonzero().flatten().tolist(), sequences, wanted, strict=True):
            tensors = torch.tensor(ids), torch.tensor(positions)
            rows.append(_Row(i, *tensors, files.key_of(*tensors)))
        return rows


Ask = Callable[[Tensor], files.Scores]
"""Scores (rows, K, ...) of the rows of a batch, whose indices are given."""


class StoredModel:
    """The scores of one model under one setting. Used by :class:`CachedTeacher` and by the trainers."""

    def __init__(self, cache: TeacherCache, name: str, fingerprint: str, settings: Mapping[str, Any]) -> None:
        self.cache = cache
        text = json.dumps([fingerprint, settings], sort_keys=True).encode()
        self.name = name
        self.folder = files.digest(str(files.FORMAT).encode(), text)[:16]
        known = cache.models().get(self.folder, {})
        self.description: dict[str, Any] = {**known, "fingerprint": fingerprint, "settings": dict(settings)}
        self.description["names"] = sorted({*known.get("names", []), name})
        self._described = False

    def lookup(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, ask: Ask | None
    ) -> files.Scores:
        """Scores (B, K, ...) on the device of ``input_ids``, by their names in a file; ``ask`` scores what is missing.

        Sequences without a token to score are not asked for.
        """
        cache, rows = self.cache, _Row.of_batch(input_ids, attention_mask, completion_mask)
        if not rows:
            raise ValueError("completion_mask must have a token to score, got 0 everywhere")
        found: dict[str, files.Scores] = {}
        missing: dict[str, _Row] = {}
        for row in rows:
            if row.key not in found and row.key not in missing:
                scores = self._read(row, offline=ask is None)
                if scores is None:
                    missing[row.key] = row
                else:
                    found[row.key] = scores
        cache._counts["hits"] += len(found)
        cache._counts["misses"] += len(missing)
        if missing:
            asked = list(missing.values())
            if ask is None:
                raise TeacherCacheError(self._missing(asked, len(rows)))
            fresh = ask(torch.tensor([row.index for row in asked]))
            mask = completion_mask.bool()
            for i, row in enumerate(asked):
                found[row.key] = {name: x[i][mask[row.index].to(x.device)] for name, x in fresh.items()}
            for row in asked:
                scores = {name: _on_disk(name, x) for name, x in found[row.key].items()}
                cache._write(cache._folder.file(self.folder, row.key), row, scores)
        if ask is not None and not self._described:
            self._describe()
        return self._batch(rows, found, completion_mask.bool().cpu(), input_ids.device)

    def _read(self, row: _Row, offline: bool) -> files.Scores | None:
        path = self.cache._folder.file(self.folder, row.key)
        try:
            return self.cache._read(path, row)
        except files.Damaged as error:
            self.cache._counts["damaged"] += 1
            if offline:
                raise TeacherCacheError(
                    f"{path} is damaged ({error}), and there is no teacher to score its sequence again: remove the "
                    "file, and score the sequence with the teacher"
                ) from None
            self.cache._warn(f"{path} is damaged ({error}): its sequence is scored again, and the file replaced")
            return None

    def _describe(self) -> None:
        """Write whose scores these are."""
        # another process may have added its name since this object was made
        there = self.cache.models().get(self.folder, {}).get("names", [])
        self.description["names"] = sorted({*there, *self.description["names"]})
        try:
            self.cache._folder.describe(self.folder, self.description)
        except OSError as error:
            self.cache._warn_unwritable(error)
        self._described = True

    def remember_head(self, head: LinearHead) -> None:
        """Write which head the states are made for, unless it is known."""
        if "head" not in self.description:
            self.description["head"] = head_fingerprint(head)
            self._describe()

    def _batch(
        self, rows: list[_Row], found: dict[str, files.Scores], mask: Tensor, device: torch.device
    ) -> files.Scores:
        widest: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for row in rows:
            for name, x in found[row.key].items():
                shape, dtype = widest.setdefault(name, (tuple(x.shape[1:]), x.dtype))
                if (dtype, len(shape)) != (x.dtype, x.ndim - 1) or (name == "hidden" and shape != x.shape[1:]):
                    raise TeacherCacheError(
                        f"{self.cache._folder.file(self.folder, row.key)} has {name} of {x.dtype} and size "
                        f"{tuple(x.shape[1:])} at a token, another sequence has {dtype} and {shape}: the teacher of "
                        "this name and revision has changed"
                    )
                widest[name] = (tuple(map(max, shape, x.shape[1:])), dtype)  # lists of tokens may differ in length
        places = {row.index: _places(mask[row.index], device) for row in rows}
        batch = {}
        for name, (shape, dtype) in widest.items():
            batch[name] = torch.full((*mask.shape, *shape), _EMPTY.get(name, 0), dtype=dtype, device=device)
            for row in rows:
                x = found[row.key][name].to(device)
                if x.shape[1:] != shape:
                    x = nn.functional.pad(x, (0, shape[0] - x.shape[1]), value=_EMPTY.get(name, 0))
                batch[name][row.index, places[row.index]] = x
        if "token_ids" in batch:
            batch["token_ids"] = batch["token_ids"].long()
        return batch

    def _missing(self, rows: list[_Row], of: int) -> str:
        row = rows[0]
        shown = ", ".join(map(str, row.ids[:8].tolist())) + (", ..." if len(row.ids) > 8 else "")
        return (
            f"{len(rows)} of {of} sequences have no scores of {self.name!r} in {self.cache.path}, and there is no "
            f"teacher to ask: sequence {row.index} of the batch, {len(row.ids)} tokens [{shown}] of which "
            f"{len(row.positions)} are scored ({self.folder}/{row.key[:2]}/{row.key[2:]}.safetensors). Score it first, "
            "by a scorer with the teacher; ids, special tokens and what is scored must be the same"
        )


class StoredStates:
    """The hidden states of a model in this process; under autocast they are others, with an entry of their own.

    ``frozen``: only parameters that are not trained make the model, those of the base of a PEFT model.
    """

    def __init__(self, cache: TeacherCache, name: str, model: nn.Module, *, frozen: bool = False) -> None:
        self._cache, self._name, self._model = cache, name, model
        # looked at once: PEFT freezes an adapter while it is disabled
        self._only = {name for name, x in model.named_parameters() if not x.requires_grad} if frozen else None
        self._by_autocast: dict[str, StoredModel] = {}
        self._fingerprint, self._versions = fingerprint(model, only=self._only), self._counted()

    def _counted(self) -> list[Any]:
        """What changes where a weight's values do: where it is, how often it was written in place, some of its values.

        And which adapters are active, of a model with some; "base" is without any.
        """
        weights = [x for name, x in self._model.named_parameters() if self._only is None or name in self._only]
        places = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in weights]
        return [places, sample_of(weights), adapters_of(self._model) if self._only is None else ""]

    def now(self, device: torch.device) -> StoredModel:
        """Those of the model as it is, under the current autocast of a device."""
        versions = self._counted()
        if versions != self._versions:  # moved, or trained in the meantime (a moving average of the student)
            self._fingerprint, self._versions = fingerprint(self._model, only=self._only), versions
            self._by_autocast.clear()
        on = torch.is_autocast_enabled(device.type)
        autocast = str(torch.get_autocast_dtype(device.type)) if on else "none"
        if autocast not in self._by_autocast:
            settings = {"scores": "hidden", "autocast": autocast}
            self._by_autocast[autocast] = StoredModel(self._cache, self._name, self._fingerprint, settings)
        return self._by_autocast[autocast]


def _places(mask: Tensor, device: torch.device) -> slice | Tensor:
    """The ones of a mask (K,): as a slice, whose copy is faster, where they are next to each other."""
    ones = mask.nonzero().flatten()
    first, last = int(ones[0]), int(ones[-1])
    return slice(first, last + 1) if last - first + 1 == len(ones) else ones.to(device)


def _on_disk(name: str, x: Tensor) -> Tensor:
    """A score as a file has it: on the CPU, ids in 32 bits."""
    return x.detach().to("cpu", torch.int32 if name == "token_ids" else x.dtype).contiguous()


class CachedTeacher:
    """A scorer, as :class:`fused_gopd.integrations.trl.GOPDTrainer` takes one, made by :meth:`TeacherCache.scorer`."""

    def __init__(
        self,
        cache: TeacherCache,
        teacher: Any,
        name: str | None,
        revision: str | None,
        head: Any,
        temperature: float,
    ) -> None:
        for argument, value in (("name", name), ("revision", revision)):
            if value is not None and (not isinstance(value, str) or not value):
                raise TypeError(f"{argument} must be a text, got {value!r}")
        require_positive("temperature", temperature)
        if head is not None and teacher is not None:
            raise TypeError("head is for hidden states without a teacher: a teacher brings its own")
        if temperature != 1 and head is None and not isinstance(teacher, nn.Module):
            raise TypeError(f"temperature is that of a model, or of head; scores have their own, got {temperature}")
        self.cache, self._teacher = cache, teacher
        self._on: Callable[[Tensor], LinearHead] | None = None  # the head, on hidden states
        self._states: StoredStates | None = None
        self._known_weight: Tensor | None = None
        self._checked = teacher is None or isinstance(teacher, nn.Module)
        self._lock: IO[bytes] | None = None
        if teacher is None:
            if revision is not None:
                raise TypeError("revision is that of a teacher: without one, scores are found by name")
            attributes = self._open_without_teacher(name, head, temperature)
        elif isinstance(teacher, nn.Module):
            if revision is not None:
                raise TypeError("revision is for a scorer: a model in this process is known by its weights")
            attributes = self._open_for_model(teacher, name, temperature)
        elif callable(teacher):
            attributes = self._open_for_scorer(teacher, name, revision)
        else:
            raise TypeError(f"teacher must be a model, a scorer or None, got {type(teacher).__name__}")
        for attribute in _LOOKED_AT:
            if attribute in attributes:
                setattr(self, attribute, attributes[attribute])

    def _open_without_teacher(self, name: str | None, head: Any, temperature: float) -> dict[str, Any]:
        """Find the scores of a name; returns the attributes that trainers look at, as the two below do."""
        self._lock = self.cache._folder.hold()  # as long as this object lives
        try:
            self._stored = self._find(name)
        except BaseException:
            if self._lock is not None:  # not until the error's traceback is forgotten
                self._lock.close()
            raise
        self._name = self._stored.name
        attributes = dict(self._stored.description["settings"])
        if head is None:
            return attributes
        self._on = _OnCheckpoint(head, temperature)
        return attributes | {"head": self._on.head, "temperature": temperature}

    def _open_for_model(self, model: Any, name: str | None, temperature: float) -> dict[str, Any]:
        from .. import transformers

        self._name = name or _name_of(model)
        self._states = StoredStates(self.cache, self._name, model)
        self._on = partial(transformers.head_of, model, temperature=temperature)
        weight = model.get_output_embeddings().weight
        return {"temperature": temperature, "head": self._on(weight.new_zeros(1, weight.shape[1]))}

    def _open_for_scorer(self, scorer: Any, name: str | None, revision: str | None) -> dict[str, Any]:
        own = getattr(scorer, "fingerprint", None)
        if own is None and revision is None:
            raise TypeError(
                "revision must be given for a scorer without an attribute fingerprint: the weights behind it cannot "
                "be seen, and scores of others would be taken for theirs. A commit or a date does"
            )
        self._name = name or str(getattr(scorer, "model", None) or type(scorer).__name__)
        attributes = {x: getattr(scorer, x) for x in _LOOKED_AT if hasattr(scorer, x)}
        # one with a head returns hidden states, the same at every temperature
        settings: dict[str, Any] = {"scores": "hidden"}
        if attributes.get("head") is None:
            settings = {x: attributes[x] for x in ("temperature", "top_k") if x in attributes}
        self._stored = StoredModel(self.cache, self._name, json.dumps([own, revision]), settings)
        return attributes

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
    ) -> LinearHead | TokenLogProbs | TopKLogProbs:
        """Score the last K tokens of each sequence.

        Args:
            input_ids: (B, T) integer, padded on any side.
            attention_mask: (B, T), 0 at padding.
            completion_mask: (B, K): which of the last K tokens to score; at the others scores are 0 (ids -1).

        Returns:
            What the teacher returns, on the device of ``input_ids``.

        Raises:
            TeacherCacheError: without a teacher, a missing or damaged sequence; with one, a teacher or a head that is
                not the one whose scores are stored.
        """
        batch = input_ids, attention_mask, completion_mask
        stored = self._stored if self._states is None else self._states.now(input_ids.device)
        ask = None if self._teacher is None else partial(self._ask, batch)
        if not self._checked:
            self._compare(stored, batch)
        return self._scores(stored.lookup(*batch, ask), stored)

    @torch.no_grad()
    def _ask(self, batch: tuple[Tensor, Tensor, Tensor], rows: Tensor) -> files.Scores:
        """Scores of some rows of a batch from the teacher."""
        ids, attention, wanted = (x[rows.to(x.device)] for x in batch)
        if isinstance(self._teacher, nn.Module):
            from ..transformers import last_hidden_state

            return {"hidden": last_hidden_state(self._teacher, ids, attention, keep=wanted.shape[1])}
        scored = self._teacher(ids, attention, wanted)
        if not isinstance(scored, (TokenLogProbs, TopKLogProbs, LinearHead)):
            raise TypeError(
                "the scorer of a cache must return fused_gopd.TokenLogProbs, TopKLogProbs or LinearHead, got "
                f"{type(scored).__name__}"
            )
        if scored.token_shape != wanted.shape:
            raise ValueError(
                f"the scorer {self._name!r} must return {type(scored).__name__} of the token shape "
                f"{tuple(wanted.shape)} of completion_mask, got {tuple(scored.token_shape)}"
            )
        if isinstance(scored, LinearHead):
            self._on = partial(_like, scored)
            return {"hidden": scored.hidden}
        return scored.tensors

    def _compare(self, stored: StoredModel, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Ask a scorer again for the shortest sequence that is stored: has it the scores that it had?"""
        rows = sorted(_Row.of_batch(*batch), key=lambda row: len(row.ids))
        for row in rows:
            kept = stored._read(row, offline=False)
            if kept is None:
                continue
            mask = batch[2][row.index].bool()
            again = {n: x[0][mask.to(x.device)] for n, x in self._ask(batch, torch.tensor([row.index])).items()}
            reason = _difference(kept, {name: _on_disk(name, x) for name, x in again.items()})
            if reason is not None:
                raise TeacherCacheError(
                    f"{self._name!r} is not the teacher whose scores {self.cache.path} has: {reason}. Give it another "
                    f"revision, or remove {self.cache.path / stored.folder}"
                )
            self._checked = True
            return

    def _scores(self, scores: files.Scores, stored: StoredModel) -> LinearHead | TokenLogProbs | TopKLogProbs:
        if "token_ids" in scores:
            return TopKLogProbs(scores["token_ids"], scores["logprobs"], scores.get("sampled_logprobs"))
        if "logprobs" in scores:
            return TokenLogProbs(scores["logprobs"])
        if self._on is None:
            raise TeacherCacheError(
                f"{self.cache.path} has hidden states of {self._name!r}, which need its head: give head=, the path of "
                "its folder"
            )
        head = self._on(scores["hidden"])
        self._check_head(head, stored)
        return head

    def _check_head(self, head: LinearHead, stored: StoredModel) -> None:
        """Without a teacher, compare the head with the one that the states were made for; once."""
        if self._teacher is not None:
            stored.remember_head(head)
            return
        if self._known_weight is head.weight:
            return
        if "head" in stored.description and stored.description["head"] != head_fingerprint(head):
            raise TeacherCacheError(
                f"head must be the head of {self._name!r}, whose states {self.cache.path} has: its weight "
                f"{tuple(head.weight.shape)} {head.weight.dtype}, bias, factor or softcap are of another model"
            )
        self._known_weight = head.weight

    def _find(self, name: str | None) -> StoredModel:
        """The only model of the cache, or the only one of a name; the name of its folder is one, too."""
        models = self.cache.models()
        found = {
            folder: x for folder, x in models.items() if name is None or name == folder or name in x.get("names", [])
        }
        if len(found) != 1:
            what = "one model, give its name" if name is None else f"one model called {name!r}"
            has = "; ".join(f"{folder}, {' or '.join(x['names'])} {x['settings']}" for folder, x in models.items())
            raise TeacherCacheError(
                f"without a teacher {self.cache.path} must have the scores of {what}; it has {has or 'none'}. A "
                "folder's name, which stands first, may be given as name, too"
            )
        (x,) = found.values()
        called = name if name is not None and name in x["names"] else x["names"][0]
        return StoredModel(self.cache, called, x["fingerprint"], x["settings"])


def _like(head: LinearHead, hidden: Tensor) -> LinearHead:
    """The head of a scorer on other states; its temperature is the scorer's."""
    return replace(head, hidden=hidden)


class _OnCheckpoint:
    """A head of a checkpoint on states, where they are; in float32 for states of a model that was loaded so."""

    def __init__(self, head: Any, temperature: float) -> None:
        from ..checkpoint import CheckpointHead, load_head

        if not isinstance(head, (str, Path, CheckpointHead)):
            raise TypeError(f"head must be a path, or what load_head returns, got {type(head).__name__}")
        self.head = head if isinstance(head, CheckpointHead) else load_head(head)
        if self.head.final_norm is not None:
            raise ValueError("head must be without the final norm (norm=False): states are stored after it")
        self._temperature = temperature

    def __call__(self, hidden: Tensor) -> LinearHead:
        wider = torch.promote_types(self.head.weight.dtype, hidden.dtype)
        if (self.head.weight.dtype, self.head.weight.device) != (wider, hidden.device):
            bias = None if self.head.bias is None else self.head.bias.to(hidden.device)
            self.head = replace(self.head, weight=self.head.weight.to(hidden.device, wider), bias=bias)
        return self.head(hidden, temperature=self._temperature)


def _name_of(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def _difference(before: files.Scores, now: files.Scores) -> str | None:
    """How scores of one sequence differ; None if only by rounding."""
    if before.keys() != now.keys():
        return f"it returns {', '.join(sorted(now))}, and {', '.join(sorted(before))} are stored"
    if "hidden" in before:
        a, b = before["hidden"].float(), now["hidden"].float()
        if a.shape != b.shape:
            return f"its states are {tuple(b.shape)}, and {tuple(a.shape)} are stored"
        share = float((a - b).norm() / a.norm().clamp(min=1e-30))
        return None if share <= _SAME_STATES else f"its states of one sequence differ by {share:.2f} of their norm"
    name = "sampled_logprobs" if "sampled_logprobs" in before else "logprobs"
    a, b = before[name].float(), now[name].float()
    if a.ndim == 2:
        a, b = a.max(dim=1).values, b.max(dim=1).values
    apart = (a - b)[torch.isfinite(a) & torch.isfinite(b)].abs()
    mean = float(apart.mean()) if len(apart) else 0.0
    return None if mean <= _SAME_LOGPROBS else f"its log-probs of one sequence differ by {mean:.2f} in the mean"
