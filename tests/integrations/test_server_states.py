"""A teacher that sends hidden states: real requests to a local server that answers as vLLM and SGLang do."""

from __future__ import annotations

import copy
import fcntl
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fused_gopd as fg

pytest.importorskip("httpx")
pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

import test_server
from fused_gopd.integrations.checkpoint import load_head
from fused_gopd.integrations.server import HiddenStateTeacher, TeacherServerError, states
from fused_gopd.integrations.transformers import head_of, last_hidden_state
from test_server import Handler, Server, changed, status

pytestmark = pytest.mark.usefixtures("one_thread")

V, H, LAYERS = 97, 16, 2


def llama(seed: int, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    torch.nn.init.normal_(model.model.norm.weight, 1.0, 0.3)
    return model


class Engine:
    """What the servers do with a sequence: states of the layers, before the final norm or after it, and log-probs."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.layers = (model.config.num_hidden_layers,)
        self.change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None  # of a file before it is written
        self.count = 0
        self.lock = threading.Lock()

    @torch.no_grad()
    def run(self, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(n, layers, H) before the norm, (n, H) after it, (n, V) log-probs."""
        before: list[Tensor] = []
        with self.lock:
            hook = self.model.model.norm.register_forward_pre_hook(lambda module, given: before.append(given[0]))
            out = self.model.model(torch.tensor([ids]), output_hidden_states=True)
            hook.remove()
        every = [*out.hidden_states[:-1], before[0]]  # transformers' last one is after the norm
        logprobs = self.model.lm_head(out.last_hidden_state[0]).float().log_softmax(-1)
        return torch.stack([every[i][0] for i in self.layers], 1), out.last_hidden_state[0], logprobs

    def own(self, ids: list[int]) -> list[float]:
        rows = self.run(ids)[2]
        return [float(rows[t - 1, ids[t]]) for t in range(1, len(ids))]

    def write(self, ids: list[int], wait: float) -> str:
        """As vLLM's ExampleHiddenStatesConnector: the file's lock is held until the file is whole."""
        with self.lock:
            self.count += 1
            name = str(self.folder / f"cmpl-{self.count}-0.safetensors")
        lock = os.open(f"{name}.lock", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        tensors = {"hidden_states": self.run(ids)[0].contiguous(), "token_ids": torch.tensor(ids)}
        self.change(tensors)

        def finish() -> None:
            time.sleep(wait)
            save_file(tensors, name)
            os.close(lock)

        threading.Thread(target=finish).start()
        return name.replace(str(self.folder), "/srv/states")  # the folder has another name there


def vllm_answer(engine: Engine, body: dict[str, Any]) -> Any:
    assert body["max_tokens"] == 1
    (ids,) = body["prompt"]
    choice: dict[str, Any] = {"index": 0, "text": "x", "prompt_logprobs": None}
    if "prompt_logprobs" in body:
        entries = [
            {str(i): {"logprob": x, "decoded_token": test_server.word(i)}}
            for i, x in zip(ids[1:], engine.own(ids), strict=True)
        ]
        choice["prompt_logprobs"] = [None, *entries]
    return {"choices": [choice], "kv_transfer_params": {"hidden_states_path": engine.write(ids, 0.01)}}


def sglang_answer(engine: Engine, body: dict[str, Any]) -> Any:
    (ids,), (first,) = body["input_ids"], body["logprob_start_len"]
    own = [[None, ids[first], None], *([x, ids[t], None] for t, x in enumerate(engine.own(ids), 1) if t > first)]
    meta = {"prompt_tokens": len(ids), "input_token_logprobs": own}
    if body.get("return_hidden_states"):
        meta["hidden_states"] = [engine.run(ids)[1].float().tolist()]
    return [{"text": "", "meta_info": meta}]


class Running(Server):
    """A server of hidden states."""

    def __init__(self, api: str, model: Any, folder: Path) -> None:
        super().__init__(f"{api} with states", Engine(model, folder))  # type: ignore[arg-type]
        self.own_api, self.folder = api, folder
        self.path = str(folder.parent / "teacher")
        self.cards = {"data": [{"id": "teacher", "max_model_len": 128}]}

    @property
    def engine(self) -> Engine:
        return self.model  # type: ignore[return-value]

    def states_teacher(self, **options: Any) -> HiddenStateTeacher:
        given = {"api": self.own_api, "head": self.path, "backoff": 0.01, "timeout": 5.0, **options}
        if self.own_api == "vllm":
            given.setdefault("states_dir", self.folder)
        return HiddenStateTeacher(self.url, "teacher", **given)


def serve(
    api: str, folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32, model: Any = None
) -> Iterator[Running]:
    """A server of a model, by default of a small Llama."""
    for name, answer in {"vllm with states": vllm_answer, "sglang with states": sglang_answer}.items():
        monkeypatch.setitem(test_server.ANSWERS, name, answer)
    monkeypatch.setattr(states, "_VISIBLE", 0.2)
    (folder / "shared").mkdir()
    model = llama(1, dtype) if model is None else model
    model.save_pretrained(folder / "teacher")
    with Running(api, model, folder / "shared") as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(params=["vllm", "sglang"])
def server(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    yield from serve(request.param, tmp_path, monkeypatch)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    yield from serve("vllm", tmp_path, monkeypatch)


@pytest.fixture
def sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    yield from serve("sglang", tmp_path, monkeypatch)


PROMPT_MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
COMPLETION_MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]])  # a tool's token in between
ATTENDED = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def batch() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(2, V, (3, 9), generator=torch.Generator().manual_seed(5))
    return ids, torch.cat([PROMPT_MASK, ATTENDED], 1), COMPLETION_MASK


