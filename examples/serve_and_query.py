"""`vllm serve` with a ViSpec head, asked through the OpenAI client.

`python -m examples.serve_and_query` starts a server, sends a base64 image and stops the server;
`--no-start` only prints the command; `--url` asks a server that runs already.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from examples.pair import (
    DraftOption,
    DraftTokensOption,
    ModelOption,
    Pair,
    PairError,
    has_gpu,
    prepare_environment,
)
from examples.pictures import load_picture, to_data_url
from examples.tiny_vlm.shipped import DRAFT_TOKENS, HEAD, MAX_MODEL_LEN, TARGET

SERVED_NAME = "vispec-demo"


def serve_arguments(pair: Pair, port: int) -> list[str]:
    """Return what follows ``vllm`` on the command line."""
    arguments = [
        "serve",
        pair.model,
        "--speculative-config",
        json.dumps(pair.speculative_config()),
        "--served-model-name",
        SERVED_NAME,
        "--max-model-len",
        str(MAX_MODEL_LEN),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    return arguments if has_gpu() else [*arguments, "--enforce-eager"]


@contextmanager
def running_server(arguments: list[str], url: str, patience: float) -> Iterator[None]:
    """Run ``vllm`` until the block ends.

    Raises:
        PairError: The server ended, or was not ready in time.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]
    process = subprocess.Popen(command, env=os.environ.copy())
    try:
        _wait_until_ready(process, url, time.monotonic() + patience)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PairError(f"the server ended with status {process.returncode}; see its log above")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise PairError("the server was not ready in time, see its log above; raise --patience")


def ask(url: str, data_url: str, question: str, max_tokens: int) -> None:
    """Print the answer while it arrives."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    content = [
        {"type": "image_url", "image_url": {"url": data_url}},
        {"type": "text", "text": question},
    ]
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        temperature=0.0,
        max_tokens=max_tokens,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def main(
    model: ModelOption = TARGET,
    draft_model: DraftOption = HEAD,
    num_speculative_tokens: DraftTokensOption = DRAFT_TOKENS,
    port: Annotated[int, typer.Option()] = 8000,
    url: Annotated[str | None, typer.Option(help="Ask this server, start none.")] = None,
    no_start: Annotated[bool, typer.Option("--no-start", help="Only print the command.")] = False,
    image: Annotated[Path | None, typer.Option(help="Image file; default: a drawn scene.")] = None,
    question: Annotated[str, typer.Option()] = "Describe the picture.",
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    patience: Annotated[float, typer.Option(help="Seconds to wait for the server.")] = 600.0,
) -> None:
    """Serve the pair and ask one question over HTTP."""
    picture = to_data_url(load_picture(image))
    if url is not None:
        ask(url.rstrip("/"), picture, question, max_tokens)
        return
    arguments = serve_arguments(Pair(model, draft_model, num_speculative_tokens), port)
    print(shlex.join(["vllm", *arguments]), flush=True)
    if no_start:
        return
    prepare_environment()
    local = f"http://127.0.0.1:{port}"
    with running_server(arguments, local, patience):
        ask(local, picture, question, max_tokens)


if __name__ == "__main__":
    typer.run(main)
