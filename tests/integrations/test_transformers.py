"""transformers: a model's head on the states that it is given stands for the model's logits, family by family."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import pickle
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fused_gopd as fg
from builders import assert_close
from ranks import run_on_ranks

transformers = pytest.importorskip("transformers")

import model_families  # noqa: E402
from fused_gopd.integrations.checkpoint import load_head  # noqa: E402
from fused_gopd.integrations.transformers import head_of, last_hidden_state, patch_lm_head  # noqa: E402
from fused_gopd.integrations.transformers.transform import remember_transform  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(1))
REST = IDS[:, 1:]


def scattered(model: nn.Module) -> nn.Module:
    """Weights that are not those of an initialisation: biases differ from 0, and logits from each other."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return model


def llama(**config: object) -> transformers.LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return scattered(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=model_families.VOCAB, **config))
    ).eval()


def cohere() -> nn.Module:
    """A family with a factor on its logits and tied embeddings."""
    return scattered(model_families.tiny("cohere"))


def dense(head: fg.LinearHead) -> Tensor:
    """The logits that a head stands for."""
    z = head.logit_scale * nn.functional.linear(head.hidden.to(head.weight.dtype), head.weight, head.bias)
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature


def transform_of(head: fg.LinearHead) -> tuple[int, float, float | None]:
    return head.vocab_size, head.logit_scale, head.softcap


def assert_has_its_configs_numbers(config: object, rows: int, scale: float, softcap: float | None) -> None:
    """A factor, a softcap, a number of rows that were measured are those of a config, to the last bit."""
    numbers = {
        x for name in model_families.TRANSFORMS for x in [getattr(config, name, None)] if isinstance(x, (int, float))
    }
    assert rows in numbers | {model_families.VOCAB}
    assert scale in numbers | {1 / x for x in numbers} | {1.0}
    assert softcap in numbers | {None}


def logits_of(model: nn.Module, **inputs: object) -> Tensor:
    output = model(input_ids=IDS, **{"use_cache": False, **inputs})
    return output.logits if hasattr(output, "logits") else output[0]


def loss_of(student: object, ids: Tensor = REST) -> Tensor:
    """Of a target that is no model's, so that every gradient is alive."""
    g = torch.Generator().manual_seed(4)
    teacher = torch.randn(*ids.shape, model_families.VOCAB, generator=g)
    return fg.gopd_loss(student, fg.Logits(teacher), None, ids, estimator="full").loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_trains_alike(model: nn.Module) -> dict[str, Tensor]:
    """The loss from hidden states has the gradients, in every parameter, of the loss from the model's own logits."""
    loss_of(fg.Logits(logits_of(model)[:, :-1].float())).backward()
    want = gradients(model)
    loss_of(head_of(model, last_hidden_state(model, IDS, keep=7))).backward()
    got = gradients(model)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert_close(got[name], gradient, 1e-5, name)
    return got


# ------------------------------------------------------------------------------------------------------------ families


def tiny(name: str, auto: type) -> nn.Module:
    """A family's tiny model; skipped where a release other than the pinned one lacks the family or cannot build it."""
    try:
        return model_families.tiny(name, auto)
    except Exception as error:
        if transformers.__version__ == model_families.PINNED:
            raise
        pytest.skip(f"transformers {transformers.__version__} builds no tiny {name}: {error}")


@pytest.fixture(
    scope="module",
    params=[*model_families.CAUSAL, *(f"{name} with a tower" for name in model_families.WITH_TOWER)],
)
def family(request: pytest.FixtureRequest) -> nn.Module:
    name, _, tower = request.param.partition(" ")
    auto = transformers.AutoModelForImageTextToText if tower else transformers.AutoModelForCausalLM
    if (name, transformers.__version__) == ("kosmos-2.5", "5.0.0"):
        pytest.skip("head_of refuses it: its forward does not run on an output of the body that is a tensor")
    torch.manual_seed(5)
    return scattered(tiny(name, auto))


@torch.no_grad()
def test_the_head_of_a_family_on_its_states_is_its_logits(family):
    prefix = family.config.model_type == "paligemma"
    inputs = {"token_type_ids": torch.ones_like(IDS)} if prefix else {}
    try:
        want = logits_of(family, **inputs)
    except (RuntimeError, AttributeError, ValueError) as error:
        if transformers.__version__ == model_families.PINNED:
            raise
        pytest.skip(f"transformers {transformers.__version__} cannot run its own tiny model: {error}")
    assert torch.isfinite(want).all()
    asked = transform_of(head_of(family, torch.zeros(1, family.get_output_embeddings().weight.shape[1])))
    head = head_of(family, last_hidden_state(family, IDS, **inputs))
    assert_close(dense(head), want, 1e-6)
    assert asked == transform_of(head)
    assert_has_its_configs_numbers(family.config.get_text_config(), *asked)


def test_the_head_of_a_family_is_read_from_its_checkpoint_alone(family, tmp_path):
    pinned = transformers.__version__ == model_families.PINNED
    if pinned and family.config.model_type == "shieldgemma2":  # this release does not find its tensors again, either
        family.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"has no tensor for lm_head\.weight or model\.language_model\.embed"):
            load_head(tmp_path)
        return
    try:
        assert_is_read_from_its_checkpoint(family, tmp_path)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if pinned:
            raise
        pytest.skip(f"transformers {transformers.__version__} cannot save, load or run its own tiny model: {error}")


