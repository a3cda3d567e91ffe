"""Each row of docs/off-policy.md: the call as it stands there, against the framework's formula written out.

A formula is a function of the sampled tokens' log-probs (B, T) and the page's names. It is in float64, and knows
nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from pages import ROOT, python_snippets

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (ROOT / "docs" / "off-policy.md").read_text(encoding="utf-8")


def rows() -> dict[tuple[str, str], tuple[str, str]]:
    """By section and first cell: the call of a row, and its remark."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    section = ""
    for line in PAGE[PAGE.index("## As frameworks call it") :].split("\n"):
        if line.startswith("### "):
            section = line[4:]
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[1].startswith("`"):
            assert (section, cells[0]) not in found, cells[0]
            found[section, cells[0]] = cells[1].strip("`"), cells[2]
    return found


ROWS = rows()


def page() -> ModuleType:
    """The names of the page, in float64."""
    module, before = ModuleType("page"), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(42)
    try:
        for snippet in python_snippets(PAGE):
            exec(compile(snippet.source, "docs/off-policy.md", "exec"), vars(module))
    finally:
        torch.set_default_dtype(before)
    return module


# ------------------------------------------------------------------------------------------------------------- formulas


def token_mean(losses: Tensor, d: SimpleNamespace, divisor: float | None = None) -> Tensor:
    return (losses * d.m).sum() / (d.m.sum() if divisor is None else divisor)


def over(x: Tensor, d: SimpleNamespace) -> Tensor:
    """The mean over the live tokens of a sequence, (B, 1)."""
    return (x * d.m).sum(-1, keepdim=True) / d.m.sum(-1, keepdim=True)


def summed(x: Tensor, d: SimpleNamespace) -> Tensor:
    return (x * d.m).sum(-1, keepdim=True)


def ppo(
    d: SimpleNamespace, adv: Tensor | None = None, c: float | None = None, log_ratio: Tensor | None = None
) -> Tensor:
    adv = d.adv if adv is None else adv
    ratio = (d.lp - d.old if log_ratio is None else log_ratio).clamp(-20, 20).exp()
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    return loss if c is None else torch.where(adv < 0, torch.minimum(loss, -adv * c), loss)


def inside(x: Tensor, low: float | None, high: float | None) -> Tensor:
    kept = torch.ones_like(x)
    if low is not None:
        kept = kept * (x >= low)
    return kept if high is None else kept * (x <= high)


def opsm(d: SimpleNamespace, sampled: Tensor, delta: float) -> Tensor:
    """Kept: A >= 0, or the mean of log p_sampled - log p at most delta."""
    return ((d.adv >= 0) | (over(sampled - d.lp.detach(), d) <= delta)).double()


def rejecting(d: SimpleNamespace, kept: Tensor) -> Tensor:
    return token_mean(-d.adv * (d.lp - d.old).exp() * kept, d, 10)


def k2(x: Tensor) -> Tensor:
    return 0.5 * x**2


def k3(x: Tensor) -> Tensor:
    return x.exp() - 1 - x


def largest(x: Tensor, d: SimpleNamespace) -> Tensor:
    return x.masked_fill(d.m == 0, -torch.inf).amax(-1, keepdim=True)


def divergence(d: SimpleNamespace) -> Tensor:
    return (d.p.exp() * (d.p - d.q)).sum(-1)


def geometric(d: SimpleNamespace) -> Tensor:
    return over(d.r, d).exp()


def gspo(d: SimpleNamespace, adv: Tensor) -> Tensor:
    return ppo(d, adv, log_ratio=over(d.lp - d.old, d))


