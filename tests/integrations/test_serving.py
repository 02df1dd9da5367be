"""`transformers serve` on packed weights, started as the guide does; it answers as `generate`."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch

pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
pytest.importorskip("openai", reason="transformers[serving] is not installed")
pytest.importorskip("uvicorn", reason="transformers[serving] is not installed")
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import fqcompile
import fqcompile.integrations.transformers  # opens packed weights for from_pretrained
from tests.dense_models import VOCAB, build

STARTED = "import fqcompile.integrations.transformers, transformers.cli.transformers as m; m.main()"
ASKED = {"messages": [{"role": "user", "content": "w5 w17 w300"}], "max_tokens": 6}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A packed model, and a tokenizer of words."""
    model: Any = build("llama", torch.float32)[0]
    plan = fqcompile.quantize_(model, calibration=None, granularity=64, min_elements=1024)
    model.generation_config = hf.GenerationConfig(do_sample=False, pad_token_id=0)
    fqcompile.save(model, tmp_path / "packed", plan=plan)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCAB)}, "w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w1"
    tokenizer.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def address(directory: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", STARTED, "serve", str(directory), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([*command, "--port", str(port)], env=environment) as server:
        try:
            address = f"http://localhost:{port}"
            for _ in range(600):
                assert server.poll() is None, "the server ended"
                try:
                    urlopen(f"{address}/health").read()
                    break
                except (URLError, ConnectionError):
                    time.sleep(0.2)
            yield address
        finally:
            server.terminate()


def _asked(address: str, directory: Path, **more: Any) -> str:
    body = json.dumps({"model": str(directory), **ASKED, **more}).encode()
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"{address}/v1/chat/completions", body, headers)) as answer:
        text: str = answer.read().decode()
    return text


@pytest.mark.slow
def test_transformers_serve_answers_as_generate_does(directory: Path, address: str) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(directory)
    model = hf.AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(ASKED["messages"], return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    whole = json.loads(_asked(address, directory))["choices"][0]["message"]["content"]
    assert whole.split() == expected.split() and len(whole.split()) == 6
    lines = _asked(address, directory, stream=True).splitlines()
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert len(parts) > 3
    streamed = "".join(p["choices"][0]["delta"].get("content") or "" for p in parts if p["choices"])
    assert streamed.split() == expected.split()