@torch.no_grad()
def assert_is_read_from_its_checkpoint(family: nn.Module, folder: Path) -> None:
    family.save_pretrained(folder)
    inputs = {"token_type_ids": torch.ones_like(IDS)} if family.config.model_type == "paligemma" else {}
    layers = [m[-1] for m in family.modules() if isinstance(m, nn.ModuleList) and len(m)]
    outputs: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _, __, made: outputs.append(made if isinstance(made, Tensor) else made[0]))
        for m in layers
    ]
    hidden = last_hidden_state(family, IDS, **inputs)
    for hook in hooks:
        hook.remove()
    want, got = head_of(family, hidden), load_head(folder)(hidden)
    assert torch.equal(got.weight, want.weight)
    assert (got.bias is None) == (want.bias is None)
    assert got.bias is None or torch.equal(got.bias, want.bias)
    assert transform_of(got) == transform_of(want)
    if family.config.model_type in model_families.NO_FINAL_NORM:
        with pytest.raises(TypeError, match="between its last layer and its head is no norm, or more than one"):
            load_head(folder, norm=True)
    else:
        assert_close(load_head(folder, norm=True)(outputs[-1]).hidden, hidden, 1e-6)


@pytest.mark.parametrize("name", model_families.REFUSED)
def test_a_family_that_does_not_fit_is_an_error(name):
    model = model_families.tiny(name)
    with pytest.raises((TypeError, ValueError), match=model_families.REFUSED[name]):
        head_of(model, last_hidden_state(model, IDS))


def test_the_families_are_those_of_transformers():
    """Whoever raises the version of transformers sees what is new."""
    pytest.importorskip("transformers", minversion="5.23")
    known = {*model_families.CAUSAL, *model_families.REFUSED, *model_families.NOT_BUILT}
    assert known == {*transformers.AutoModelForCausalLM._model_mapping._model_mapping}
    assert set(model_families.WITH_TOWER) <= {*transformers.AutoModelForImageTextToText._model_mapping._model_mapping}


@pytest.mark.skipif(transformers.__version__ != model_families.PINNED, reason="the page is of the pinned release")
def test_the_page_lists_the_families_that_are_verified():
    page = model_families.PAGE.read_text()
    assert model_families.fill(page) == page, "python tests/helpers/write_pages.py"


def test_a_config_attribute_that_a_family_does_not_read_is_not_applied():
    assert head_of(llama(logit_scale=0.5, final_logit_softcapping=3.0), torch.zeros(1, 32)).logit_scale == 1.0


class Mine(transformers.LlamaForCausalLM):
    """Code of one's own, as a model from the hub may bring."""

    def __init__(self, config, change=lambda logits: logits):
        super().__init__(config)
        self.change = change

    def forward(self, input_ids=None, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        output.logits = self.change(output.logits)
        return output


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "transform"),
    [
        (lambda z: z, (61, 1.0, None)),
        (lambda z: z * 0.37, (61, 0.37, None)),
        (lambda z: z.float().div_(1.7), (61, 0.5882353, None)),
        (lambda z: z.mul_(0.37), (61, 0.37, None)),
        (lambda z: z[..., :-1], (60, 1.0, None)),
        (lambda z: 1.3 * z.div(2.0).tanh().mul(2.0 / 1.3)[..., :-3], (58, 1.0, 2.0)),
        (lambda z: torch.tanh(z.float() * 0.6 / 2.5) * 2.5, (61, 0.6, 2.5)),
    ],
    ids=["nothing", "factor", "factor in float32", "factor in place", "rows", "cap and rows", "factor and cap"],
)
def test_what_code_does_to_its_logits_is_measured(change, transform):
    """Code that transformers does not have, on hidden states from elsewhere, and then on its own."""
    model = Mine(llama().config, change)
    hidden = model.model(IDS).last_hidden_state
    for states in (hidden, last_hidden_state(model, IDS)):
        head = head_of(model, states)
        assert (head.vocab_size, head.logit_scale, head.softcap) == transform
        assert_close(dense(head), logits_of(model), 1e-6)


@pytest.mark.parametrize(
    "change",
    [
        *(lambda z: z + 1, lambda z: z.clamp(max=50.0), lambda z: -z, lambda z: z.bfloat16(), lambda z: z[..., 1:]),
        lambda z: z.index_fill(-1, torch.tensor([7]), -1e4),
        lambda z: z * torch.linspace(0.5, 1.5, 61),
        lambda z: z * nn.Parameter(torch.tensor(2.0)),
    ],
    ids=["offset", "clamp", "sign", "rounding", "first rows", "one token", "a factor a token", "a trained factor"],
)
def test_code_that_does_what_no_head_can_do_is_an_error(change):
    """Of hidden states from elsewhere alike: nothing is taken for granted because nothing was asked."""
    for call in (last_hidden_state, lambda model, _: head_of(model, torch.zeros(1, 32))):
        with pytest.raises(RuntimeError, match=r"Mine makes other logits .*LinearHead can .*: compute the logits"):
            call(Mine(llama().config, change), IDS)


