"""vLLM's V2 model runner on a CPU, with Triton's interpreter in the place of Triton's backend for CPUs.

Python imports this module at its start where its folder is in PYTHONPATH. vLLM's wheel for CPUs comes without that
backend, and has the V1 model runner alone then. All of vLLM is its own code but its kernels, which are interpreted.
"""

import os

os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import backends  # after the variables, which Triton reads when it is imported


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    driver = _Driver


backends.setdefault("cpu", _Backend)  # type: ignore[arg-type]
