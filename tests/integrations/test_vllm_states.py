"""A real vLLM server that sends hidden states: the loss is that of the model here, and a kill -9 loses nothing.

Run by ``make test-server``, as ``test_vllm.py``. All of the server is vLLM's own but the copy from a GPU's memory, in
whose place ``tests/helpers/vllm_states.py`` has one that needs no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("httpx")
pytest.importorskip("trl")

from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_gopd as fg
import test_vllm
from fused_gopd.integrations.server import HiddenStateTeacher, ServerTeacher, TeacherServerError, states
from fused_gopd.integrations.transformers import head_of
from test_vllm import STARTING, Files, Server

pytestmark = test_vllm.pytestmark

HELPERS = Path(__file__).parent.parent / "helpers"
LENGTH = 768


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("states"), positions=1024)


def options(layers: list[int], folder: Path) -> list[str]:
    """As docs/integrations/server.md has them, with the connector for a CPU."""
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
    }
    transfer = {
        "kv_connector": "CPUHiddenStatesConnector",
        "kv_connector_module_path": "vllm_states",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    return ["--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer)]


def serve(files: Files, layers: list[int], dtype: str = "float32") -> Iterator[Server]:
    folder = files.folder / "shared"
    folder.mkdir(exist_ok=True)
    log = files.folder / "vllm.log"
    running = Server(files.teacher, log, *options(layers, folder), dtype=dtype, path=HELPERS, length=LENGTH)
    try:
        running.start()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def server(files: Files) -> Iterator[Server]:
    yield from serve(files, [2])


def states_teacher(server: Server, files: Files, **options: Any) -> HiddenStateTeacher:
    given = {"head": files.teacher, "states_dir": files.folder / "shared", "api_key": "a-key", **options}
    return HiddenStateTeacher(server.url, "teacher", **given)


def one_by_one(path: str, dtype: torch.dtype, temperature: float = 1.0) -> fg.LinearHead:
    """A model's head on the batch, each sequence run alone and without padding, as the server runs it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    ids, attended, wanted = test_vllm.batch()
    hidden = torch.zeros(*wanted.shape, model.config.hidden_size, dtype=dtype)
    with torch.no_grad():
        for row in range(len(ids)):
            sequence, count = ids[row][attended[row] == 1], int(wanted[row].sum())
            hidden[row, :count] = model.model(sequence[None]).last_hidden_state[0, -count - 1 : -1]
    return head_of(model, hidden, temperature=temperature)