@torch.no_grad()
def test_a_factor_that_changes_is_measured_again():
    """In the config, on a module, or as other code; with the body and without it."""
    model = cohere()
    hidden = last_hidden_state(model, IDS)
    assert head_of(model, hidden).logit_scale == 0.37
    model.logit_scale = 0.5
    assert head_of(model, hidden).logit_scale == 0.5
    model.logit_scale = 0.25
    assert head_of(model, last_hidden_state(model, IDS)).logit_scale == 0.25
    model.forward = lambda **inputs: (0.75 * transformers.CohereForCausalLM.forward(model, **inputs).logits,)
    assert head_of(model, hidden).logit_scale == 0.1875


def test_a_model_without_weights_is_measured():
    """As verl has it when it replaces the forward of the class, which then gives no logits."""
    with torch.device("meta"):
        model = model_families.tiny("cohere")
    own = model.forward
    model.forward = lambda **_: None
    remember_transform(model, own)
    assert head_of(model.to_empty(device="cpu"), torch.zeros(1, 32)).logit_scale == 0.37


class Unasked(Mine):
    """Code that needs its body to run."""

    def forward(self, input_ids=None, **inputs):
        if self.model.norm(torch.ones(1, 1, 32)).var() == 0:
            raise ArithmeticError("no norm")
        return super().forward(input_ids=input_ids, **inputs)


@torch.no_grad()
def test_code_that_does_not_run_without_its_body_is_measured_with_it_or_an_error():
    model = Unasked(llama().config, lambda z: z * 0.37)
    nn.init.constant_(model.model.norm.weight, 0.0)
    nn.init.constant_(model.model.norm.weight[:16], 5.0)
    with pytest.raises(
        RuntimeError, match=r"Unasked does .* could not be measured: .*\(ArithmeticError: no norm\)\. Call last"
    ):
        head_of(model, torch.zeros(1, 32))
    hidden = last_hidden_state(model, IDS)
    assert head_of(model, hidden).logit_scale == 0.37


# ------------------------------------------------------------------------------------------------- states of one model


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3, 7])
def test_keep_are_the_states_that_predict_the_last_tokens(keep):
    model = llama()
    head = head_of(model, last_hidden_state(model, IDS, keep=keep))
    assert torch.equal(head.hidden, last_hidden_state(model, IDS)[:, -keep - 1 : -1])
    want = logits_of(model)[:, :-1].log_softmax(-1).gather(-1, REST[..., None])[..., 0][:, -keep:]
    assert_close(fg.token_logprobs(head, IDS[:, -keep:]), want, 1e-5)


@torch.no_grad()
def test_padding_and_positions_pass_through():
    model = llama()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    assert torch.equal(dense(head_of(model, last_hidden_state(model, IDS, **inputs))), logits_of(model, **inputs))
    embedded = model.get_input_embeddings()(IDS)
    assert torch.equal(last_hidden_state(model, None, inputs_embeds=embedded), last_hidden_state(model, IDS))


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "biogpt",
        "xglm",
        "opt",
        "openai-gpt",
        "roberta",
        "qwen3",
        "bloom",
        "mamba",
        "bart",
        "qwen2_vl",
        "kosmos-2.5",
    ],
)
def test_a_padded_sequence_is_scored_at_the_positions_at_which_it_is_sampled(name):
    """Left padding, whatever a family makes of positions: learned, sinusoidal, rotary, by distance, none."""
    if name == "openai-gpt" and transformers.__version__ == "5.0.0":
        pytest.skip("transformers 5.0.0 samples it at other positions than those of the mask; 5.12.1 does not")
    tower = name in model_families.WITH_TOWER
    model = tiny(name, getattr(transformers, f"AutoModelFor{'ImageTextToText' if tower else 'CausalLM'}"))
    ids, mask = IDS % 50 + 5, torch.ones_like(IDS)
    mask[0, :3] = 0
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    sampled = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    sequences, mask = sampled.sequences, torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], 1)
    scored = dense(head_of(model, last_hidden_state(model, sequences, mask, keep=4)))
    # generation keeps keys and values: sums in another order
    assert_close(scored, torch.stack(sampled.logits, 1), 1e-5)
    if name not in ("bart", "kosmos-2.5"):  # to which generate gives no positions: shifted in both
        unpadded = last_hidden_state(model, sequences[:1, 3:], mask[:1, 3:], keep=4)
        assert_close(scored[:1], dense(head_of(model, unpadded)), 1e-5)


def test_without_gradients_a_forward_is_an_evaluation():
    model = model_families.tiny("gpt2").train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        scored = last_hidden_state(model, IDS)
        assert torch.equal(scored, last_hidden_state(model, IDS))
        with pytest.raises(IndexError):
            last_hidden_state(model, IDS + 1000)
    assert [m.training for m in model.modules()] == modes
    assert not torch.equal(scored, last_hidden_state(model, IDS))  # dropout is on where there are gradients
    assert_close(scored, last_hidden_state(model.eval(), IDS), 1e-6)
    with patch_lm_head(model.train()), torch.no_grad():
        assert_close(model(input_ids=IDS).logits.hidden, scored, 1e-6)
    assert all(m.training for m in model.modules())


