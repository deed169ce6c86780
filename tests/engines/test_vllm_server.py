"""vLLM's OpenAI server with the plug-in: a patched model over HTTP on this machine, for several clients at a time."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from linearpatch_kernels.modeling.saving import save_checkpoint
from tests.engines.test_vllm import NEW_TOKENS, pytestmark, tiny
from tests.support.tiny import VOCABULARY, tiny_tokenizer
from tools.engines.vllm import VENV, environment_of_vllm, plug_in
from tools.engines.writing import expected_of

__all__ = ["pytestmark"]

CLIENTS, REQUESTS = 8, 200
STARTS_IN, ANSWERS_IN = 600, 300


class Server(NamedTuple):
    port: int
    prompts: list[list[int]]
    texts: list[str]
    """What Transformers writes after each prompt."""


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    model, tokenizer = tiny("llama"), tiny_tokenizer(128)
    prompts = torch.randint(6, VOCABULARY, (CLIENTS, 12), generator=torch.Generator().manual_seed(3))
    written = expected_of(model, prompts, NEW_TOKENS)[1].written
    texts = [tokenizer.decode(row) for row in written]
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        save_checkpoint(model, tokenizer, root / "model")
        command = [VENV / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", root / "model"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
        with open(root / "log", "w+") as log:
            process = subprocess.Popen(
                [*command, "--enforce-eager", "--max-num-seqs", "16"],
                env=environment_of_vllm(root, plug_in(root)),
                cwd=root,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                wait_for(process, port, root / "log")
                yield Server(port, prompts.tolist(), texts)
            finally:
                process.terminate()
                process.wait(60)


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + STARTS_IN
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def ask(server: Server, index: int, *, chunks: int | None = None) -> str:
    """The text of a streamed answer; of its first ``chunks`` pieces, after which the client is gone."""
    asked = {"prompt": server.prompts[index], "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    pieces: list[str] = []
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWERS_IN)) as connection:
        body = json.dumps({**asked, "stream": True, "skip_special_tokens": False})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if data and data != "[DONE]":
                pieces += [choice["text"] for choice in json.loads(data)["choices"]]
            if chunks is not None and len(pieces) >= chunks:
                break
    return "".join(pieces)


def test_clients_at_the_same_time_get_what_transformers_writes(server: Server) -> None:
    begin = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [*pool.map(lambda index: ask(server, index % CLIENTS), range(REQUESTS))]
    print(f"{REQUESTS} requests by {CLIENTS} clients: {time.monotonic() - begin:.0f} s")
    for index, answer in enumerate(answers):
        assert answer.split() == server.texts[index % CLIENTS].split()


def test_a_client_that_goes_away_hurts_no_other(server: Server) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [*pool.map(lambda index: ask(server, index, chunks=2 if index % 2 else None), range(CLIENTS))]
    for index, answer in enumerate(answers):
        expected = server.texts[index].split()
        assert answer.split() == (expected[: len(answer.split())] if index % 2 else expected)
    assert ask(server, 1).split() == server.texts[1].split()
