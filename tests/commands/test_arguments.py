"""Arguments that commands share: values of options, and models given by name."""

import argparse
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

from fqcompile.commands import add_option_flags, given_options, load_model
from fqcompile.config import FineQuantConfig
from fqcompile.errors import CheckpointError, FineQuantError

NOT_CALLABLE = 3


def good() -> object:
    return nn.Linear(4, 4), [torch.zeros(1, 4)]


def no_inputs() -> object:
    return nn.Linear(4, 4)


def bare_tensor() -> object:
    return nn.Linear(4, 4), torch.zeros(1, 4)


def no_module() -> object:
    return good, (torch.zeros(1, 4),)


def nothing() -> None:
    return None


def test_a_function_gives_the_model_and_its_inputs() -> None:
    model, inputs = load_model(f"{__name__}:good", torch.float32)
    assert isinstance(model, nn.Linear) and not model.training
    assert isinstance(inputs, tuple) and inputs[0].shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("goood", "has no function 'goood'; did you mean 'good'?"),
        ("NOT_CALLABLE", "has no function 'NOT_CALLABLE'"),
        ("no_inputs", "returned Linear; it must return a model and a tuple of its inputs"),
        ("bare_tensor", "returned Linear, Tensor; it must return a model and a tuple"),
        ("no_module", "returned function, tuple; it must return a model"),
        ("nothing", "returned NoneType; it must return a model"),
    ],
)
def test_a_function_that_gives_no_model_is_told_what_to_return(name: str, message: str) -> None:
    with pytest.raises(FineQuantError) as raised:
        load_model(f"{__name__}:{name}", torch.float32)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "name", ["no.such.package:f", "json.no:f", "json.decoder.no:f", ".json:f", ":f", "json", ""]
)
def test_a_module_that_is_not_there_is_one_message(name: str, tmp_path: Path) -> None:
    with pytest.raises(FineQuantError, match="neither a directory with a checkpoint nor 'module"):
        load_model(name or str(tmp_path / "no"), torch.float32)


@pytest.mark.slow
def test_a_module_in_the_working_directory_is_found(tmp_path: Path) -> None:
    """As the installed command runs: Python puts the script's folder on its path, not this one."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn, zeros\ndef make(): return nn.Linear(256, 64), (zeros(1, 256),)\n"
    )
    code = "import sys; from fqcompile.cli import main; sys.path.remove(''); sys.exit(main())"
    command = [sys.executable, "-c", code, "explain", "mine:make"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "quantized 1 of 1 sites" in done.stdout


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json: it is not a Hugging Face checkpoint"),
        ("{", "config.json is not JSON"),
        ("{}", "transformers does not load"),
        (json.dumps({"model_type": "llama", "vocab_size": 8}), "transformers does not load"),
    ],
)
def test_a_directory_without_a_model_is_one_message(
    config: str | None, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError) as raised:
        load_model(str(tmp_path), torch.float32)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "name", "expected"),
    [
        (["--bits", "8"], "bits", 8),
        (["--alpha", ".5"], "alpha", 0.5),
        (["--error-budget", "None"], "error_budget", None),
        (["--error-budget", "null"], "error_budget", None),
        (["--exclude", "lm_head"], "exclude", ("lm_head",)),
        (["--exclude", "['lm_head', 'q']"], "exclude", ("lm_head", "q")),
        (["--exclude", '["lm_head"]'], "exclude", ("lm_head",)),
        (["--include", "layers.[01].mlp"], "include", ("layers.[01].mlp",)),
        (["--granularity", "column"], "granularity", "column"),
        (["--overrides", "{'a': {'bits': 8}}"], "overrides", {"a": {"bits": 8}}),
    ],
)
def test_values_are_json_or_as_messages_write_them(
    flags: list[str], name: str, expected: object
) -> None:
    parser = argparse.ArgumentParser()
    add_option_flags(parser, compiles=True)
    config = FineQuantConfig.from_options(given_options(parser.parse_args(flags)))
    assert getattr(config, name) == expected


@pytest.mark.parametrize("compiles", [True, False])
def test_every_option_has_a_flag(compiles: bool) -> None:
    parser = argparse.ArgumentParser()
    add_option_flags(parser, compiles=compiles)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {f"--{field.name}" for field in fields(FineQuantConfig)} <= flags