@torch.no_grad()
def test_images_pass_through():
    model = model_families.tiny("llava", transformers.AutoModelForImageTextToText)
    model.model.config.image_token_id = 5
    vision = model.config.vision_config
    ids = torch.cat([torch.full((2, (vision.image_size // vision.patch_size) ** 2), 5), 6 + IDS % 50], 1)
    images = {"pixel_values": torch.randn(2, 3, vision.image_size, vision.image_size)}
    states = last_hidden_state(model, ids, keep=7, **images)
    assert_close(dense(head_of(model, states)), model(input_ids=ids, **images).logits[:, -8:-1], 1e-6)


def test_a_prefix_that_is_not_told_is_an_error():
    model = model_families.tiny("paligemma", transformers.AutoModelForImageTextToText)
    with pytest.raises(ValueError, match=r"token_type_ids must be given .*: without them PaliGemmaFor"):
        last_hidden_state(model, IDS)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_logits(tied):
    assert ("lm_head.weight" in assert_trains_alike(llama(tie_word_embeddings=tied))) is not tied


def test_gradients_reach_head_and_body_through_a_factor_and_checkpointing():
    model = cohere().train()
    model.gradient_checkpointing_enable()
    assert len(assert_trains_alike(model)) == sum(1 for _ in model.parameters())


def test_no_cache_is_made_unless_asked_for():
    model = llama()
    seen = []
    model.model.register_forward_hook(lambda m, args, kwargs, out: seen.append(out.past_key_values), with_kwargs=True)
    last_hidden_state(model, IDS)
    last_hidden_state(model, IDS, use_cache=True)
    assert seen[0] is None
    assert seen[1] is not None


def test_the_head_does_not_run():
    model = llama()
    model.lm_head.forward = lambda *_: pytest.fail("the head was called")
    last_hidden_state(model, IDS)


def test_a_temperature_is_the_heads():
    model = llama()
    assert head_of(model, torch.zeros(1, 32), temperature=0.7).temperature == 0.7


def test_the_model_is_as_before_after_an_exception():
    model = llama()
    head = model.lm_head
    with pytest.raises(IndexError):
        last_hidden_state(model, IDS + 1000)
    assert model.lm_head is head
    assert "lm_head" in dict(model.named_children())


@torch.no_grad()
def test_threads_may_share_a_model():
    """A call stops in the middle, meanwhile the model is used in another way, and a second call begins."""
    model = llama()
    head, want, states = model.lm_head, logits_of(model), last_hidden_state(model, IDS)
    inside, used = threading.Event(), threading.Event()
    found: dict[str, Tensor] = {}

    def wait(*_: object) -> None:
        if threading.current_thread() is first:
            inside.set()
            used.wait(10)
        elif threading.current_thread() is second:
            first.join(10)

    def call() -> None:
        found[threading.current_thread().name] = last_hidden_state(model, IDS)

    first, second = (threading.Thread(target=call, name=name) for name in ("first", "second"))
    model.model.norm.register_forward_hook(wait)
    first.start()
    inside.wait(10)
    found["logits"] = logits_of(model)
    second.start()
    used.set()
    second.join(20)
    assert model.lm_head is head
    assert torch.equal(found["logits"], want)
    assert torch.equal(found["first"], states)
    assert torch.equal(found["second"], states)


@torch.no_grad()
def test_autocast_leaves_the_states_in_its_dtype():
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        head = head_of(model, last_hidden_state(model, IDS))
        want = logits_of(model)
    assert (head.hidden.dtype, head.weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(nn.functional.linear(head.hidden, head.weight.bfloat16()), want)


def test_a_compiled_body_is_used_and_a_compiled_whole_is_not():
    model = llama()
    want = last_hidden_state(model, IDS)
    calls = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        calls.append(graph)
        return graph.forward

    whole = llama()
    whole.compile(backend=backend)
    for compiled in (whole, torch.compile(model, backend=backend)):
        with pytest.warns(UserWarning, match=r"model\.model\.compile\(\)"):
            assert torch.equal(last_hidden_state(compiled, IDS), want)
    assert not calls
    model.model.layers[0].compile(backend=backend)
    assert_close(last_hidden_state(model, IDS), want, 1e-6)
    assert calls


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "PreTrainedModel or a PEFT model of one, got .*Linear"),
        (lambda: llama().model, "LlamaModel is not: load it by AutoModelForCausalLM"),
        (lambda: transformers.LlamaForSequenceClassification(llama().config), "must be a causal language model"),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=61)
            ),
            "T5ForConditionalGeneration is an encoder-decoder",
        ),
        (
            lambda: transformers.BertLMHeadModel(
                transformers.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=61)
            ),
            "is_decoder=True",
        ),
        (
            lambda: DistributedDataParallel.__new__(DistributedDataParallel),
            r"pass model\.module, inside of .*in_forward",
        ),
        (lambda: nn.DataParallel(llama()), r"got DataParallel: pass model\.module"),
        (
            lambda: transformers.MusicgenForCausalLM(
                transformers.models.musicgen.MusicgenDecoderConfig(
                    hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=61, is_decoder=True
                )
            ),
            "must have one output embedding .*has 4 of them",
        ),
    ],
    ids=["module", "body", "classifier", "encoder-decoder", "bidirectional", "ddp", "dp", "several heads"],
)
def test_a_model_that_is_no_causal_language_model_is_an_error(make, message):
    model = make()
    for call in (lambda: last_hidden_state(model, IDS), lambda: head_of(model, torch.zeros(1, 8))):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": IDS}, "labels is no input here.*sft_labels"),
        ({"logits_to_keep": 3}, "use keep"),
        ({"keep": 8}, "keep must be below the number of tokens 8: .* got 8"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"keep": 2.0}, "keep must be an int, got float"),
    ],
    ids=["labels", "logits_to_keep", "too many", "none", "float"],
)
def test_inputs_that_make_no_sense_are_errors(inputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        last_hidden_state(llama(), IDS, **inputs)


class Linear4bit(nn.Linear):
    """What bitsandbytes, GPTQ and others put in the place of an nn.Linear: another forward, or another weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Packed(Tensor):
    """A weight as torchao has it."""


def with_head(head: nn.Module) -> nn.Module:
    model = llama()
    model.lm_head = head
    return model


def linear(weight: Tensor) -> nn.Linear:
    head = nn.Linear(32, 61, bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def replaced() -> nn.Linear:
    head = nn.Linear(32, 61)
    head.forward = lambda x: x.float() @ head.weight.T
    return head


def partitioned() -> nn.Linear:
    head = linear(torch.empty(0))
    head.weight.ds_id = 0
    return head


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda: Linear4bit(32, 61), r"must be an nn\.Linear.*Linear4bit.*modules_to_not_convert=\['lm_head'\]"),
        (lambda: nn.Sequential(nn.Linear(32, 61)), r"must be an nn\.Linear, .* got torch.nn.*Sequential"),
        (lambda: linear(torch.zeros(61, 32).as_subclass(Packed)), "got Packed of torch.float32: leave the head out of"),
        (lambda: linear(torch.zeros(61, 32, dtype=torch.int8)), "floating point tensor, got Parameter of torch.int8"),
        (lambda: linear(torch.zeros(61, 32, dtype=torch.float8_e4m3fn)), "got Parameter of torch.float8_e4m3fn"),
        (lambda: linear(torch.zeros(61, 32, device="meta")), "on the meta device, offloaded or not loaded"),
        (replaced, "forward was replaced on this instance"),
        (partitioned, "ZeRO-3 parameter that is not gathered here: call head_of in .*through_head"),
    ],
    ids=["quantised module", "module", "quantised weight", "int8", "float8", "meta", "patched", "zero-3"],
)
def test_a_head_that_is_no_whole_linear_layer_is_an_error(head, message):
    with pytest.raises((TypeError, ValueError), match=message):
        head_of(with_head(head()), torch.zeros(1, 32))


def halve(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * 0.5


def cast(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0].float()


def cast_the_body(model: nn.Module) -> nn.Module:
    """The usual float32 head on a bfloat16 body."""
    model.bfloat16().lm_head.float().register_forward_pre_hook(cast)
    return model


HOOKED = {
    "forward": (lambda m: m.lm_head.register_forward_hook(halve), r"the head has a forward hook, \S*\.halve on Linear"),
    "pre": (
        cast_the_body,
        r"the head has a forward pre-hook, \S*\.cast on Linear.* remove it .*register it on a",
    ),
    "keywords": (
        lambda m: m.lm_head.register_forward_hook(lambda mod, args, kwargs, z: z * 0.5, with_kwargs=True, prepend=True),
        r"the head has a forward hook, \S*<lambda> on Linear",
    ),
    "partial": (
        lambda m: m.lm_head.register_forward_hook(functools.partial(halve)),
        r"the head has a forward hook, \S*\.halve on Linear",
    ),
    "backward": (
        lambda m: m.lm_head.register_full_backward_hook(lambda mod, grads, _: (grads[0] * 2,)),
        "the head has a backward hook",
    ),
    "before the backward": (
        lambda m: m.lm_head.register_full_backward_pre_hook(lambda mod, grads: (grads[0] * 2,)),
        "the head has a backward pre-hook",
    ),
    "a weight that a hook makes": (
        lambda m: nn.utils.weight_norm(m.lm_head),
        r"forward pre-hook, torch\.nn\.utils\.weight_norm\.WeightNorm on Linear",
    ),
    "pruning": (
        lambda m: torch.nn.utils.prune.l1_unstructured(m.lm_head, "weight", 3),
        r"forward pre-hook, torch\.nn\.utils\.prune\.L1Unstructured",
    ),
    "model": (lambda m: m.register_forward_hook(halve), r"model has a forward hook, \S*\.halve on LlamaForCausalLM"),
    "before the model": (lambda m: m.register_forward_pre_hook(cast), "model has a forward pre-hook"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_that_would_have_no_effect_are_errors(name):
    register, message = HOOKED[name]
    model = llama()
    with patch_lm_head(model, training_only=False):  # a hook that is registered later is seen by the next call
        register(model)
        with pytest.raises(TypeError, match=message):
            model.forward(input_ids=IDS)
    for call in (
        lambda: last_hidden_state(model, IDS),
        lambda: head_of(model, torch.zeros(1, 32)),
        lambda: patch_lm_head(model),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_a_hook_of_all_modules_is_one_of_the_head():
    model = llama()
    handle = nn.modules.module.register_module_forward_hook(lambda mod, args, z: z * 0.5 if mod is model.lm_head else z)
    try:
        with pytest.raises(TypeError, match="has a forward hook of all modules"):
            head_of(model, torch.zeros(1, 32))
    finally:
        handle.remove()


def test_hooks_that_change_no_logits_are_no_errors():
    """Those of DeepSpeed, for any library that shards, and of Accelerate, which replaces the forward."""
    accelerate = pytest.importorskip("accelerate")
    model = llama()

    def gather(*_: object) -> None:
        pass

    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    for module in (model, model.lm_head):
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(gather)
    moves = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
    accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.SequentialHook(moves))
    assert_close(dense(head_of(model, last_hidden_state(model, IDS))), logits_of(model), 1e-6)
    accelerate.hooks.remove_hook_from_module(model.lm_head)  # which leaves a forward on the instance, its own
    assert_close(dense(head_of(model, last_hidden_state(model, IDS))), logits_of(model), 1e-6)

    class Halves(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 0.5

    accelerate.hooks.add_hook_to_module(model.lm_head, Halves())
    with pytest.raises(TypeError, match=r"has a hook of Accelerate's, \S*Halves"):
        head_of(model, torch.zeros(1, 32))


@torch.no_grad()
def test_a_cast_before_the_head_is_carried_out():
    """What the error about a pre-hook advises: float32 states and head, of which no weight is rounded."""
    model = llama().bfloat16()
    nn.init.constant_(model.lm_head.float().weight, 1.0 + 2**-12)  # 1 in bfloat16
    model.model.norm.register_forward_hook(lambda module, args, hidden: hidden.float())
    head = head_of(model, last_hidden_state(model, IDS))
    assert head.hidden.dtype == head.weight.dtype == torch.float32
    assert_close(dense(head), logits_of(model), 1e-6)


@torch.no_grad()
def test_hooks_between_model_and_head_are_in_the_logits():
    """They run with the model's own code, and what they do to the logits is measured."""
    model = scattered(model_families.tiny("bert"))
    hidden = last_hidden_state(model, IDS)
    model.cls.predictions.register_forward_hook(halve)
    model.cls.predictions.transform.register_forward_hook(halve)
    for states in (hidden * 0.5, last_hidden_state(model, IDS)):
        assert_close(dense(head_of(copy.deepcopy(model), states)), logits_of(model), 1e-6)


def test_parametrised_heads_are_linear():
    """LoRA by torch.nn.utils.parametrize, weight norm: the weight is what it is computed to be."""
    model = llama()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    assert_trains_alike(model)


# ----------------------------------------------------------------------------------------------------------------- PEFT


def adapted(tied: bool = False, **config: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = llama(tie_word_embeddings=tied)
    return scattered(peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"], **config})))


ADAPTERS = {
    "body": ({}, "base_layer"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.lora_A"),
    "head, rank-stabilised": ({"target_modules": ["q_proj", "lm_head"], "use_rslora": True}, "lm_head.lora_B"),
    "a copy of the head": ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save"),
    "some tokens": ({"trainable_token_indices": {"lm_head": [1, 5]}}, "trainable_tokens_delta"),
    "some tokens, tied": ({"tied": True, "trainable_token_indices": [1, 5]}, "trainable_tokens_delta"),
    "embeddings, tied": ({"tied": True, "target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_in_effect_and_trained(name):
    config, part = ADAPTERS[name]
    model = adapted(**config)
    trained = assert_trains_alike(model)
    assert name == "body" or any(part in parameter for parameter in trained)
    assert not any("original_module" in parameter for parameter in trained)


@torch.no_grad()
@pytest.mark.parametrize("name", ["head", "a copy of the head", "some tokens"])
@pytest.mark.parametrize("merged", [False, True])
def test_adapters_that_are_switched_off_are_not_in_effect(name, merged):
    model = adapted(**ADAPTERS[name][0])
    if merged:
        model.merge_adapter()
    assert_close(dense(head_of(model, last_hidden_state(model, IDS))), logits_of(model), 1e-6)
    with model.disable_adapter():
        assert_close(dense(head_of(model, last_hidden_state(model, IDS))), logits_of(model), 1e-6)


@torch.no_grad()
def test_an_adapter_that_transformers_itself_has_added_is_in_effect():
    peft = pytest.importorskip("peft")
    model = llama()
    try:
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    except ValueError as error:  # transformers 5.24 wants a PEFT that is newer than the newest
        if transformers.__version__ == model_families.PINNED:
            raise
        pytest.skip(str(error))
    scattered(model)
    assert_close(dense(head_of(model, last_hidden_state(model, IDS))), logits_of(model), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_have_no_states_of_their_own(kind):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    hidden = last_hidden_state(model, IDS)
    assert hidden.shape == (2, 8, 32)
    assert_close(dense(head_of(model, hidden)), logits_of(model)[:, -8:], 1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "variant of LoRA"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"lora_dropout": 0.1}, r"lora_dropout=0\.1.*modules_to_save=\['lm_head'\]"),
    ],
    ids=["dora", "bias", "dropout"],
)
def test_adapters_that_are_no_change_of_the_heads_weight_are_errors(config, message):
    model = adapted(target_modules=["q_proj", "lm_head"], **config).train()
    with pytest.raises(ValueError, match=message):
        head_of(model, torch.zeros(1, 32))


def test_other_adapters_on_the_head_are_errors():
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=[])
    with pytest.raises(TypeError, match=r"peft.tuners.ia3.*leave lm_head out of target_modules"):
        head_of(peft.get_peft_model(llama(), config), torch.zeros(1, 32))


# --------------------------------------------------------------------------------------------- heads in place of logits


def test_a_patched_model_gives_the_loss_its_head():
    model = cohere()
    loss_of(fg.Logits(logits_of(model)[:, :-1])).backward()
    want = gradients(model)
    with patch_lm_head(model.train()):
        student = model(input_ids=IDS).logits
        assert student.token_shape == (2, 8)
        loss_of(student[:, :-1, :]).backward()
    for name, gradient in gradients(model).items():
        assert_close(gradient, want[name], 1e-5, name)


def test_a_patched_adapter_model_gives_the_loss_its_head():
    model = adapted(target_modules=["q_proj", "lm_head"]).train()
    want = dense(head_of(model, last_hidden_state(model, IDS)))
    with patch_lm_head(model):
        assert torch.equal(dense(model(input_ids=IDS).logits), want)


def test_what_a_patched_model_leaves_as_it_is():
    model = llama()
    want = logits_of(model)
    with patch_lm_head(model):
        assert torch.equal(logits_of(model), want)  # in eval mode
        model.train()
        assert torch.equal(logits_of(model, labels=IDS), want)
        sampled = model.generate(IDS, max_new_tokens=3, do_sample=False)
        assert sampled.shape == (2, 11)
        assert isinstance(model(input_ids=IDS).logits, fg.LinearHead)  # and generating has not ended that
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), sampled)


def test_a_patched_teacher_gives_its_head_in_eval_mode():
    model = llama()
    with patch_lm_head(model, training_only=False):
        assert isinstance(model(input_ids=IDS, logits_to_keep=4).logits, fg.LinearHead)
        assert isinstance(model(input_ids=IDS, return_dict=False)[0], fg.LinearHead)
        assert model(input_ids=IDS, logits_to_keep=4).logits.token_shape == (2, 4)


def test_a_patched_prefix_model_is_told_its_prefix():
    model = model_families.tiny("paligemma", transformers.AutoModelForImageTextToText)
    types = torch.ones_like(IDS)
    want = logits_of(model, token_type_ids=types)
    with patch_lm_head(model, training_only=False):
        for mode in (model.eval(), model.train()):
            with pytest.raises(ValueError, match=r"token_type_ids must be given .*: without them PaliGemmaFor"):
                mode(input_ids=IDS)
        assert_close(dense(model.eval()(input_ids=IDS, token_type_ids=types).logits), want, 1e-6)


@pytest.mark.parametrize(
    ("use", "kind", "message"),
    [
        (lambda z: z.shape, AttributeError, r"logits\.shape is not there"),
        (lambda z: z.float(), AttributeError, r"logits\.float is not there"),
        (lambda z: z[:, :-1].log_softmax(-1), AttributeError, r"logits\.log_softmax .*\(2, 7, 32\) .*\(61, 32\)"),
        (lambda z: z / 0.7, TypeError, r"truediv cannot take logits.*dataclasses\.replace\(logits, temperature"),
        (lambda z: 2 * z, TypeError, "mul cannot take logits"),
        (lambda z: -z, TypeError, "neg cannot take logits"),
        (lambda z: z > 0, TypeError, "gt cannot take logits"),
        (lambda z: len(z), TypeError, "len cannot take logits"),
        (lambda z: torch.log_softmax(z, -1), TypeError, r"log_softmax cannot take logits.*fused_gopd\.token_logprobs"),
        (lambda z: nn.functional.cross_entropy(z[0], IDS[0]), TypeError, "cross_entropy cannot take logits"),
        (lambda z: torch.stack([z, z]), TypeError, "stack cannot take logits"),
        (lambda z: z[..., 0], IndexError, r"indexed by tokens.*head\[:, :-1\]"),
        (lambda z: z.no_such_thing, AttributeError, "has no attribute 'no_such_thing'"),
    ],
)
def test_what_stands_for_logits_says_so(use, kind, message):
    model = llama()
    with patch_lm_head(model, training_only=False):
        z = model(input_ids=IDS).logits
        with pytest.raises(kind, match=message) as error:
            use(z)
        if "no_such" not in message and kind is not IndexError:
            assert "under patch_lm_head are no tensor but a fused_gopd.LinearHead" in str(error.value)
        assert not hasattr(z, "shape")  # which is how libraries ask for a tensor
        assert loss_of(replace(z, temperature=2.0)[:, :-1]).isfinite()
        assert isinstance(copy.copy(z), fg.LinearHead)


def test_a_patched_mixture_of_experts_keeps_its_auxiliary_loss():
    model = model_families.tiny("mixtral").train()
    with patch_lm_head(model):
        output = model(input_ids=IDS, output_router_logits=True)
    assert isinstance(output.logits, fg.LinearHead)
    assert output.aux_loss.requires_grad


def test_undoing_leaves_nothing_behind():
    model = llama()
    before, own = pickle.dumps(model.state_dict()), dict(vars(model))
    handle = patch_lm_head(model.train())
    model(input_ids=IDS)
    handle.undo()
    handle.remove()  # a second time does nothing
    assert pickle.dumps(model.state_dict()) == before
    assert {**own, "training": True} == vars(model)
    assert model.forward.__func__ is transformers.LlamaForCausalLM.forward
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(model))), logits_of(copy.deepcopy(model)))


