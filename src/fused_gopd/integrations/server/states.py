"""A teacher on another machine that sends its last hidden states: every estimator, exact, at any temperature.

:class:`HiddenStateTeacher` sends token ids and gets hidden states (tokens, H) back. A copy of the teacher's head here
turns them into logits, as :class:`fused_gopd.LinearHead`. vLLM's connector writes the states into safetensors files of
a shared folder, SGLang puts them into its answer. ``docs/integrations/server.md`` has the servers' options.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import math
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ...heads import LinearHead
from ...loss import token_logprobs
from ...values import require_positive
from ..batches import sequences_to_score
from ..checkpoint import CheckpointHead, load_head
from . import PROBE_TEXT, ServerTeacher
from .formats import FORMATS, Format, Position, ScoringRequest, UnexpectedAnswer, scored
from .http import LostAnswerError, Request, TeacherServerError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["HiddenStateTeacher"]

logger = logging.getLogger(__name__)

# vLLM names files by its request ids
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
# Seconds until a file that was written on another machine is seen here; network file systems keep listings for a while.
_VISIBLE = 5.0
_STATES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_FLOAT32 = torch.finfo(torch.float32).eps


class _Answer(NamedTuple):
    """The states of one sequence, (n, L, H): L is 1 unless the server sends several layers; log-probs of ids[1:]."""

    states: Tensor
    positions: list[Position] | None


class _Held:
    """Arguments in an object that shows none of them."""

    def __init__(self, base_url: str, options: dict[str, Any]) -> None:
        self.base_url, self.options = base_url, options


class HiddenStateTeacher(ServerTeacher):
    """Gets last hidden states from an inference server, and has a copy of the teacher's head here.

    Every estimator is possible, ``"full"`` above all, and any temperature, since the whole distribution is known here.
    Beside the states the constructor asks for the server's own log-probs of the same tokens. Where the states and the
    head do not give these within rounding, it says which it is, as far as that can be told: a state before the final
    norm, shifted by one position, of another layer, or another model's head. Later the first sequence of each call is
    compared in the same way.

    Args:
        base_url, model: as for :class:`ServerTeacher`.
        head: the path of the teacher's folder, of which only the head (and the final norm, where the server sends
            states from before it) is read; or what :func:`fused_gopd.integrations.checkpoint.load_head` read.
        states_dir: for ``api="vllm"`` the folder into which its connector writes (``shared_storage_path``), as this
            machine sees it. Files in it are deleted once they are read.
        temperature: at which the student samples.
        options: as for :class:`ServerTeacher`, except ``top_k``, ``batch_size`` and ``vocab_size``. ``api`` is
            ``"vllm"`` or ``"sglang"``.

    Attributes:
        head: the :class:`fused_gopd.integrations.checkpoint.CheckpointHead` of the states that a call returns.
        capabilities: what the server sends; its ``states`` says whether they are from before the final norm.

    Raises:
        ValueError, TypeError: an invalid argument.
        TeacherServerError: naming the server, what was expected and what came.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        head: CheckpointHead | str | Path,
        states_dir: str | Path | None = None,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        # no variable of this frame has a key, which a traceback may show
        held = _Held(base_url, options)
        del base_url, options
        api = held.options.get("api", "vllm")
        if api not in ("vllm", "sglang"):
            raise ValueError(f"api must be 'vllm' or 'sglang', which send hidden states, got {api!r}")
        for name in ("top_k", "batch_size", "vocab_size"):
            if (given := held.options.get(name)) is not None:
                raise ValueError(f"{name} is an option of ServerTeacher, which gets log-probs, got {given!r}")
        if (api == "vllm") != (states_dir is not None):
            raise ValueError(
                "states_dir must be given: the folder in which vLLM writes hidden states (shared_storage_path of its "
                "connector), as this machine sees it"
                if api == "vllm"
                else "states_dir is for api='vllm': SGLang sends hidden states in its answer"
            )
        require_positive("temperature", temperature)
        self._given = head
        # of the states as the server sends them: with the final norm where they are from before it
        self._head = load_head(head) if isinstance(head, (str, Path)) else head
        if not isinstance(self._head, CheckpointHead):
            raise TypeError(f"head must be a path, or what load_head returns, got {type(head).__name__}")
        self._folder = None if states_dir is None else _Folder(Path(states_dir))
        super().__init__(held.base_url, model, **held.options)
        self.temperature = float(temperature)
        self.head = dataclasses.replace(self._head, final_norm=None)
        self.vocab_size = self.head.vocab_size
        self.capabilities = dataclasses.replace(self.capabilities, states=self._states, temperature=self.temperature)

    def __call__(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
    ) -> LinearHead:
        """Hidden states that predict the last K tokens of each sequence.

        Args:
            input_ids: (B, T) integer, prompts and completions, padded on any side.
            attention_mask: (B, T), 0 at padding.
            completion_mask: (B, K), K <= T: which of the last K tokens to score. The states of others are 0, and
                sequences without one to score are not sent.

        Returns:
            LinearHead of (B, K, H) states in the head's dtype, on input_ids' device.
        """
        mask, sequences, wanted = sequences_to_score(input_ids, attention_mask, completion_mask)
        sequences, start = self._checked_sequences(sequences, [w[0] for w in wanted])
        hidden = torch.zeros(*mask.shape, self._head.hidden_size, dtype=self._head.dtype)
        if sequences:
            answers = self._ask_states(sequences, start)
            first = answers[0]
            self._require_match(first.states[:, -1], sequences[0][start[0] :], _logprobs(first, sequences[0], start[0]))
            # row-major order of the mask is the order of sequences and positions
            parts = [a.states[[n - w[0] for n in w], -1] for a, w in zip(answers, wanted, strict=True)]
            hidden[mask] = torch.cat(parts).to(hidden.dtype)
        self._head = self._head.to(input_ids.device)
        return self._head(hidden.to(input_ids.device), temperature=self.temperature)

    def score(self, *_: Any, **__: Any) -> Any:
        """Not of this teacher: :func:`fused_gopd.token_logprobs` scores tokens with what a call returns."""
        raise TypeError(
            "a HiddenStateTeacher has no score(): fused_gopd.token_logprobs(teacher(...), token_ids) scores"
        )

    @property
    def fingerprint(self) -> str:
        """What a cache of scores knows this teacher by: that of a :class:`ServerTeacher`, and its head's."""
        return f"{super().fingerprint} {self._head.fingerprint}"

    def require_requested_ids(self, k: int | None = None) -> None:
        """Nothing is required: the head here scores any tokens."""

    # ------------------------------------------------------------------------------------------- requests and answers

    def _ask_states(self, sequences: list[list[int]], start: Sequence[int]) -> list[_Answer]:
        """States that predict each sequence from ``start`` on; with log-probs for the first one, for SGLang for all."""

        async def read(which: int, answer: Any) -> _Answer:
            request = self._single(sequences[which], start[which])
            positions = None
            with self._reading(request):
                read_states = self._from_file if self._folder is not None else self._from_answer
                states = self._checked_states(await read_states(answer, request), sequences[which])
                if self._scores(which):
                    (positions,) = self._format.positions(answer, request)
            return _Answer(states[start[which] - 1 : -1].clone(), positions)

        requests = [self._states_request(self._single(ids, start[i]), i) for i, ids in enumerate(sequences)]
        return self._connection.request_all(requests, read)

    def _asked(self, request: ScoringRequest) -> str:
        return "hidden states"

    def _single(self, ids: list[int], start: int) -> ScoringRequest:
        # one sequence a request: of several, vLLM names the file of the first only
        return ScoringRequest(self.model, [ids], [start], 0, texts=True)

    def _scores(self, which: int) -> bool:
        """Whether a request asks for log-probs too. SGLang's echo the ids; vLLM's files have them."""
        return which == 0 or self._folder is None

    def _states_request(self, request: ScoringRequest, which: int) -> Request:
        if self._folder is None:
            return self._http_request(request, return_hidden_states=True)
        return self._http_request(request, **({} if self._scores(which) else {"prompt_logprobs": None}))

    async def _from_file(self, answer: Any, request: ScoringRequest) -> Tensor:
        """(n, L, H) from the file that vLLM's connector wrote, whose token ids are compared."""
        named = answer.get("kv_transfer_params")
        if named is None:
            raise UnexpectedAnswer(
                "no kv_transfer_params: start vLLM with --speculative-config for extract_hidden_states and "
                "--kv-transfer-config for a connector of hidden states, as docs/integrations/server.md shows"
            )
        path = named["hidden_states_path"]
        name = PurePosixPath(path).name
        if ".." in PurePosixPath(path).parts or not _FILE.fullmatch(name):
            raise UnexpectedAnswer(f"hidden_states_path must be a safetensors file of its shared folder, got {path!r}")
        folder = cast("_Folder", self._folder)
        found = await folder.read(name, self._connection.timeout)
        if not {"hidden_states", "token_ids"} <= set(found):
            raise UnexpectedAnswer(f"{name} must have hidden_states and token_ids, got {', '.join(sorted(found))}")
        if found["token_ids"].tolist() != request.sequences[0]:
            raise UnexpectedAnswer(f"{name} has the hidden states of other token ids than those that were sent")
        states = found["hidden_states"]
        return states[:, None] if states.ndim == 2 else states

    async def _from_answer(self, answer: Any, request: ScoringRequest) -> Tensor:
        """(n, 1, H) from SGLang's answer, whose first entry has the prompt's states."""
        meta = answer[0]["meta_info"]
        if not meta.get("hidden_states"):
            raise UnexpectedAnswer("no hidden_states in meta_info: start SGLang with --enable-return-hidden-states")
        return torch.tensor(meta["hidden_states"][0], dtype=torch.float32)[:, None]

    def _checked_states(self, states: Tensor, ids: list[int]) -> Tensor:
        expected = f"({len(ids)}, layers, {self._head.hidden_size})"
        if states.ndim != 3 or not states.shape[1] or states.dtype not in _STATES:
            raise UnexpectedAnswer(f"hidden states must be floating {expected}, got {states.dtype} {states.shape}")
        if len(states) != len(ids):
            short = ""
            if self.api == "sglang":
                short = ": start SGLang with --disable-radix-cache --chunked-prefill-size -1, or it sends a part"
            raise UnexpectedAnswer(f"hidden states must be of {len(ids)} positions, got {len(states)}{short}")
        if states.shape[2] != self._head.hidden_size:
            raise UnexpectedAnswer(
                f"hidden states have {states.shape[2]} entries, and the head ({self._head.source}) takes "
                f"{self._head.hidden_size}: it is another model's"
            )
        if not bool(states.isfinite().all()):
            raise UnexpectedAnswer("hidden states must be finite, and some are NaN or infinite")
        return states

    # ------------------------------------------------------------------------------------------------ at the start

    def _find_format(self) -> Format:
        """The form that every server of the kind answers. Others have log-probs of more tokens, which states give."""
        return FORMATS[self.api][-1]

    def _probe(self, tokenizer: Any) -> None:
        """Find the head that turns the server's states into its own log-probs, and compare the texts of tokens."""
        texts = [] if tokenizer is None else list(tokenizer.encode(PROBE_TEXT, add_special_tokens=False))
        # low ids are often special tokens
        ids = [*texts, *((300 + 7 * i) % self._head.vocab_size for i in range(48))]
        ids = ids[: max(2, (self.max_model_len or len(ids) + 1) - 1)]
        (answer,) = self._ask_states([ids], [1])
        logprobs = _logprobs(answer, ids, 1)
        self._head = self._matching_head(answer.states, ids, logprobs)
        if self._folder is not None:
            self._folder.is_shared = True
        where = "in its answers" if self._folder is None else f"in files of {self._folder.path}"
        kind = "before" if self._head.final_norm is not None else "after"
        dtype = str(answer.states.dtype).removeprefix("torch.")
        sent = "numbers" if self._folder is None else dtype
        self._states = f"hidden states from {kind} the final norm, {sent}, {where}"
        logger.info("%s (%s) sends %s", self.base_url, self.model, self._states)
        if tokenizer is not None:
            n = len(texts[: len(ids)])
            self._compare_texts(tokenizer, ids[:n], cast("list[Position]", answer.positions)[: n - 1])

    def _heads(self) -> Iterator[CheckpointHead]:
        """The heads to try: the given one; for a path with the final norm too, which vLLM's states need."""
        if not isinstance(self._given, (str, Path)):
            yield self._head
            return
        for norm in (True, False) if self.api == "vllm" else (False, True):
            if not norm:
                yield self._head
                continue
            try:
                yield load_head(self._given, norm=True)
            except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                self._no_norm = str(error)

    def _matching_head(self, states: Tensor, ids: list[int], logprobs: Tensor) -> CheckpointHead:
        """The first head of which the states (n - 1, L, H) give the server's log-probs of ids[1:], (n - 1,)."""
        self._no_norm = ""
        heads = []
        for head in self._heads():
            if _match(head, states[:, -1], ids[1:], logprobs).fits:
                return head
            heads.append(head)
        raise TeacherServerError(self._mismatch(heads, states, ids, logprobs))

    def _mismatch(self, heads: list[CheckpointHead], states: Tensor, ids: list[int], logprobs: Tensor) -> str:
        """What is wrong with states that do not give the server's log-probs, as far as that can be told."""
        last = states[:, -1]
        found = min((_match(head, last, ids[1:], logprobs) for head in heads), key=lambda m: m.distance)
        message = (
            f"the hidden states of {self.model!r} on {self.base_url}, with the head of {self._head.source}, must give "
            f"the server's own log-probs of the same tokens: they are off by {found.distance:.3g} on average (rounding "
            f"explains {found.rounding:.1g}; mean log-prob {found.here:.3f} here, {found.there:.3f} there)"
        )
        for head in heads:
            if len(last) > 2 and _match(head, last[1:], ids[1:-1], logprobs[:-1]).fits:
                return f"{message}. They are shifted by one: the state of a position stands at the one after it"
            if len(last) > 2 and _match(head, last[:-1], ids[2:], logprobs[1:]).fits:
                return f"{message}. They are shifted by one: the state of a position stands at the one before it"
            for layer in range(states.shape[1] - 1):
                if _match(head, states[:, layer], ids[1:], logprobs).fits:
                    return (
                        f"{message}. Those of entry {layer} of {states.shape[1]} layers do, and not those of the last"
                    )
        if not isinstance(self._given, (str, Path)):
            norm = self._head.final_norm is None
            try:
                other = load_head(self._head.source, norm=norm)
            except (TypeError, ValueError, RuntimeError, NotImplementedError):
                other = None
            if other is not None and _match(other, last, ids[1:], logprobs).fits:
                where = "before" if norm else "after"
                return f"{message}. They are from {where} the final norm: pass load_head(..., norm={norm}), or the path"
        layers = _layers(self._head)
        count = "the model's number of layers" if layers is None else f"{layers}, the model's number of layers"
        norm_error = f". The final norm could not be applied: {self._no_norm}" if self._no_norm else ""
        return (
            f"{message}. They are of another layer (the last entry of vLLM's eagle_aux_hidden_state_layer_ids must be "
            f"{count}), or the head is another model's, or the server's head is quantised{norm_error}"
        )

    def _require_match(self, states: Tensor, ids: list[int], logprobs: Tensor) -> None:
        found = _match(self._head, states, ids, logprobs)
        if not found.fits:
            raise TeacherServerError(
                f"the hidden states of {self.model!r} on {self.base_url} no longer give its own log-probs: they are "
                f"off by {found.distance:.3g} on average (rounding explains {found.rounding:.1g}). Was it started "
                "again with another model or other options?"
            )


