"""What the examples run on when no models are named: tiny models of random weights, which need no download.

``checkpoint("student")`` writes one into a temporary folder, as ``save_pretrained`` does, and returns its path;
``serve(path)`` is a server of one, which answers as vLLM does. Nothing here is needed with models of your own.
"""

import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

_CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
_FOLDER = tempfile.TemporaryDirectory()  # removed when the program ends


def checkpoint(name: str) -> str:
    """A folder with a model of random weights and its tokenizer, the same for the same name."""
    size = {"student": 64}.get(name, 96)
    torch.manual_seed(sum(name.encode()))
    config = Qwen3Config(
        vocab_size=258, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, eos_token_id=256, pad_token_id=257, initializer_range=0.15,
    )  # fmt: skip
    bytes_ = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_ | {"<eos>": 256, "<pad>": 257}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = _CHAT
    logging.disable_progress_bar()
    folder = str(Path(_FOLDER.name, name))
    Qwen3ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def serve(path: str) -> str:
    """Serve log-probs of a model on this machine in the format of ``vllm serve``; returns the address."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content: object, status: int = 200) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self) -> None:
            self.answer({"data": [{"id": path, "max_model_len": 4096}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions":
                self.answer({"error": {"message": "there is no such endpoint"}}, 404)
                return
            choices = []
            for i, ids in enumerate(body["prompt"]):
                with torch.no_grad():
                    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                scored = [(t, float(row[t]), tokenizer.decode([t])) for t, row in zip(ids[1:], logprobs, strict=False)]
                tokens = [{str(t): {"logprob": logprob, "decoded_token": text}} for t, logprob, text in scored]
                choices.append({"index": i, "text": "", "prompt_logprobs": [None, *tokens]})
            self.answer({"choices": choices})

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
