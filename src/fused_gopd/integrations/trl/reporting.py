"""What a run of both trainers reports: metrics, the model card, and models that cannot be those that were meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.utils.logging import get_logger

from ... import Metrics
from ...objective.kl_estimates import KL_ESTIMATES
from ...output import GOPDOutput, metrics_of
from ...targets import Frozen
from ...tokens import widest
from .. import misfit
from ..cache import TeacherCache
from . import card, report
from .batch import Batch
from .frozen import FrozenModel
from .phases import PhasesMixin
from .watch import Setting, Watch

logger = get_logger(__name__)

# not logged: what TRL itself logs, of all tokens (False) and of those of a route (True)
_LOGGED = {False: ("tokens", "loss", "entropy"), True: ("tokens",)}


class ReportingMixin(PhasesMixin):
    """Logs the metrics of the loss beside TRL's, writes the model card, and warns."""

    accelerator: Any
    args: Any
    model: Any
    _metrics: Any
    add_callback: Callable[[Any], None]
    _cache: TeacherCache | None
    _frozen: list[FrozenModel]
    _card_sources: list[tuple[str, str]]
    _report: report.HtmlReport | None = None
    _routes: dict[Any, int]
    _unchecked: set[str]
    _vocab_size: int
    state: Any
    _watch: Watch | None = None
    warn: Callable[[str], None] = staticmethod(logger.warning)
    """Shows a warning when it is found, in the log; called on the main process only."""

    def _begin_reports(self) -> None:
        """Nothing is known yet. Called once, before models are loaded: they may be warned of."""
        self.warnings: list[str] = []
        """What went wrong so far, one sentence each, with its figure and its remedy (docs/warnings.md)."""
        # since the last log, by mode: sums and counts, each with "" or "/ROUTE"; and largest values by name
        self._gopd_metrics: dict[str, list[tuple[str, Metrics]]] = {"train": [], "eval": []}
        self._gopd_maxima: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._cache_logged: dict[str, int] = {}  # the cache's counts at the last log

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        if self.accelerator.is_main_process:
            self.warn(text)

    def add_report(self, **options: Any) -> None:
        """Write an HTML page about the run: see :class:`.report.HtmlReport`, which has the options."""
        self._report = report.HtmlReport(self, **options)
        self.add_callback(self._report)

    def _record(self, out: GOPDOutput, batch: Batch) -> None:
        """Keep the metrics of a batch until the next log, and some of its sequences for the report."""
        if self._report is not None and self.accelerator.is_main_process:
            self._report.take(out, batch)
        mode = "train" if self.model.training else "eval"
        self._gopd_metrics[mode].append(("", out.metrics()))
        index = batch.teacher_index
        if index is not None and len(self._routes) > 1:  # also of routes without a sequence here: ranks have them, too
            for route, i in self._routes.items():
                rows = (index == i).to(batch.mask.device)
                found = metrics_of(out, batch.mask.bool() & rows[:, None])
                length = torch.stack([batch.completion_mask[rows].sum(), rows.sum()]).to(found.sums)
                found = Metrics((*found._names, "length"), torch.cat([found.sums, length[None]]))
                self._gopd_metrics[mode].append((f"/{route}", found))
        if not isinstance(out.reward_scale, Tensor):  # of one per token the mean is among the metrics
            self._metrics[mode]["gopd/reward_scale"].append(out.reward_scale)

    @torch.no_grad()
    def _record_sampler(self, out: GOPDOutput, batch: Batch, sampler_step: Tensor | None) -> None:
        """Keep how far the policy that sampled a batch is from the student, and how many optimizer steps it is old."""
        mode = "train" if self.model.training else "eval"
        if sampler_step is not None and mode == "train":
            self._metrics[mode]["gopd/staleness"].append(self.state.global_step - int(sampler_step))
        if batch.rollout_logprobs is None or out.student_logprobs is None:
            return
        own = out.student_logprobs if batch.old_logprobs is None else batch.old_logprobs
        live = batch.mask.bool() & ~torch.isneginf(own)
        wide = widest(live.device)
        log_ratio = torch.where(live, own.to(wide) - batch.rollout_logprobs.to(wide), 0.0)
        sums = torch.stack((KL_ESTIMATES["k3"](log_ratio).sum(), live.sum().to(wide)))  # k3 of a ratio of 1 is 0
        self._gopd_metrics[mode].append(("", Metrics(("sampler_kl",), sums[None])))
        weights = log_ratio.exp() if out.importance is None else out.importance.to(wide)
        largest = torch.where(live, weights, 0.0).max()
        maxima = self._gopd_maxima[mode]
        name = "importance_max"
        maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

    def _log_gopd_metrics(self) -> None:
        """Add the means over all tokens of all ranks since the last log to TRL's metrics, with one host sync."""
        mode = "train" if self.model.training else "eval"
        if not self._gopd_metrics[mode]:
            return
        parts = _sums_by_name(self._gopd_metrics[mode])
        sums = [x for part in parts.values() for x in part.values()]
        total = self.accelerator.reduce(torch.stack(sums), reduction="sum").cpu()
        self._gopd_metrics[mode].clear()
        if self._cache is not None:
            now = self._cache.stats()
            hits, misses = (now[name] - self._cache_logged.get(name, 0) for name in ("hits", "misses"))
            self._cache_logged = now
            if hits + misses:
                self._metrics[mode]["gopd/cache_hits"].append(hits / (hits + misses))
        for (suffix, part), own in zip(parts.items(), total.split([len(x) for x in parts.values()]), strict=True):
            for name, value in Metrics(tuple(part), own).to_dict().items():
                if name not in _LOGGED[bool(suffix)]:
                    self._metrics[mode][f"gopd/{name}{suffix}"].append(value)
                elif name == "tokens" and not suffix and mode == "train":
                    self._log_phases(value)
        for name, largest in self._gopd_maxima[mode].items():
            self._metrics[mode][f"gopd/{name}"].append(self.accelerator.gather(largest).max().item())
        self._gopd_maxima[mode].clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._log_gopd_metrics()
        super().log(logs, start_time)  # type: ignore[misc]
        if self._watch is None:
            self._watch = Watch(self._setting())
        for text in self._watch.read(self.state.log_history):
            self._warn(text)

    def _setting(self) -> Setting:
        args = self.args
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return Setting(
            max_completion_length=args.max_completion_length,
            completions_per_step=batch / getattr(args, "num_iterations", 1),
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._report is not None:
            self.state.stateful_callbacks[report.NAME] = self._report.state()
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **_: Any
    ) -> None:
        """Write this package's card instead of TRL's, unless there is another card, or one that was edited."""
        path = Path(self.args.output_dir) / "README.md"
        if not cast("Any", self).is_world_process_zero() or (
            path.exists() and not card.is_unchanged(path.read_text(encoding="utf-8"))
        ):
            return
        text = card.of_trainer(self, model_name or path.parent.name, dataset_name)
        path.write_text(text, encoding="utf-8")

    def _name_misfits(
        self, out: GOPDOutput, teacher: Frozen | list[Frozen] | None, ref: Frozen | None, index: Any, batch: Batch
    ) -> None:
        """Warn once of a teacher or reference that cannot be the one that was meant, by the first tokens it scored."""
        if not self._unchecked or out.student_logprobs is None or batch.mask.numel() < misfit.LEAST_TOKENS:
            return
        for frozen in self._frozen:
            scored, logprobs = (ref, out.ref_logprobs) if frozen.index is None else (teacher, out.teacher_logprobs)
            # what has been compared costs no host sync, which the index of the teacher is
            if frozen.name not in self._unchecked or scored is None or logprobs is None:
                continue
            rows = frozen.rows_of(batch)
            if not bool(rows.any()):
                continue
            source = scored[int(index[rows][0])] if isinstance(scored, list) else scored
            mask = batch.mask.bool() & rows.to(batch.mask.device)[:, None]
            if int(mask.sum()) < misfit.LEAST_TOKENS:
                continue
            self._unchecked.remove(frozen.name)
            shifted = misfit.shifts_of(source, batch.token_ids, self._vocab_size)
            found = misfit.misfit_of(logprobs, out.student_logprobs, mask, self._vocab_size, shifted)
            if found is not None:
                self._warn(f"{frozen.name} {found}")


def _sums_by_name(metrics: list[tuple[str, Metrics]]) -> dict[str, dict[str, Tensor]]:
    """Sums and counts by suffix and name. Steps in which lambda cancels a model lack the metrics that need it."""
    total: dict[str, dict[str, Tensor]] = {}
    for suffix, each in metrics:
        part = total.setdefault(suffix, {})
        for name, sums in zip(each._names, each.sums, strict=True):
            part[name] = part[name] + sums if name in part else sums
    return total