# ------------------------------------------------------------------------------------------- states against log-probs


class _Match(NamedTuple):
    """Log-probs of the same tokens here and on the server: mean absolute difference, what rounding explains, means."""

    distance: float
    rounding: float
    here: float
    there: float

    @property
    def fits(self) -> bool:
        return self.distance <= self.rounding


def _match(head: CheckpointHead, states: Tensor, ids: Sequence[int], logprobs: Tensor) -> _Match:
    """Compare the log-probs that (n, H) states give with the server's, (n,).

    Both sides round, to the coarser dtype of states and head, of unit roundoff u. A rounding of x is at most u |x|, its
    standard deviation u |x| / sqrt(3). States and head are rounded four times, before and after the norm on both sides,
    with effect sqrt(sum (h w)^2) on the logit z = h.w; the logits once, with effects |z| and |log sum exp z|. Products
    in float32 add an error that grows with sqrt(H). Taken as independent they make the standard deviation s of a
    log-prob. The mean absolute difference of n of them is 0.8 s, itself with deviation 0.6 s / sqrt(n): up to
    (1 + 4 / sqrt(n)) s is rounding.
    """
    tokens = torch.tensor(ids, device=head.device)
    at_head = head(states.to(head.device, head.dtype))
    here = cast("Tensor", token_logprobs(at_head, tokens)).double().cpu()
    there = logprobs.double()
    rows = at_head.weight[tokens].double()
    products = at_head.hidden.double() * rows * at_head.logit_scale
    z = (products.sum(-1) + (0 if at_head.bias is None else at_head.bias[tokens].double() * at_head.logit_scale)).cpu()
    spread = products.square().sum(-1).sqrt().cpu()
    unit = max(torch.finfo(states.dtype).eps, torch.finfo(head.dtype).eps) / 2
    accumulated = _SMALLEST_FLOAT32 * math.sqrt(head.hidden_size) * spread
    total = here.abs() + z.abs()  # at least |log sum exp z|
    rounded = unit**2 / 3 * (z.square() + total.square() + 4 * spread.square())
    deviation = (rounded + accumulated.square()).sqrt()
    finite = here.isfinite() & there.isfinite()
    if not bool(finite.any()):
        return _Match(math.inf, 0.0, float(here.mean()), float(there.mean()))
    distance = (here - there).abs()[finite].mean()
    # where one alone is minus infinity they are not of one model
    distance = distance if bool((here.isfinite() == there.isfinite()).all()) else torch.tensor(math.inf)
    means = (float(x[finite].mean()) for x in (here, there))
    allowed = (1 + 4 / math.sqrt(int(finite.sum()))) * deviation[finite].mean()
    return _Match(float(distance), float(allowed), *means)


