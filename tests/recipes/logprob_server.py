"""A server that answers as vLLM's OpenAI-compatible API does to a prompt of token ids with `prompt_logprobs`."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def logprob_server(model: nn.Module) -> Iterator[str]:
    """A context with the URL of a server of the model, which maps ids [1, S] to logits."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/completions"
            body = json.dumps(answer_to(model, question["prompt"], question["prompt_logprobs"])).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def answer_to(model: nn.Module, ids: list[int], k: int) -> dict:
    """The answer: for each token its own log-probability and those of the k most likely, with ranks; null for the first."""
    with torch.no_grad():
        logp = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    entries: list[dict | None] = [None]
    for at, own in enumerate(ids[1:]):
        order = logp[at].argsort(descending=True).tolist()
        shown = dict.fromkeys([own, *order[:k]])
        entries.append(
            {
                str(one): {"logprob": float(logp[at, one]), "rank": order.index(one) + 1, "decoded_token": "?"}
                for one in shown
            }
        )
    choice = {"index": 0, "text": "?", "logprobs": None, "finish_reason": "length", "prompt_logprobs": entries}
    return {"id": "cmpl-1", "object": "text_completion", "model": "served", "choices": [choice]}
