"""Models patched by liger-kernel's ``apply_liger_kernel_to_*``: their forward is Liger's. ``make test-liger`` has it.

Liger's Triton kernels for the layers need a GPU and are left out here. They are inside of the body, of which this
package sees the last hidden state alone.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
transformers = pytest.importorskip("transformers", minversion="5.0")

import fused_gopd as fg  # noqa: E402
from fused_gopd.integrations.transformers import head_of, last_hidden_state, patch_lm_head  # noqa: E402
from model_families import CAUSAL, VOCAB, tiny  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

IDS = torch.arange(14).view(2, 7) % (VOCAB - 1) + 1
MASK = torch.ones_like(IDS)
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
# what liger-kernel 0.8.5 does not patch itself: Granite, whose logits are divided by a number; and a class of its own
# that it cannot import with transformers 5.23
NOT_PATCHED = {"granite", "qwen3_5_moe", "qwen3_5_moe_text"}
FAMILIES = sorted(set(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN) & set(CAUSAL) - NOT_PATCHED)


def patch(family: str, model: Any = None) -> None:
    """Liger's forward, and none of its kernels for layers."""
    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[family]
    named = {name: x.default for name, x in inspect.signature(apply).parameters.items()}
    options = {name: name == "fused_linear_cross_entropy" for name, default in named.items() if default is not None}
    apply(**options, model=model)


def logits(head: fg.LinearHead) -> torch.Tensor:
    z = head.logit_scale * torch.nn.functional.linear(head.hidden, head.weight, head.bias)
    return z if head.softcap is None else head.softcap * (z / head.softcap).tanh()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_has_the_head_that_it_had(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    monkeypatch.setattr(type(model), "forward", type(model).forward)  # Llama 4: the class's is replaced. Put back
    want = model(**INPUTS).logits.detach()
    patch(family, model)
    assert model.forward.__module__.startswith("liger_kernel.")
    head = head_of(model, last_hidden_state(model, IDS, MASK))
    torch.testing.assert_close(logits(head)[..., : want.shape[-1]], want, rtol=1e-4, atol=1e-5)
    model.train()
    with patch_lm_head(model):
        given = model(**INPUTS).logits
        fg.gopd_loss(given[:, :-1], fg.Logits(torch.zeros_like(want[:, 1:])), estimator="full").loss.backward()
    assert isinstance(given, fg.LinearHead)
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    model.eval()
    torch.testing.assert_close(model(**INPUTS).logits, want)


def test_a_patched_class_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

    model = tiny("qwen3")
    want = model(**INPUTS).logits.detach()
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)  # put back at the end
    before = Qwen3ForCausalLM.forward
    patch("qwen3")
    assert Qwen3ForCausalLM.forward is not before
    head = head_of(model, last_hidden_state(model, IDS, MASK))
    torch.testing.assert_close(logits(head), want)
    with patch_lm_head(model, training_only=False):
        torch.testing.assert_close(logits(model(**INPUTS).logits), want)


def test_a_trainer_with_use_liger_kernel_ends_in_the_same_weights(tmp_path: Path) -> None:
    trl = pytest.importorskip("test_trl")  # the tiny models and the tokenizer
    names = inspect.signature(monkey_patch.apply_liger_kernel_to_qwen3).parameters
    kernels = {name: name == "fused_linear_cross_entropy" for name in names if name != "model"}
    plain = trl.trained(tmp_path / "plain", **trl.SGD)
    run = trl.trainer(tmp_path / "liger", **trl.SGD, use_liger_kernel=True, liger_kernel_config=kernels)
    run.train()
    assert run.model.forward.__module__.startswith("liger_kernel.")
    trl.assert_same(plain, trl.weights(run))
