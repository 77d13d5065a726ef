"""A model, and a real server process of it with OpenAI's own client."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from models import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def client(checkpoint: Path) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mixture_of_depths", "serve", str(checkpoint), "--port", str(port)]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        connected = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        for _ in range(600):
            try:
                connected.models.list()
                break
            except openai.APIConnectionError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.2)
        yield connected
        assert process.poll() is None, "the server ended"
        process.terminate()
