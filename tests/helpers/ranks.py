"""Run a function of a test module on several ranks, processes on this machine that talk over gloo.

    results = run_on_ranks("test_distributed:_losses", 2, 1.25)

The function is called on every rank inside the default process group, with the same arguments. Ranks are forked from a
process that has imported the large packages which this one has, so that a launch does not import them for each rank
anew; it still takes a second: let one function check many cases.
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

# How long the other ranks may go on after one has failed: to say what they met.
GRACE = 10.0
# How long a rank may take to start, before its own clock runs: the first ones wait for the imports.
START = 60.0
# What the process that is forked imports, as far as this one has at the first launch.
LARGE = ("torch", "pytest", "hypothesis", "fused_gopd.integrations.transformers", "fused_gopd.integrations.trl", "peft")


class RankError(AssertionError):
    """What went wrong, rank by rank."""


def run_on_ranks(function: str, n: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """What a function returns on each of n ranks.

    Args:
        function: ``"module:name"``, a module on this process's ``sys.path``, or ``"path/to/file.py:name"``.
        n: number of processes; one thread each.
        args: what ``torch.save`` can write and ``torch.load`` read.
        timeout: seconds for the function with its imports but PyTorch's. A rank that is not done by then tells where
            it was.

    Returns:
        One entry per rank, through ``torch.save``.

    Raises:
        RankError: with the traceback of every rank that failed, the first to fail first.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save((function, args, timeout), folder / "call.pt")
        # the loopback device is all there is in a sandbox, and the only one on which no two test runs can meet
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_PORT": str(_free_port())}
        (folder / "log").touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([name for name in LARGE if name in sys.modules])
        ranks: list[BaseProcess] = [
            context.Process(
                target=_worker, args=(folder, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}), daemon=True
            )
            for rank in range(n)
        ]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, timeout)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        results = [folder / f"{rank}.pt" for rank in range(n)]
        errors = sorted((x for x in folder.glob("*.error") if x.stat().st_size), key=lambda x: x.stat().st_mtime)
        if errors or any(process.exitcode for process in ranks) or not all(x.exists() for x in results):
            told = [f"rank {x.stem}:\n{x.read_text()}" for x in errors]
            raise RankError("\n".join([f"{function} failed", *(told or [(folder / "log").read_text()])]))
        return [torch.load(x, weights_only=False) for x in results]


def _wait(ranks: list[BaseProcess], timeout: float) -> None:
    """Until all have ended, or time is up: that of a launch, or what is left to the others where one has failed."""
    end = time.monotonic() + START + timeout + GRACE
    failed = False
    while any(process.exitcode is None for process in ranks) and time.monotonic() < end:
        if not failed and any(process.exitcode for process in ranks):
            failed, end = True, min(end, time.monotonic() + GRACE)
        time.sleep(0.02)


def _free_port() -> int:
    """For libraries that want one; the ranks meet at a file."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _find(function: str) -> Callable[..., Any]:
    where, _, name = function.rpartition(":")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    found: Callable[..., Any] = getattr(module, name)
    return found


def _worker(folder: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(log, standard)
    sys.path[:] = environment["PYTHONPATH"].split(os.pathsep)
    rank = int(environment["RANK"])
    function, args, timeout = torch.load(folder / "call.pt", weights_only=False)
    with (folder / f"{rank}.error").open("w") as error:
        # a rank that waits for one that will not come says so, and ends
        faulthandler.dump_traceback_later(timeout, exit=True, file=error)
        try:
            torch.set_num_threads(1)
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=datetime.timedelta(seconds=timeout),
            )
            result = _find(function)(*args)
            torch.save(result, folder / f"{rank}.pt")
            torch.distributed.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=error)
            raise
        faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    # gloo's threads may outlive a model that still holds the process group, and abort the interpreter's own end
    os._exit(0)