def local_head(model: Any, temperature: float = 1.0) -> fg.LinearHead:
    ids, attended, _ = batch()
    with torch.no_grad():
        return head_of(model, last_hidden_state(model, ids, attended, keep=5), temperature=temperature)


def loss_and_gradient(teacher: Any, dtype: torch.dtype = torch.float32, temperature: float = 1.0) -> tuple[Any, Tensor]:
    student, ref = llama(2, dtype), llama(3, dtype)
    head = local_head(student, temperature)
    hidden = head.hidden.clone().requires_grad_()
    mine = head_of(student, hidden, temperature=temperature)
    frozen = local_head(ref, temperature)
    out = fg.gopd_loss(
        mine, teacher, frozen, batch()[0][:, 4:], mask=COMPLETION_MASK, reward_scale=1.25, estimator="full"
    )
    out.loss.backward()
    assert hidden.grad is not None
    return out, hidden.grad


# -------------------------------------------------------------------------------- what the loss gets


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_loss_is_that_of_the_local_teacher(server: Running, temperature: float) -> None:
    with server.states_teacher(temperature=temperature) as teacher:
        served = teacher(*batch())
    assert isinstance(served, fg.LinearHead)
    assert served.hidden.shape == (3, 5, H)
    assert served.temperature == temperature
    assert (served.hidden[COMPLETION_MASK == 0] == 0).all() or server.own_api == "vllm"  # a norm of 0 is 0 too
    out, gradient = loss_and_gradient(served, temperature=temperature)
    exact, expected = loss_and_gradient(local_head(server.engine.model, temperature), temperature=temperature)
    torch.testing.assert_close(out.token_loss, exact.token_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.kl, exact.kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_bfloat16_states_are_those_of_the_local_teacher(
    api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model's states in bfloat16 pass without a change: transport adds no rounding at all."""
    for running in serve(api, tmp_path, monkeypatch, torch.bfloat16):
        with running.states_teacher() as teacher:
            served = teacher(*batch())
        ids, attended, _ = batch()
        for row in (0, 1):
            alone = running.engine.run(ids[row][attended[row] == 1].tolist())[1]
            wanted = COMPLETION_MASK[row] == 1
            count = int(attended[row, 4:].sum())
            expected = alone[-count - 1 : -1][wanted[:count]]
            assert torch.equal(served.hidden[row][wanted], expected)
            assert served.hidden.dtype == torch.bfloat16


def test_states_rounded_to_bfloat16_give_the_loss_within_their_rounding(vllm: Running) -> None:
    """A float32 teacher whose states are sent in bfloat16, unit roundoff u = 2^-8, before the final norm.

    A state y after the norm is off by 3 u |y| at most: x, the mean square of x, and the norm's output in x's dtype are
    rounded. So logits are off by b = max_v 3 u sum_h |y_h W_vh|, log-probs by 2 b, token losses, where lambda weighs
    log q, by 2 lambda b. The gradient of logit v is p_v times log-ratio minus its mean: off by 4 lambda b p_v.
    """
    edit(vllm, lambda tensors: tensors.update(hidden_states=tensors["hidden_states"].bfloat16()))
    with vllm.states_teacher() as teacher:
        served = teacher(*batch())
    found, gradient = loss_and_gradient(served)
    exact = local_head(vllm.engine.model)
    expected, exact_gradient = loss_and_gradient(exact)
    live = COMPLETION_MASK == 1
    b = 1.01 * 3 * 2.0**-8 * (exact.hidden.abs() @ exact.weight.abs().T).amax(-1)  # (3, 5); 1 %: terms of u^2, float32
    loss_off = (found.token_loss - expected.token_loss).abs()
    assert (loss_off <= 2 * 1.25 * b)[live].all()
    assert loss_off.max() > 1e-4  # the rounding is seen at all
    student = local_head(llama(2))
    reach = (student.hidden @ student.weight.T).softmax(-1) @ student.weight.abs()  # (3, 5, H)
    bound = 4 * 1.25 * b[..., None] * reach / live.sum()
    assert ((gradient - exact_gradient).abs() <= bound)[live].all()
    # the bound is no more than what other states make: those of the position before
    shifted = loss_and_gradient(replace(exact, hidden=exact.hidden.roll(1, 1)))[0].token_loss
    assert ((shifted - expected.token_loss).abs() > 2 * 1.25 * b)[live].any()


def test_padding_and_what_is_not_wanted_are_not_sent(server: Running) -> None:
    ids, attended, wanted = batch()
    with server.states_teacher() as teacher:
        server.bodies.clear()
        teacher(ids, attended, wanted)
    field = "prompt" if server.own_api == "vllm" else "input_ids"
    sent = sorted(body[field][0] for body in server.bodies)
    assert sent == sorted([ids[0, 2:7].tolist(), ids[1].tolist()])
    assert not any("text" in body for body in server.bodies)


def test_a_trainer_takes_it_for_every_estimator(server: Running) -> None:
    checks = pytest.importorskip("fused_gopd.integrations.trl.checks")
    with server.states_teacher(temperature=0.8) as teacher:
        checks.check_kind("teacher", teacher, 0.8)
        with pytest.raises(ValueError, match=r"sample at 0.8, or make it with temperature=1.0"):
            checks.check_kind("teacher", teacher, 1.0)
        for options in ({"estimator": "full"}, {"estimator": "sampled"}, {"estimator": "topk", "k": 4}):
            checks.dry_run(options, {None: teacher}, teacher, torch.device("cpu"))


def test_log_probs_are_made_here(server: Running) -> None:
    with server.states_teacher() as teacher, pytest.raises(TypeError, match="token_logprobs"):
        teacher.score([[1, 2, 3]], [1])


def test_nothing_wanted_asks_nothing(server: Running) -> None:
    ids, attended, wanted = batch()
    with server.states_teacher() as teacher:
        server.bodies.clear()
        assert teacher(ids, attended, torch.zeros_like(wanted)).hidden.shape == (3, 5, H)
    assert not server.bodies


def test_hundreds_of_sequences_stay_in_their_rows(server: Running) -> None:
    generator = torch.Generator().manual_seed(7)
    n = 200
    ids = torch.randint(2, V, (n, 12), generator=generator)
    lengths = torch.randint(3, 13, (n,), generator=generator)
    attended = (torch.arange(12) < lengths[:, None]).long()
    wanted = attended[:, 2:] * torch.randint(0, 2, (n, 10), generator=generator)
    with server.states_teacher(max_concurrency=8) as teacher:
        served = teacher(ids, attended, wanted)
    with torch.no_grad():
        local = last_hidden_state(server.engine.model, ids, attended, keep=10)
    torch.testing.assert_close(served.hidden[wanted == 1], local[wanted == 1], rtol=1e-4, atol=1e-5)
    assert server.most_under_way <= 8
    assert not list(server.folder.iterdir())


def test_what_the_server_sends_is_found_out_and_said(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fused_gopd"), server.states_teacher() as teacher:
        assert str(teacher.capabilities.states) in caplog.text
    if server.own_api == "vllm":
        assert (
            teacher.capabilities.states
            == f"hidden states from before the final norm, float32, in files of {server.folder}"
        )
    else:
        assert teacher.capabilities.states == "hidden states from after the final norm, numbers, in its answers"
    assert teacher.head.final_norm is None


def test_a_cache_keeps_what_a_server_sent(server: Running, tmp_path: Path) -> None:
    from fused_gopd.integrations.cache import TeacherCache

    with server.states_teacher(temperature=0.8) as teacher:
        cached = TeacherCache(tmp_path / "cache").scorer(teacher)
        first = cached(*batch())
        cached(*batch())  # the first scores that are found are asked for again, once, and compared
        server.bodies.clear()
        again = cached(*batch())
        assert not server.bodies
        direct = teacher(*batch())
        hidden, wanted = direct.hidden, COMPLETION_MASK == 1
        for found in (first, again):
            assert torch.equal(found.hidden[wanted], hidden[wanted])
            assert torch.equal(found.weight, direct.weight)
            assert found.temperature == 0.8
        # its attribute is the head of what it returns
        torch.testing.assert_close(teacher.head(hidden, temperature=0.8).weight, direct.weight)
        other = server.states_teacher(head=load_head(server.path, norm=server.own_api == "vllm"))
        assert other.fingerprint == teacher.fingerprint


def test_the_last_of_several_layers_is_taken(vllm: Running) -> None:
    vllm.engine.layers = (1, LAYERS)
    with vllm.states_teacher() as teacher:
        served = teacher(*batch())
    row = vllm.engine.run(batch()[0][1].tolist())[1][3:8]
    torch.testing.assert_close(served.hidden[1, 0], row[0], rtol=1e-5, atol=1e-5)


def test_the_texts_of_tokens_are_compared(vllm: Running) -> None:
    with vllm.states_teacher(tokenizer=test_server.Words()):
        pass
    with pytest.raises(TeacherServerError, match=r"token 5 is ' x5' here and ' w5' there"):
        vllm.states_teacher(tokenizer=test_server.Words(" x"))


# -------------------------------------------------------------------------------- states of something else


def edit(server: Running, change: Callable[[dict[str, Tensor]], Any]) -> None:
    server.engine.change = change


def test_a_head_without_the_norm_is_named(vllm: Running) -> None:
    with pytest.raises(TeacherServerError, match=r"from before the final norm: pass load_head\(..., norm=True\)"):
        vllm.states_teacher(head=load_head(vllm.path))
    with vllm.states_teacher(head=load_head(vllm.path, norm=True)) as teacher:
        teacher(*batch())


def test_a_head_with_the_norm_is_named(sglang: Running) -> None:
    with pytest.raises(TeacherServerError, match=r"from after the final norm: pass load_head\(..., norm=False\)"):
        sglang.states_teacher(head=load_head(sglang.path, norm=True))


@pytest.mark.parametrize(("by", "where"), [(1, "after"), (-1, "before")])
def test_states_shifted_by_one_are_named(vllm: Running, by: int, where: str) -> None:
    edit(vllm, lambda tensors: tensors.update(hidden_states=tensors["hidden_states"].roll(by, 0).contiguous()))
    with pytest.raises(
        TeacherServerError, match=f"shifted by one: the state of a position stands at the one {where} it"
    ):
        vllm.states_teacher()


def test_another_layer_is_named(vllm: Running) -> None:
    vllm.engine.layers = (1,)
    with pytest.raises(TeacherServerError, match=r"another layer .* must be 2, the model's number of layers"):
        vllm.states_teacher()
    vllm.engine.layers = (LAYERS, 1)
    with pytest.raises(TeacherServerError, match="Those of entry 0 of 2 layers do"):
        vllm.states_teacher()


def test_the_head_of_another_model_is_refused(server: Running, tmp_path: Path) -> None:
    llama(9).save_pretrained(tmp_path / "other")
    with pytest.raises(TeacherServerError, match="or the head is another model's"):
        server.states_teacher(head=tmp_path / "other")


def test_a_slightly_other_head_is_refused(server: Running, tmp_path: Path) -> None:
    """As after a little more training: 1e-3 of the head's weights."""
    other = copy.deepcopy(server.engine.model)
    with torch.no_grad():
        other.lm_head.weight += 1e-3 * torch.randn_like(other.lm_head.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(TeacherServerError, match="must give the server's own log-probs"):
        server.states_teacher(head=tmp_path / "other")


def test_another_model_in_the_middle_is_refused(server: Running) -> None:
    with server.states_teacher() as teacher:
        teacher(*batch())
        server.engine.model = llama(9)
        with pytest.raises(TeacherServerError, match="no longer give its own log-probs"):
            teacher(*batch())


def set_entry(name: str, value: Callable[[Tensor], Any]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


WRONG_FILES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no states": (lambda tensors: tensors.pop("hidden_states"), "must have hidden_states and token_ids, got token_ids"),
    "no ids": (lambda tensors: tensors.pop("token_ids"), "must have hidden_states and token_ids, got hidden_states"),
    "other ids": (set_entry("token_ids", lambda x: x + 1), "hidden states of other token ids"),
    "a position less": (set_entry("hidden_states", lambda x: x[:-1].clone()), "must be of 5[23] positions, got 5[12]"),
    "another width": (set_entry("hidden_states", lambda x: x[..., :-2].clone()), "14 entries.* takes 16"),
    "integers": (set_entry("hidden_states", lambda x: x.long()), "must be floating .* got torch.int64"),
    "no layers": (set_entry("hidden_states", lambda x: x[:, :0].clone()), "must be floating"),
    "NaN": (set_entry("hidden_states", lambda x: x.index_fill(0, torch.tensor(3), torch.nan)), "must be finite"),
    "infinity": (set_entry("hidden_states", lambda x: x.index_fill(0, torch.tensor(3), torch.inf)), "must be finite"),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_what_are_no_states_of_the_tokens_is_refused(vllm: Running, wrong: str) -> None:
    change, message = WRONG_FILES[wrong]
    with vllm.states_teacher(tokenizer=test_server.Words()) as teacher:
        edit(vllm, change)
        with pytest.raises(TeacherServerError, match=message.replace("5[23]", "[59]").replace("5[12]", "[48]")):
            teacher(*batch())
        with pytest.raises(TeacherServerError, match=message):
            vllm.states_teacher(tokenizer=test_server.Words())


def of_meta(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    return lambda answer: change(answer[0]["meta_info"])


WRONG_ANSWERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "none": (of_meta(lambda meta: meta.pop("hidden_states")), "start SGLang with --enable-return-hidden-states"),
    "a part": (of_meta(lambda meta: meta["hidden_states"][0].pop(0)), "--disable-radix-cache"),
    "ragged": (of_meta(lambda meta: meta["hidden_states"][0][1].pop()), "its form is not that of api='sglang'"),
    "null": (of_meta(lambda meta: meta["hidden_states"][0][1].__setitem__(0, None)), "its form is not that"),
    "a text": (of_meta(lambda meta: meta["hidden_states"][0][1].__setitem__(0, "1.0")), "its form is not that"),
    "other ids": (of_meta(lambda meta: meta["input_token_logprobs"][1].__setitem__(1, 1)), "must be token"),
}


@pytest.mark.parametrize("wrong", WRONG_ANSWERS)
def test_answers_without_states_are_refused(sglang: Running, wrong: str) -> None:
    change, message = WRONG_ANSWERS[wrong]
    with sglang.states_teacher() as teacher:
        sglang.faults = [changed(change)] * 2
        with pytest.raises(TeacherServerError, match=message):
            teacher(*batch())


# -------------------------------------------------------------------------------- files


def named(path: Any) -> Callable[[Handler, Any], Any]:
    return changed(lambda answer: answer["kv_transfer_params"].update(hidden_states_path=path))


@pytest.mark.parametrize(
    "path",
    ["/srv/states/../secret.safetensors", "..", "/etc/passwd", "/srv/states/.safetensors", "/srv/x.pt", "", 7, None],
)
def test_a_path_out_of_the_folder_is_refused(vllm: Running, path: Any) -> None:
    with vllm.states_teacher() as teacher:
        vllm.faults = [named(path)] * 2
        with pytest.raises(
            TeacherServerError, match=r"must be a safetensors file of its shared folder|its form is not"
        ):
            teacher(*batch())


def test_a_link_is_not_followed(vllm: Running, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    save_file({"hidden_states": torch.zeros(5, 1, H), "token_ids": torch.zeros(5).long()}, secret)
    with vllm.states_teacher() as teacher:
        (vllm.folder / "a.safetensors.lock").touch()
        (vllm.folder / "a.safetensors").symlink_to(secret)
        vllm.faults = [named("/srv/states/a.safetensors")] * 2
        with pytest.raises(TeacherServerError, match="links are not followed"):
            teacher(*batch())
    assert secret.exists()


def test_nothing_is_unpickled(vllm: Running) -> None:
    with vllm.states_teacher(retries=0) as teacher:
        (vllm.folder / "a.safetensors.lock").touch()
        torch.save({"hidden_states": torch.zeros(1)}, vllm.folder / "a.safetensors")
        vllm.faults = [named("/srv/states/a.safetensors")] * 2
        with pytest.raises(TeacherServerError, match="cut or damaged"):
            teacher(*batch())


def test_files_are_deleted_once_they_are_read(vllm: Running) -> None:
    with vllm.states_teacher() as teacher:
        assert not list(vllm.folder.iterdir())
        teacher(*batch())
    assert not list(vllm.folder.iterdir())


def test_another_folder_is_named_at_the_start(vllm: Running, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(
        TeacherServerError, match="must be the connector's shared_storage_path, as this machine sees it"
    ):
        vllm.states_teacher(states_dir=tmp_path / "elsewhere")


def test_a_file_that_is_not_there_or_cut_is_asked_for_again(vllm: Running) -> None:
    """A server that was killed: it has answered, and the file was never written, or not to its end."""
    with vllm.states_teacher() as teacher:

        def cut(answer: Any) -> None:
            name = Path(answer["kv_transfer_params"]["hidden_states_path"]).name
            with (vllm.folder / f"{name}.lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)  # until the file is whole
                (vllm.folder / name).write_bytes((vllm.folder / name).read_bytes()[:100])

        vllm.faults = [named("/srv/states/gone.safetensors"), changed(cut)]
        served = teacher(*batch())
        row = vllm.engine.run(batch()[0][1].tolist())[1]
        torch.testing.assert_close(served.hidden[1, 0], row[3], rtol=1e-5, atol=1e-5)


def test_a_file_that_is_never_whole_is_an_error(vllm: Running) -> None:
    with vllm.states_teacher(retries=1) as teacher:
        teacher._connection.timeout = 1.0  # of an answer, too, which a busy machine is slow to give
        lock = os.open(vllm.folder / "a.safetensors.lock", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        vllm.faults = [named("/srv/states/a.safetensors")] * 4
        with pytest.raises(TeacherServerError, match=r"still being written after timeout=1 s"):
            teacher(*batch())
        os.close(lock)


def test_a_file_without_a_lock_is_named(vllm: Running) -> None:
    with vllm.states_teacher() as teacher:
        save_file({"x": torch.zeros(1)}, vllm.folder / "a.safetensors")
        vllm.faults = [named("/srv/states/a.safetensors")] * 2
        with pytest.raises(TeacherServerError, match="start vLLM without use_synchronization_lock=false"):
            teacher(*batch())


# -------------------------------------------------------------------------------- the constructor, and messages


def test_a_server_without_states_is_named(vllm: Running) -> None:
    vllm.faults = [changed(lambda answer: answer.pop("kv_transfer_params"))]
    with pytest.raises(TeacherServerError, match="extract_hidden_states"):
        vllm.states_teacher()
    vllm.faults = [changed(lambda answer: answer.update(kv_transfer_params=None))]
    with pytest.raises(TeacherServerError, match="extract_hidden_states"):
        vllm.states_teacher()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"api": "openai"}, ValueError, "api must be 'vllm' or 'sglang'"),
        ({"top_k": 8}, ValueError, "top_k is an option of ServerTeacher"),
        ({"batch_size": 2}, ValueError, "batch_size is an option of ServerTeacher"),
        ({"states_dir": None}, ValueError, "states_dir must be given"),
        ({"api": "sglang"}, ValueError, "states_dir is for api='vllm'"),
        ({"states_dir": "/nowhere/at/all"}, ValueError, "states_dir must be a folder"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"head": 7}, TypeError, "head must be a path"),
        ({"head": "/nowhere/at/all"}, ValueError, "/nowhere/at/all"),
    ],
)
def test_what_makes_no_teacher_is_refused(
    vllm: Running, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vllm.states_teacher(**options)


def test_a_system_without_file_locks_is_named(vllm: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_gopd.integrations.server.states.fcntl", None)
    with pytest.raises(ValueError, match=r"by its file locks \(fcntl\), which Windows does not have"):
        vllm.states_teacher()


def test_no_traceback_with_its_locals_has_a_key(vllm: Running) -> None:
    options: dict[str, Any] = {"api": "vllm", "head": vllm.path, "states_dir": vllm.folder, "retries": 0}
    errors: list[BaseException] = []
    for wrong in ({"top_k": 3}, {"states_dir": None}, {"model": "another"}):
        given = {"model": "teacher", **options, **wrong, "api_key": "s3cret-key"}
        try:
            HiddenStateTeacher(vllm.url, **given)
        except (ValueError, TeacherServerError) as error:
            given.clear()  # this frame's own
            errors.append(error)
    teacher = HiddenStateTeacher(vllm.url, "teacher", **options, api_key="s3cret-key")
    assert "s3cret-key" not in repr(vars(teacher))
    vllm.faults = [status(400, b"")] * 2
    with pytest.raises(TeacherServerError) as refused:
        teacher(*batch())
    errors.append(refused.value)
    assert len(errors) == 4
    for error in errors:
        text = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
        assert "s3cret-key" not in text.replace('api_key="s3cret-key"', "").replace('"api_key": "s3cret-key"', "")


def test_a_refusal_and_a_key_are_those_of_any_server(vllm: Running) -> None:
    with vllm.states_teacher(api_key="s3cret-key") as teacher:
        vllm.faults = [status(400, {"error": {"message": "no s3cret-key here"}})] * 2
        with pytest.raises(TeacherServerError, match=r"refused, status 400: no \*\*\* here"):
            teacher(*batch())
        vllm.faults = [named("/srv/s3cret-key.pt")] * 2
        with pytest.raises(TeacherServerError) as error:
            teacher(*batch())
    assert "s3cret-key" not in str(error.value)