def _logprobs(answer: _Answer, ids: list[int], start: int) -> Tensor:
    """(n - start,) of the server's, checked as :class:`ServerTeacher` checks them."""
    request = ScoringRequest("", [ids], [start], 0)
    try:
        return torch.tensor(scored(request, 0, cast("list[Position]", answer.positions), None).logprobs)
    except UnexpectedAnswer as error:
        raise TeacherServerError(f"the server's log-probs of the states' tokens: {error}") from None


def _layers(head: CheckpointHead) -> int | None:
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(head.source, local_files_only=True)
        return int(config.get_text_config().num_hidden_layers)
    except (OSError, ValueError, AttributeError):
        return None


# ------------------------------------------------------------------------------------------------- the shared folder


class _Folder:
    """The folder into which vLLM's connector writes. Its lock beside each file is held until the file is whole."""

    def __init__(self, path: Path) -> None:
        if fcntl is None:
            raise ValueError(
                "states_dir must be on a POSIX system: by its file locks (fcntl), which Windows does not have, the "
                "server says that a file is whole. Run this in WSL, or take api='sglang'"
            )
        if not path.is_dir():
            raise ValueError(f"states_dir must be a folder, got {str(path)!r}")
        self.path = path
        self.is_shared = False  # whether a file of the server was found in it
        self._deletes = True

    async def read(self, name: str, timeout: float) -> dict[str, Tensor]:
        """The tensors of a file once it is whole; the file is deleted."""
        lock = await self._opened(f"{name}.lock")
        if lock is None:
            raise self._missing(name)
        try:
            deadline = time.monotonic() + timeout
            while not self._is_free(lock):
                if time.monotonic() > deadline:
                    raise LostAnswerError(f"{name} is still being written after timeout={timeout:g} s")
                await asyncio.sleep(0.002)
            file = await self._opened(name)
            if file is None:
                raise LostAnswerError(f"{name} was not written: the server stopped, or its log says why")
            with os.fdopen(file, "rb") as opened:
                content = await asyncio.to_thread(opened.read)
        finally:
            os.close(lock)
        self._delete(name)
        try:
            return safetensors.torch.load(content)
        except (SafetensorError, ValueError) as error:
            raise LostAnswerError(f"{name} is cut or damaged ({error})") from None

    async def _opened(self, name: str) -> int | None:
        """A descriptor of a regular file of the folder, never through a link; None if there is none."""
        deadline = time.monotonic() + _VISIBLE
        while True:
            try:
                found = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    return None
                await asyncio.sleep(0.02)
                continue
            except OSError as error:
                why = {
                    errno.ELOOP: ": links are not followed",
                    errno.EACCES: ": it belongs to the server's user, as whom this process must run",
                }.get(error.errno or 0, "")
                raise TeacherServerError(f"{self.path / name} cannot be read ({error.strerror}){why}") from None
            if stat.S_ISREG(os.fstat(found).st_mode):
                return found
            os.close(found)
            raise TeacherServerError(f"{self.path / name} must be a regular file")

    def _is_free(self, lock: int) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise TeacherServerError(
                f"states_dir ({self.path}) must be on a file system with locks, by which the server says that a file "
                f"is whole ({error.strerror})"
            ) from None
        return True

    def _missing(self, name: str) -> Exception:
        if (self.path / name).exists():
            return TeacherServerError(
                f"{self.path / name} has no lock beside it, so that nothing tells when it is whole: start vLLM without "
                "use_synchronization_lock=false"
            )
        message = f"the server wrote {name}, and states_dir ({self.path}) does not have it"
        if self.is_shared:
            return LostAnswerError(message)
        return TeacherServerError(f"{message}: it must be the connector's shared_storage_path, as this machine sees it")

    def _delete(self, name: str) -> None:
        try:
            for each in (name, f"{name}.lock"):
                (self.path / each).unlink(missing_ok=True)
        except OSError as error:
            if self._deletes:
                warnings.warn(
                    f"{self.path / name} cannot be deleted ({error.strerror}): files stay there, delete them now and "
                    "then",
                    stacklevel=2,
                )
            self._deletes = False
