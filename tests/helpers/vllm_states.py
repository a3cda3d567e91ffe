"""For vLLM's process: its connector of hidden states, on a CPU.

vLLM 0.32's ExampleHiddenStatesConnector copies states from the GPU through pinned memory, which needs a GPU. Here the
same tensors go into the same file under the same lock. All else of it runs as it is.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as original


class _Copied:
    """In the place of a CUDA event: the copy is done."""

    def query(self) -> bool:
        return True


class CPUHiddenStatesConnector(original.ExampleHiddenStatesConnector):
    """With a write that needs no GPU."""

    def _submit_async_write(self, pending: Any) -> None:
        offsets = torch.arange(self._block_size)
        slots = torch.tensor(pending.block_ids)[:, None] * self._block_size + offsets
        states = original.extract_from_kv_cache(self._kv_cache, slots.flatten(), len(pending.token_ids)).contiguous()
        tensors = {"hidden_states": states, "token_ids": pending.token_ids.clone()}
        lock = self._lock_fds.pop(pending.req_id)
        self._req_copy_events[pending.req_id] = _Copied()

        def write() -> None:
            try:
                save_file(tensors, pending.filename)
            finally:
                os.close(lock)  # gives the lock back

        future = self._executor.submit(write)
        self._req_futures[pending.req_id] = future
        future.add_done_callback(lambda done: self._on_write_done(pending.req_id, done))
