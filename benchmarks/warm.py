"""Run providers of suites once and time nothing, so that what they compile is on the disk before a timed run.

python -m benchmarks.warm --device cuda --suites run,peers --providers compile,quack
"""

from __future__ import annotations

import argparse
import gc

import torch

from .registry import PROVIDERS, cases
from .run import names
from .workloads import SUITES, synchronize


def warm(suites: tuple[str, ...], device: str, providers: tuple[str, ...]) -> list[str]:
    """The names of the cases that ran."""
    done = []
    for suite in suites:
        for workload, provider in cases(suite, device, (), providers):
            if provider not in PROVIDERS or PROVIDERS[provider].unavailable(workload) is not None:
                continue
            try:
                PROVIDERS[provider].prepare(workload)(workload.inputs())
                synchronize(device)
                done.append(f"{workload.name}-{provider}")
                print(done[-1], flush=True)
            except Exception as error:  # the timed run reports it
                print(f"{workload.name}-{provider}: {type(error).__name__}: {error}", flush=True)
            torch.compiler.reset()
            gc.collect()
            if torch.device(device).type == "cuda":
                torch.cuda.empty_cache()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--suites", required=True, help=f"comma-separated, of {', '.join(SUITES)}")
    parser.add_argument("--providers", required=True, help="comma-separated")
    args = parser.parse_args()
    warm(names(args.suites), args.device, names(args.providers))


if __name__ == "__main__":
    main()
