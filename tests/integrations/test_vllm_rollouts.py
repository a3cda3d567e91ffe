"""A real vLLM as the engine of GOPDTrainer, in the trainer's process, on a CPU. Run by ``make test-server``."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("trl")

import fused_gopd
from test_vllm import VLLM, Files

pytestmark = pytest.mark.skipif(not VLLM, reason="vLLM's own Python is that of make test-server")

SCRIPT = Path(__file__).parents[1] / "helpers" / "vllm_rollouts.py"


def test_the_engines_log_probs_are_those_of_the_student(tmp_path: Path) -> None:
    """vLLM samples in bfloat16 at a temperature of 0.7; its weights follow three syncs, each used for two steps."""
    Files(tmp_path)
    python = Path(str(VLLM)).resolve().with_name("python")
    package = str(Path(fused_gopd.__file__).parents[1])
    result = subprocess.run(
        [python, SCRIPT, tmp_path, sysconfig.get_path("purelib")],
        env={**os.environ, "PYTHONPATH": package if "site-packages" not in package else ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    logs = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"')]
    steps = [log for log in logs if "loss" in log]
    assert [log["gopd/staleness"] for log in steps] == [0, 1] * 3
    # the student moves far between two syncs: of the second steps' tokens most are clipped at a ratio of 0.8 or 1.2
    assert all(log["gopd/clip_fraction"] > 0.5 for log in steps[1::2])
    for log in steps:  # the engine's weights follow: what is left is bfloat16, whose log-probs differ by 2**-8 or so
        assert 0 < log["gopd/sampler_kl"] < 0.02
        assert log["gopd/importance"] == pytest.approx(1, abs=0.05)
        assert 0.95 < log["gopd/effective_sample_size"] < 1
        assert 1 < log["gopd/importance_max"] <= 2
