"""A CPU as verl's platform, by the seam that verl has for plugins of that kind: its workers then run without a GPU.

Import it before anything of verl that asks for its device.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import SimpleNamespace

from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform


class PlatformCPU(PlatformCUDA):
    """Everything that asks for a device is told the CPU; what is done to a device is not done."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = SimpleNamespace(
        max_memory_allocated=lambda: 0,
        max_memory_reserved=lambda: 0,
        memory_allocated=lambda: 0,
        memory_reserved=lambda: 0,
        mem_get_info=lambda: (0, 1),
        get_device_name=lambda: "CPU",
        synchronize=lambda *_: None,
        empty_cache=lambda: None,
        is_available=lambda: False,
        device_count=lambda: 1,
        current_device=lambda: "cpu",
    )

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def communication_backend_name(self) -> str:
        return "gloo"

    @contextmanager
    def nvtx_range(self, msg: str):
        yield


set_platform(PlatformCPU())
os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # the engines know cuda and npu; what they call is the platform above