FORMULAS: dict[str, list[Callable[[SimpleNamespace], Tensor]]] = {
    "TRL": [
        lambda d: token_mean(ppo(d) * d.r.exp().clamp(max=3.0), d),
        lambda d: token_mean(ppo(d) * d.r.exp().clamp(0.8, 1.2), d),
        lambda d: token_mean(ppo(d) * d.r.exp() * inside(d.r.exp(), None, 1.3), d),
        lambda d: token_mean(ppo(d) * summed(d.r, d).exp().clamp(max=1.2), d),
        lambda d: token_mean(ppo(d) * summed(d.r, d).exp() * inside(summed(d.r, d).exp(), None, 1.2), d),
        lambda d: token_mean(ppo(d) * d.r.exp().clamp(max=3.0) * opsm(d, d.rollout, 0.05), d),
        lambda d: token_mean(ppo(d) * opsm(d, d.old, 0.05), d),
        lambda d: token_mean(gspo(d, d.lq - d.old), d),
        lambda d: token_mean(divergence(d) * (d.lp - d.rollout).detach().clamp(-20, 20).exp().clamp(max=2.0), d),
    ],
    "verl": [
        lambda d: token_mean(ppo(d, c=3.0) * d.r.clamp(-20, 20).exp().clamp(max=2.0), d),
        lambda d: token_mean(ppo(d, c=3.0) * summed(d.r, d).clamp(-20, 20).exp().clamp(max=1.2), d),
        lambda d: token_mean(ppo(d, c=3.0) * d.r.exp() * inside(d.r.exp(), 0.8, 1.5), d),
        lambda d: rejecting(d, inside((-d.r).exp(), 0.8, 1.6)),
        lambda d: rejecting(d, inside(k2(d.r), None, 0.1)),
        lambda d: rejecting(d, inside(k3(d.r), None, 0.1)),
        lambda d: rejecting(d, inside((-summed(d.r, d)).exp(), 0.8, 3.0)),
        lambda d: rejecting(d, inside(summed(k2(d.r), d), None, 1.5)),
        lambda d: rejecting(d, inside(summed(k3(d.r), d), None, 1.5)),
        lambda d: rejecting(d, inside((-over(d.r, d)).exp(), 0.9, 1.5)),
        lambda d: rejecting(d, inside(over(k2(d.r), d), None, 0.3)),
        lambda d: rejecting(d, inside(over(k3(d.r), d), None, 0.3)),
        lambda d: rejecting(d, inside(largest(k2(d.r), d), None, 0.8)),
        lambda d: rejecting(d, inside(largest(k3(d.r), d), None, 0.8)),
        lambda d: token_mean(-d.adv * d.lp * (d.lp - d.rollout).detach().exp().clamp(max=1.5), d),
    ],
    "NeMo-RL": [
        lambda d: token_mean(ppo(d) * d.r.exp(), d),
        lambda d: token_mean(ppo(d) * d.r.exp().clamp(0.0, 1.5), d),
        lambda d: token_mean(ppo(d) * d.r.exp().clamp(0.8, 1.5), d),
        lambda d: token_mean(ppo(d) * d.r.exp() * inside(d.r.exp(), 0.7, 1.5), d),
        lambda d: token_mean(ppo(d) * d.r.exp() * inside(geometric(d), 0.9, 1.2), d),
        lambda d: token_mean(gspo(d, d.lq - d.old) * summed(d.r, d).exp(), d),
        lambda d: token_mean(-d.adv * (d.lp - d.old).exp().clamp(0.8, 1.2).detach() * d.lp * d.r.exp(), d),
        lambda d: token_mean(-d.adv * (d.lp - d.lp.detach()).exp() * d.r.exp(), d),
        lambda d: token_mean(-(d.lq - d.old) * d.lp * d.r.exp() * inside(d.r.exp(), 0.7, 1.5), d),
    ],
    "prime-rl": [
        lambda d: (-d.adv * (d.lp - d.rollout).exp() * torch.where(d.adv > 0, d.dp <= 0.01, d.dp >= -0.01) * d.m).sum(),
        lambda d: (-d.adv * (d.lp - d.rollout).exp() * (d.dp.abs() <= 0.01) * d.m).sum(),
        lambda d: (-(d.lq - d.lp).detach() * (d.lp - d.rollout).exp() * (d.dp >= -0.2) * d.m).sum(),
    ],
    "ms-swift": [
        lambda d: token_mean(ppo(d) * d.r.exp().clamp(max=1.3), d),
        lambda d: token_mean(ppo(d) * d.r.exp() * inside(d.r.exp(), None, 1.3), d),
        lambda d: token_mean(ppo(d) * geometric(d).clamp(max=1.3), d),
        lambda d: token_mean(ppo(d) * d.r.exp() * inside(geometric(d), None, 1.3), d),
        lambda d: token_mean(ppo(d, log_ratio=d.lp - d.lp.detach() + over(d.lp - d.old, d).detach()), d),
        lambda d: token_mean(ppo(d) * opsm(d, d.rollout, 0.05), d),
    ],
    "slime and SkyRL": [
        lambda d: token_mean(ppo(d) * d.r.exp().clamp(0.8, 1.5), d),
        lambda d: token_mean(ppo(d) * d.r.exp() * inside(d.r.exp(), 0.8, 1.5), d),
        lambda d: token_mean(ppo(d) * opsm(d, d.old, 0.05), d),
        lambda d: token_mean(ppo(d) * summed(d.r, d).exp().clamp(max=1.5), d),
        lambda d: token_mean(ppo(d) * inside(summed(d.r, d).exp(), 0.5, 1.5), d),
        lambda d: token_mean(ppo(d) * inside(geometric(d), 0.9, 1.2), d),
        lambda d: token_mean(ppo(d) * (inside(d.r.exp(), 0.5, 2.0) + (1 - d.m) > 0).all(-1, keepdim=True), d),
        lambda d: token_mean(ppo(d) * inside(d.r.exp(), 0.8, 1.5), d),
    ],
}
CASES = [(section, i, cell) for section in FORMULAS for i, cell in enumerate([c for s, c in ROWS if s == section])]


