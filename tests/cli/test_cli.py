"""The command line: what doctor and plan promise, without a GPU."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fused_gopd import installing, rowops
from fused_gopd.cli import app, doctor, machine

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
GIB = 1 << 30


def invoke(*arguments: str, code: int = 0, columns: int = 200) -> str:
    result = runner.invoke(app, list(arguments), env={"COLUMNS": str(columns)})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


# ------------------------------------------------------------------------------------------------------------- doctor


@pytest.fixture
def only_torch_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where the PyTorch backend is all there is and all there should be."""
    torch_only = [doctor.Backend("torch", None, True), doctor.Backend("native", "not built", False)]
    monkeypatch.setattr(doctor, "_find_backends", lambda: torch_only)


def test_doctor_status_says_whether_all_is_well() -> None:
    result = runner.invoke(app, ["doctor", "--json"])
    data = json.loads(result.output)
    assert result.exit_code == (0 if data["ok"] else 1)
    assert {b["name"] for b in data["backends"]} == {"torch", "native", "triton"}
    checked = {(c["backend"], c["estimator"]) for c in data["checks"]}
    assert {("torch", "sampled"), ("torch", "full"), ("torch", "topk")} <= checked
    assert all(c["passed"] for c in data["checks"])


def test_doctor_table_shows_errors_and_versions(only_torch_expected: None) -> None:
    output = invoke("doctor")
    assert "All is well" in output
    assert torch.__version__ in output
    assert "gradient: likewise of hidden states and head" in output


def test_doctor_names_cpu_frameworks_and_the_command_for_a_missing_extra(
    monkeypatch: pytest.MonkeyPatch, only_torch_expected: None
) -> None:
    real = installing._installed
    monkeypatch.setattr(installing, "_installed", lambda project: project != "trl" and real(project))
    data = json.loads(invoke("doctor", "--json"))
    assert machine.cpu_model() in data["machine"]["cpu"]
    assert data["machine"]["instruction set of PyTorch"] == torch.backends.cpu.get_cpu_capability()
    assert set(doctor.FRAMEWORKS) <= data["versions"].keys()
    (train,) = [extra for extra in data["extras"] if extra["name"] == "train"]
    assert [requirement[:3] for requirement in train["missing"]] == ["trl"]
    assert train["install"] == installing.extra("train")
    for text in (machine.cpu_model(), installing.extra("train"), data["columns"]["dense"]):
        assert text in invoke("doctor")


@pytest.mark.parametrize("compiler", [None, "/usr/bin/c++"])
def test_doctor_says_what_the_native_extension_lacks(monkeypatch: pytest.MonkeyPatch, compiler: str | None) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'fused_gopd._native'", name="fused_gopd._native")

    monkeypatch.setattr(rowops.native, "_load", missing)
    monkeypatch.setattr(doctor, "compiler", lambda: compiler)
    output = invoke("doctor", code=0 if torch.cuda.is_available() else 1)
    assert f"this builds it: {installing.rebuild()}\n" in output
    assert ("There is no C++ compiler here" in output) == (compiler is None)
    assert "C++ compiler" in output


def test_doctor_asks_for_triton_only_where_it_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for gpu, reason in ((False, "PyTorch sees no GPU"), (True, "the package triton is not installed")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert reason in str(rowops.unavailable_reason("triton"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "the package triton is not installed" in str(rowops.unavailable_reason("triton"))


@pytest.mark.parametrize("command", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_help_has_every_option_in_full_at_80_columns(command: str) -> None:
    assert "…" not in invoke(command, "--help", columns=80)


def test_doctor_reports_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "_devices_of_torch", broken)
    output = invoke("doctor", code=1)
    assert "problem: PyTorch cannot be imported: libcudart.so.12" in output
    data = json.loads(invoke("doctor", "--json", code=1))
    assert data["problems"] == ["PyTorch cannot be imported: libcudart.so.12: cannot open shared object file"]
    assert data["extras"]


def test_doctor_is_readable_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["doctor"])
    assert "…" not in result.output
    commands = [extra.install for extra in doctor._extras()] + [installing.rebuild()]
    for line in result.output.splitlines():
        assert len(line) <= 80 or any(command in line for command in commands) or "PyTorch" in line, line
    assert any(line.split()[:3] == ["torch", "cpu", "full"] for line in result.output.splitlines())


def test_doctor_fails_when_the_backend_of_this_device_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "triton" if torch.cuda.is_available() else "native"
    real = rowops.unavailable_reason
    monkeypatch.setattr(rowops, "unavailable_reason", lambda n: "it fell off" if n == expected else real(n))
    assert f"backend '{expected}' should be available on this machine: it fell off" in invoke("doctor", code=1)


def test_doctor_survives_a_backend_that_cannot_even_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rowops.unavailable_reason

    def broken(name: str) -> str | None:
        if name != "torch":
            raise ImportError("undefined symbol")
        return real(name)

    monkeypatch.setattr(rowops, "unavailable_reason", broken)
    assert "ImportError: undefined symbol" in invoke("doctor", code=1)


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_doctor_fails_on_wrong_numbers(monkeypatch: pytest.MonkeyPatch, only_torch_expected: None, fault: str) -> None:
    right = doctor._TestCall.solve

    def faulty(self: Any, estimator: Any, device: str, dtype: torch.dtype, backend: str | None) -> list[torch.Tensor]:
        loss, hidden, weight = right(self, estimator, device, dtype, backend)
        if backend is None or estimator == "sampled":
            return [loss, hidden, weight]
        if fault == "raises":
            raise RuntimeError("no such instruction")
        return [loss, hidden, weight * (1.001 if fault == "wrong" else float("nan"))]

    monkeypatch.setattr(doctor._TestCall, "solve", faulty)
    output = invoke("doctor", code=1)
    assert "self-check of 'torch' on cpu, full" in output
    assert "self-check of 'torch' on cpu, sampled" not in output
    assert ("no such instruction" in output) == (fault == "raises")