def full(files: Files, teacher: fg.LinearHead, temperature: float = 1.0) -> tuple[fg.GOPDOutput, Tensor]:
    """The loss of three models at lambda = 1.25, and its gradient; student and reference are exact, in float64."""
    ids, _, wanted = test_vllm.batch()
    to_double = {name: x.double() for name in ("hidden", "weight", "bias") if (x := getattr(teacher, name)) is not None}
    exact = fg.LinearHead(**to_double, temperature=temperature)
    student = one_by_one(files.student, torch.float64, temperature)
    hidden = student.hidden.clone().requires_grad_()
    mine = fg.LinearHead(hidden, student.weight.detach(), temperature=temperature)
    ref = fg.LinearHead(student.hidden.flip(1), student.weight.detach(), temperature=temperature)
    out = fg.gopd_loss(mine, exact, ref, ids[:, 4:], mask=wanted, reward_scale=1.25, estimator="full")
    out.loss.backward()
    assert hidden.grad is not None
    return out, hidden.grad


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_full_loss_is_that_of_the_model_here(files: Files, server: Server, temperature: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files.teacher)
    with states_teacher(server, files, tokenizer=tokenizer, temperature=temperature) as teacher:
        assert str(teacher.capabilities.states).startswith(
            "hidden states from before the final norm, float32, in files"
        )
        first = teacher(*test_vllm.batch())
        again = teacher(*test_vllm.batch())  # from vLLM's prefix cache
    assert not list((files.folder / "shared").iterdir())
    expected, gradient = full(files, one_by_one(files.teacher, torch.float64, temperature), temperature)
    for served in (first, again):
        out, found = full(files, served, temperature)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.token_loss, expected.token_loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.kl, expected.kl, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_hundreds_of_long_sequences_stay_in_their_rows(
    files: Files, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 sequences of 512 tokens at once, and the bytes of their files."""
    sizes = []
    delete = states._Folder._delete

    def counted(folder: Any, name: str) -> None:
        sizes.append((folder.path / name).stat().st_size)
        delete(folder, name)

    monkeypatch.setattr(states._Folder, "_delete", counted)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 320, (200, 512), generator=generator)
    ids[::3, :256] = ids[0, :256]  # a third of them share a prefix
    mask = torch.ones(200, 512, dtype=torch.int64)
    with states_teacher(server, files) as teacher:
        sizes.clear()  # of the constructor's
        served = teacher(ids, mask, mask[:, 1:])
    assert len(sizes) == 200
    assert 4 * 64 + 8 <= sum(sizes) / (200 * 512) < 4 * 64 + 8 + 1  # float32 states and an id; the header
    model = AutoModelForCausalLM.from_pretrained(files.teacher).eval()
    with torch.no_grad():
        for row in range(0, 200, 20):
            local = model.model(ids[row : row + 20]).last_hidden_state[:, :-1]
            # float32 states of two programs
            torch.testing.assert_close(served.hidden[row : row + 20], local, rtol=1e-3, atol=1e-4)
    assert not list((files.folder / "shared").iterdir())


# -------------------------------------------------------------------------------- training


def test_a_trainer_learns_what_it_learns_from_the_model_here(files: Files, server: Server, tmp_path: Path) -> None:
    options = {"estimator": "full", "temperature": 0.8}
    with states_teacher(server, files, temperature=0.8) as teacher:
        test_vllm.assert_learns_as_from_the_model_here(files, teacher, tmp_path, **options)


def test_a_server_killed_in_the_middle_of_a_run_loses_nothing(files: Files, server: Server, tmp_path: Path) -> None:
    remote = ["--teacher-server", server.url, "--teacher-server-model", "teacher", "--teacher-server-head"]
    remote += [files.teacher, "--teacher-server-states", str(files.folder / "shared"), "--temperature", "0.8"]
    remote += ["--steps", "8"]
    local = ["--teacher", files.teacher, "--temperature", "0.8", "--steps", "8"]
    test_vllm.ended(test_vllm.distill(files, tmp_path / "local", *local))
    test_vllm.ended(test_vllm.distill(files, tmp_path / "undisturbed", *remote))
    test_vllm.assert_close_runs(tmp_path / "undisturbed", tmp_path / "local")
    run = test_vllm.distill(files, tmp_path / "killed", *remote, "--teacher-server-patience", str(STARTING))
    record = tmp_path / "killed" / "metrics.jsonl"
    with test_vllm.killed_and_restarted(server, record, 3):
        assert run.poll() is None
        assert 3 <= len(test_vllm.rows(record)) < 8
    output = test_vllm.ended(run)
    assert "hidden states from before the final norm, float32" in output
    assert "no answer from" in output
    assert "answers again" in output
    assert [row["step"] for row in test_vllm.rows(record)] == [*range(1, 9)]
    test_vllm.assert_close_runs(tmp_path / "killed", tmp_path / "undisturbed")


# -------------------------------------------------------------------------------- other servers


def test_another_layer_of_a_real_server_is_named(files: Files, server: Server) -> None:
    server.kill()
    for other in serve(files, [1]):
        with pytest.raises(
            TeacherServerError, match=r"They are of another layer .* must be 2, the model's number of layers"
        ):
            states_teacher(other, files)
    for other in serve(files, [0, 2], "bfloat16"):
        bfloat16_states_are_as_exact_as_the_model_here(files, other)


def bfloat16_states_are_as_exact_as_the_model_here(files: Files, server: Server) -> None:
    """In bfloat16 the model's own rounding is in its states. It is measured on transformers' model in bfloat16.

    Two programs round the same operations in another order, so that their errors are of one size and independent.
    """
    with states_teacher(server, files) as teacher:
        assert "bfloat16" in str(teacher.capabilities.states)
        served = teacher(*test_vllm.batch())
    model = AutoModelForCausalLM.from_pretrained(files.teacher, dtype=torch.bfloat16)
    assert served.hidden.dtype == served.weight.dtype == torch.float32  # of the head in the folder
    rounded_head = torch.equal(served.weight.bfloat16(), model.lm_head.weight)
    assert rounded_head
    exact, gradient = full(files, one_by_one(files.teacher, torch.float64))
    local, local_gradient = full(files, one_by_one(files.teacher, torch.bfloat16))
    found, found_gradient = full(files, served)
    live = test_vllm.batch()[2] == 1
    for name in ("token_loss", "kl"):
        a, b, c = (getattr(out, name)[live] for out in (exact, local, found))
        assert float((c - a).square().mean().sqrt()) <= 2 * float((b - a).square().mean().sqrt()), name
    a, b, c = gradient, local_gradient, found_gradient
    assert float((c - a).norm()) <= 2 * float((b - a).norm())
    with ServerTeacher(server.url, "teacher", api_key="a-key") as scorer:
        scorer(*test_vllm.batch())  # the same server gives log-probs too