def test_undoing_under_someone_elses_patch_ends_ours_alone():
    model = llama()
    calls = []

    def theirs(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return ours(*args, **kwargs)

    handle = patch_lm_head(model, training_only=False)
    ours, model.forward = model.forward, theirs
    assert isinstance(model(input_ids=IDS).logits, fg.LinearHead)
    handle.undo()
    assert isinstance(model(input_ids=IDS).logits, Tensor)
    assert len(calls) == 2


def test_the_signature_that_trainers_read_is_kept():
    model = llama()
    want = inspect.signature(model.forward)
    with patch_lm_head(model):
        assert inspect.signature(model.forward) == want


@pytest.mark.parametrize("act", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_a_patched_model_cannot_be_copied(act):
    model = llama()
    with patch_lm_head(model), pytest.raises(RuntimeError, match="undo the patch first"):
        act(model)


def test_states_of_a_patched_model_are_as_ever():
    model = llama()
    want = last_hidden_state(model, IDS)
    with patch_lm_head(model, training_only=False):
        assert torch.equal(last_hidden_state(model, IDS), want)


def test_patching_a_compiled_model_is_an_error():
    model = llama()
    model.compile(backend="eager")
    for compiled in (model, torch.compile(llama(), backend="eager")):
        with pytest.raises(TypeError, match=r"compile the body, model\.model\.compile\(\)"):
            patch_lm_head(compiled)


def test_patching_twice_is_an_error():
    model = llama()
    with patch_lm_head(model), pytest.raises(RuntimeError, match="patched already"):
        patch_lm_head(model)


def test_what_the_loss_could_not_take_is_an_error_when_patched():
    with pytest.raises(TypeError, match="Linear4bit"):
        patch_lm_head(with_head(Linear4bit(32, 61)))


def test_accelerate_may_prepare_a_patched_model():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one for a process: of an earlier trainer
    model = llama().train()
    with patch_lm_head(model):
        prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        head = prepared(input_ids=IDS).logits
        assert isinstance(head, fg.LinearHead)
        assert head.hidden.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------ several ranks


def _sharded(case: str) -> None:
    """Gradients of two ranks with a batch each, put together, are those of one process with both."""
    batches = [IDS, IDS.flip(1)]
    adapter = {"target_modules": ["q_proj", "lm_head"]}
    make = {"fsdp, tied": cohere, "fsdp, adapter": lambda: adapted(**adapter)}.get(case, llama)
    reference = make().double()
    for ids in batches:
        student = head_of(reference, last_hidden_state(reference, ids, keep=7))
        (loss_of(student, ids[:, 1:]) / len(batches)).backward()
    want = gradients(reference)
    model, ids = copy.deepcopy(reference), batches[dist.get_rank()]
    wrapper = model
    if case.startswith("ddp"):
        wrapper = DistributedDataParallel(model)
    else:
        causal = model.get_base_model() if "adapter" in case else model
        for unit in (*causal.model.layers, *([model.lm_head] if "on its own" in case else [])):
            fully_shard(unit)
        fully_shard(model)

    def loss() -> Tensor:
        hidden = last_hidden_state(model, ids, keep=7)
        if "adapter" in case:
            return loss_of(head_of(model, hidden), ids[:, 1:])
        return fg.distributed.through_head(
            model.lm_head, hidden, lambda head: loss_of(head_of(model, head.hidden), ids[:, 1:])
        )

    if case == "ddp, patched":
        with patch_lm_head(wrapper.train()):
            loss_of(wrapper(input_ids=ids).logits[:, :-1], ids[:, 1:]).backward()
    else:
        fg.distributed.in_forward(wrapper, loss).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == want.keys()
    for name, p in model.named_parameters():
        if name in want:
            found = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert_close(found, want[name], 1e-12, f"{case}: {name}")
    if not case.startswith("ddp"):
        for call, message in (
            (lambda: last_hidden_state(model, ids), "call last_hidden_state in fused_gopd.distributed.in_forward"),
            (lambda: head_of(model, torch.zeros(1, 32)), "sharded by FSDP2: call head_of in"),
            (lambda: patch_lm_head(model), "shards its parameters"),
        ):
            with pytest.raises((RuntimeError, ValueError, TypeError), match=re.escape(message)):
                call()


def _tensor_parallel() -> None:
    """A head whose rows are on two ranks, as transformers' own tensor parallelism leaves it."""
    model = llama().double()
    loss_of(head_of(model, last_hidden_state(model, IDS, keep=7))).backward()
    want = gradients(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
    loss_of(head_of(model, last_hidden_state(model, IDS, keep=7))).backward()
    for name, p in model.named_parameters():
        found = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        assert_close(found, want[name], 1e-12, name)


def _all_sharded() -> None:
    _tensor_parallel()
    cases = ["fsdp, head in the root", "fsdp, head on its own", "fsdp, tied", "ddp", "ddp, patched"]
    if importlib.util.find_spec("peft"):
        cases.append("fsdp, adapter")
    for case in cases:
        _sharded(case)


@pytest.mark.ranks
def test_models_that_are_wrapped_train_as_one_process_does():
    run_on_ranks("test_transformers:_all_sharded", 2)


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_training_step_of_the_page_runs():
    (source,) = re.findall(r"```python\n(.*?def train_step.*?)```", model_families.PAGE.read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    exec(source, namespace)
    student, teacher, ref = llama().train(), llama(), llama()
    before = student.lm_head.weight.detach().clone()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "completion_mask": torch.ones(2, 5).bool()}
    scattered(teacher)
    metrics = namespace["train_step"](student, teacher, ref, optimizer, batch)
    assert metrics["kl_teacher_k3"] > 0
    assert not torch.equal(student.lm_head.weight, before)
    assert teacher.lm_head.weight.grad is None
