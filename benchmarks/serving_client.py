"""One client of `serving_load.py`: asks for completions until it is killed, and writes a line of JSON per answer.

    python serving_client.py PORT MODEL SEED

A request is greedy, so that its answer is known; half of them are streamed, and one in ten has no prompt and must be
refused. A line has the request's `number` (-1 without a prompt), the answer's `status` (0 when there was none), `text`
and `seconds`.
"""

import http.client
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

REQUESTS = 64


def request(model: str, number: int, stream: bool) -> dict[str, Any]:
    """The request of a number, from 0 to `REQUESTS` - 1; -1 is the one without a prompt."""
    prompt = "" if number < 0 else f"the {number}"
    return {"model": model, "prompt": prompt, "max_tokens": 1 + number % 40, "temperature": 0, "stream": stream}


def texts(response: http.client.HTTPResponse, stream: bool) -> Iterator[str]:
    """The parts of an answer's text."""
    if not stream:
        yield json.loads(response.read())["choices"][0]["text"]
        return
    for line in response:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield "".join(choice["text"] for choice in json.loads(line[6:])["choices"])


def ask(port: int, model: str, number: int, stream: bool) -> dict[str, Any]:
    """Sends a request; returns the line that is written about it."""
    began, status, text = time.perf_counter(), 0, ""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(request(model, number, stream)), headers)
        response = connection.getresponse()
        text = "".join(texts(response, stream)) if response.status == 200 else response.read().decode()
        status = response.status
    except (OSError, http.client.HTTPException) as error:
        text = repr(error)
    finally:
        connection.close()
    return {"number": number, "status": status, "text": text, "seconds": time.perf_counter() - began}


def main() -> None:
    port, model, seed = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    draw = random.Random(seed)
    while True:
        number = -1 if draw.random() < 0.1 else draw.randrange(REQUESTS)
        print(json.dumps(ask(port, model, number, draw.random() < 0.5)), flush=True)


if __name__ == "__main__":
    main()
