"""Each argument of the loss is declared once: what follows from its field."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import re
import typing

import pytest

import fused_gopd as fg
from builders import make_batch
from fused_gopd.option_checks import checked
from fused_gopd.options import ARGUMENTS, DEFAULTS, ESTIMATORS, RULES, LossCall, LossOptions
from fused_gopd.signatures import called_as

FUNCTIONS = pytest.mark.parametrize("function", [fg.gopd_loss, fg.reference.gopd_loss], ids=["fused", "reference"])


@FUNCTIONS
def test_a_function_shows_its_whole_signature(function):
    parameters = inspect.signature(function).parameters
    assert list(parameters)[:4] == ["student", "teacher", "ref", "token_ids"]
    assert {name: p.default for name, p in parameters.items()} == {
        name: inspect.Parameter.empty if default is dataclasses.MISSING else default
        for name, default in DEFAULTS.items()
    }
    kinds = {p.kind for p in list(parameters.values())[4:]}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    hints = typing.get_type_hints(function)
    assert list(hints) == [*parameters, "return"]
    assert hints["clip_dual"] == float | None
    assert hints["return"] is fg.GOPDOutput
    assert "clip_dual: 'float | None' = None" in pydoc.render_doc(function, renderer=pydoc.plaintext)


@FUNCTIONS
def test_a_wrong_call_is_an_error_of_the_function(function):
    with pytest.raises(TypeError, match=re.escape("gopd_loss() got an unexpected keyword argument 'lam'")):
        function(None, None, lam=1.25)
    with pytest.raises(TypeError, match=re.escape("gopd_loss() missing 1 required positional argument: 'teacher'")):
        function(None)


def test_a_decorated_function_gets_the_object():
    @called_as(LossCall)
    def beta_of(call: LossCall) -> float:
        """The docstring."""
        return call.beta

    head: object = object()
    assert beta_of(head, None, beta=0.25) == 0.25
    assert beta_of.__doc__ == "The docstring."
    assert str(inspect.signature(beta_of)).endswith("-> 'float'")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_has_a_rule(name):
    rule = RULES[name]
    assert rule.help.endswith(".")
    assert "\n" not in rule.help
    assert set(rule.of) <= set(ESTIMATORS)
    assert rule.held or rule.per_batch
    assert rule.needs is None or (rule.needs in RULES and rule.because)
    assert not rule.choices or DEFAULTS[name] in rule.choices


NORMAL = LossOptions(advantage_clip=(-2.0, 2.0), clip=(0.2, 0.28), ratio="sequence", clip_dual=3.0, chunk_size=4)


def test_a_call_has_its_fields_in_the_order_of_their_defaults():
    """So that its signature (plan.py) is made of those that are not the default, compared side by side."""
    call = LossCall(None, None, mask=1, estimator="full", backend="torch")
    for made in (call, dataclasses.replace(call, sft_labels=2, beta=0.25)):
        assert list(vars(made)) == list(DEFAULTS)


def test_options_are_equal_and_hashed_by_their_values():
    assert len({LossOptions(estimator="topk", k=3), LossOptions(estimator="topk", k=3), LossOptions()}) == 2


def test_the_normal_form_is_its_own():
    assert checked(dataclasses.replace(NORMAL, advantage_clip=2, clip=[0.2, 0.28], clip_dual=3)) == NORMAL
    assert checked(NORMAL) == NORMAL
    assert checked(LossOptions(estimator="full", divergence="jsd", beta=1)) == LossOptions(estimator="full")


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"clip_dual": 1.0}, "clip_dual"),
        ({"estimator": "some"}, "estimator"),
        ({"estimator": "full", "baseline": "expected"}, "baseline"),
        ({"divergence": "jsd"}, "divergence"),
        ({"estimator": "full", "divergence": "jsd", "beta": 2.0}, "beta"),
        ({"estimator": "full", "beta": 0.25}, "beta"),
        ({"k": 4}, "k"),
        ({"grad_filter": -1.0}, "grad_filter"),
        ({"score_cancelled": 1}, "score_cancelled"),
    ],
)
def test_an_error_carries_the_name_of_the_option(options, option):
    """Also where there is no batch yet: a module says so when it is made."""
    for make in (lambda: checked(LossOptions(**options)), lambda: fg.GOPDLoss(**options)):
        with pytest.raises((TypeError, ValueError), match=option) as error:
            make()
        assert error.value.option == option


def test_what_an_option_needs_of_a_batch_is_asked_of_the_batch():
    batch = make_batch(1)
    module = fg.GOPDLoss(clip=(0.2, 0.2))
    with pytest.raises(ValueError, match="clip needs old_logprobs") as error:
        module(batch.student, batch.teacher, None, batch.token_ids, mask=batch.mask)
    assert error.value.option == "clip"
