"""What the guide on serving asks of its example server, hostile requests before good ones."""

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch

_MOST_SECONDS = 60  # a server that lost its thread never answers
_HOSTILE = [  # body, path
    ("500000", "1"),
    ("-1", "1"),
    ("", "1"),
    ("1 x", "1"),
    ("1", "x"),
    ("1", ""),
    ("1", "0"),
    ("1", "1000000000"),
]


def check_example_server(server: Any, waiting: "queue.Queue[Any]", model: Any) -> None:
    """`waiting`: where requests wait, for a batch that fails though its requests were let in."""

    def ask(body: str, path: str = "5") -> list[int]:
        url = f"http://127.0.0.1:{server.server_port}/{path}"
        with urlopen(url, body.encode(), timeout=_MOST_SECONDS) as answer:
            return [int(line) for line in answer]

    for body, path in _HOSTILE:
        with pytest.raises(HTTPError, match="400"):
            ask(body, path)
    failed: queue.Queue[Any] = queue.Queue()
    waiting.put(([500000], 1, failed))
    assert failed.get(timeout=_MOST_SECONDS) is None
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11, 12], [400]]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(ask, [" ".join(map(str, prompt)) for prompt in prompts]))
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        assert len(answer) == 5
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        assert (logits.amax(1) - chosen <= 0.03 * logits.abs().amax()).all()
