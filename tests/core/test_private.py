"""What is private in PyTorch: listed in docs/versions.md, and a loss where a release lacks it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fused_gopd as fg
from fused_gopd import private
from fused_gopd.loop import gemm

ROOT = Path(__file__).parents[2]
# torch.x._name, torch.ops.x.name, an import of a private name, getattr with one
_USES = (
    r"torch\.(?:\w+\.)*?(_[a-zA-Z]\w*)",
    r"torch\.ops\.(\w+\.\w+)",
    r"from torch[\w.]* import (_\w+)",
    r"getattr\((?:torch[\w.]*|forward_ad), \"(_[a-zA-Z]\w*)\"",
    r"getattr\(_functorch, \"(\w+)\"",
)


def _uses() -> set[str]:
    code = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    return {name for use in _USES for name in re.findall(use, code)}


def test_every_private_name_is_on_the_page() -> None:
    page = (ROOT / "docs/versions.md").read_text()
    uses = _uses()
    assert {
        "_assert_async",
        "aten.mm",
        "_resolve_process_group",
        "is_batchedtensor",
    } <= uses  # each way finds something
    assert [name for name in sorted(uses) if f"{name}`" not in page] == []


def _loss() -> torch.Tensor:
    hidden = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    weight = torch.linspace(-2, 1, 20).reshape(5, 4)
    out = fg.gopd_loss(
        fg.LinearHead(hidden, weight), fg.LinearHead(hidden.detach(), weight.sin()), token_ids=torch.tensor([0, 3, 1])
    )
    (grad,) = torch.autograd.grad(out.loss, hidden)
    return grad


def test_a_loss_without_the_private_names(monkeypatch: pytest.MonkeyPatch) -> None:
    want = _loss()
    monkeypatch.setattr(private, "transforms_active", bool)
    monkeypatch.setattr(private, "_functorch", None)
    monkeypatch.delattr(torch, "_assert_async")
    assert private.transforms() == []
    assert not private.is_batched(want)
    assert torch.equal(_loss(), want)


def test_a_transform_is_refused_without_the_private_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "transforms_active", bool)
    monkeypatch.setattr(private, "_functorch", None)
    weight = torch.ones(5, 4)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: fg.gopd_loss(
            fg.LinearHead(x, weight), fg.LinearHead(x.detach(), weight.sin()), token_ids=torch.tensor([0, 3, 1])
        ).loss)(torch.ones(3, 4))  # fmt: skip


def test_without_an_assert_on_the_device_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_assert_async")
    private.assert_async(torch.tensor(True), "right")
    with pytest.raises(RuntimeError, match="wrong"):
        private.assert_async(torch.tensor(False), "wrong")


@pytest.mark.parametrize("library", ["cpu", "mkldnn"])
def test_products_without_onednn(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    if library == "cpu":
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # 2.10 has none
    else:
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert gemm._libraries.__wrapped__() == gemm.Libraries()


def test_the_products_into_float32_are_torch_mm_and_addmm() -> None:
    """The overloads that a GPU's low-precision heads call, by what the public functions name: shapes alone here."""
    a, b = (torch.empty(3, 3, dtype=torch.bfloat16, device="meta") for _ in range(2))
    assert torch.ops.aten.mm.dtype(a, b, torch.float32).dtype == torch.mm(a, b, out_dtype=torch.float32).dtype
    for overload in (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
        assert [x.name for x in overload._schema.arguments][-1] == "out"