def test_every_row_has_a_formula_and_every_formula_a_row() -> None:
    counts = {section: sum(s == section for s, _ in ROWS) for section, _ in ROWS}
    assert counts == {section: len(found) for section, found in FORMULAS.items()}


def test_sapo() -> None:
    """The gradient of -A 4 / tau sigmoid(tau (rho - 1))."""
    names = page()
    names.out.loss.backward()
    leaves = [x.detach().requires_grad_() for x in (names.student.hidden, names.student.weight)]
    lp = (leaves[0] @ leaves[1].T).log_softmax(-1).gather(-1, names.token_ids[..., None])[..., 0]
    adv = names.A[:, None].expand_as(lp)
    tau = 1.0 + 0.05 * (adv <= 0).double()
    loss = -adv * torch.sigmoid(tau * ((lp - names.old).exp() - 1)) * 4 / tau
    (loss * names.mask).sum().div(names.mask.sum()).backward()
    for x, y in zip((names.student.hidden, names.student.weight), leaves, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("section", "i", "cell"), CASES)
def test_a_row(section: str, i: int, cell: str) -> None:
    names = page()
    call, remark = ROWS[section, cell]
    out = eval(call, vars(names))
    loss = out.loss
    if ("rollout_mask" in call or "trust_region" in call) and cell != "`ref_kl`":  # whose 0.2 is above most p
        assert 0 < out.metrics()["masked_fraction"] < 1
    leaves = [x.detach().requires_grad_() for x in (names.student.hidden, names.student.weight)]
    p = (leaves[0] @ leaves[1].T).log_softmax(-1)
    q = (names.teacher.hidden @ names.teacher.weight.T).log_softmax(-1)
    lp, lq = (x.gather(-1, names.token_ids[..., None])[..., 0] for x in (p, q))
    d = SimpleNamespace(
        p=p, q=q, lp=lp, lq=lq, old=names.old, rollout=names.rollout, r=names.old - names.rollout,
        m=names.mask.double(), adv=names.A[:, None].expand_as(lp), dp=(lp.exp() - names.rollout.exp()).detach(),
    )  # fmt: skip
    want = FORMULAS[section][i](d)
    if not remark.startswith("gradient"):
        torch.testing.assert_close(loss.detach(), want.detach(), rtol=1e-10, atol=1e-10)
    loss.backward()
    want.backward()
    for x, y in zip((names.student.hidden, names.student.weight), leaves, strict=True):
        assert y.grad.abs().max() > 1e-4
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-10)
