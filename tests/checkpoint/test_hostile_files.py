"""Configs, indexes and headers that nobody should believe, and configs that only look so."""

import copy
import json
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fqcompile
from fqcompile.checkpoint import hugging_face
from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import read_header
from fqcompile.files.untrusted import LARGEST
from tests.checkpoint.small_models import small

transformers: Any = pytest.importorskip("transformers", reason="the demo extra is not installed")

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MAMBA = {"mamba_d_head": 16, "mamba_d_state": 16}
# Those whose configs have an infinite limit.
UNLIMITED: dict[str, dict[str, Any]] = {
    "FalconH1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, **MAMBA},
    "Mamba2": {"head_dim": 16, "num_heads": 8, "state_size": 16, "n_groups": 1},
    "Bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1], **MAMBA},
    "NemotronH": {
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
        "head_dim": 16,
    },
    "GraniteMoeHybrid": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, **MAMBA,
    },
}  # fmt: skip


def _built(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **more})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)


@pytest.mark.parametrize("spelled", ["as transformers writes it", "as Python does"])
@pytest.mark.parametrize("family", UNLIMITED)
def test_a_limit_may_be_infinite(family: str, spelled: str, tmp_path: Path) -> None:
    """Quantized in memory or from the files, saved and loaded: the model is the same."""
    model = _built(family, **UNLIMITED[family])
    model.save_pretrained(tmp_path / "plain")
    path = tmp_path / "plain" / "config.json"
    if spelled == "as Python does":
        content = json.loads(path.read_text())
        assert content["time_step_limit"][1] == {"__float__": "Infinity"}
        path.write_text(json.dumps({**content, "time_step_limit": [0.0, float("inf")]}))
    fqcompile.quantize_checkpoint(tmp_path / "plain", tmp_path / "from_files", min_elements=256)
    fqcompile.quantize_(model, min_elements=256, calibration=None)
    fqcompile.save(model, tmp_path / "from_memory")
    ids = torch.arange(6)[None]
    for directory in ("from_files", "from_memory"):
        loaded: Any = fqcompile.load(None, tmp_path / directory)
        assert list(loaded.config.time_step_limit) == [0.0, float("inf")]
        own = transformers.AutoConfig.from_pretrained(tmp_path / directory)
        assert list(own.time_step_limit) == [0.0, float("inf")]
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)


# A table for each layer, whose size has "layer" in its name.
GEMMA3N: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "head_dim": 32, "num_kv_shared_layers": 0,
    "laurel_rank": 8, "hidden_size_per_layer_input": 16, "altup_num_inputs": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip


def test_a_large_size_of_each_layer_is_no_number_of_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(**GEMMA3N)
    assert config.vocab_size_per_layer_input == 262144
    model = transformers.Gemma3nForCausalLM(config).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "plain")
    fqcompile.quantize_checkpoint(tmp_path / "plain", tmp_path / "from_files", min_elements=256)
    fqcompile.quantize_(model, min_elements=256, calibration=None)
    fqcompile.save(model, tmp_path / "from_memory")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(ids).logits
        for directory in ("from_files", "from_memory"):
            loaded: Any = fqcompile.load(None, tmp_path / directory)
            assert torch.equal(loaded(ids).logits, expected)


@pytest.mark.slow
def test_no_default_of_any_config_counts_too_many_layers() -> None:
    """Every class of configs that transformers has and can make without being told anything."""
    known = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    seen = 0
    for kind in known.values():
        try:
            config = kind().to_dict()
        except Exception:  # some have no defaults
            continue
        hugging_face._check_layers(config, Path(kind.__name__))
        seen += 1
    assert seen > len(known) * 0.95


COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "encoder_layers",
          "depth", "resampler_depth", "num_blocks")  # fmt: skip


@pytest.mark.parametrize("key", COUNTS)
def test_every_number_of_layers_is_bounded(key: str) -> None:
    hugging_face._check_layers({key: 10_000}, Path("d"))
    with pytest.raises(CheckpointError, match=f"{key} is 10001"):
        hugging_face._check_layers({"text_config": {key: 10_001}}, Path("d"))


def _llama(directory: Path) -> dict[str, Any]:
    _built("Llama").save_pretrained(directory)
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


FETCHED = "kernels-community/flash-attn"
CODE: list[dict[str, Any]] = [
    {"attn_implementation": FETCHED},
    {"_attn_implementation": FETCHED},
    {"attn_implementation": {"": FETCHED}},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": f"paged|{FETCHED}@main"},
    {"experts_implementation": "sonicmoe"},
    {"_experts_implementation": "deepgemm"},
]


@pytest.mark.parametrize("entry", CODE, ids=map(str, CODE))
def test_no_implementation_is_fetched(
    entry: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = _llama(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text(json.dumps({**content, **entry}))
    fqcompile.quantize_checkpoint(tmp_path / "plain", tmp_path / "out", min_elements=256)
    loaded: Any = fqcompile.load(None, tmp_path / "out")
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    assert loaded.config._experts_implementation in ("grouped_mm", "eager", None)
    assert "it is left at its default" in caplog.text
    with torch.no_grad():
        loaded(torch.arange(6)[None])


def test_implementations_of_parts_are_dropped_and_others_stay() -> None:
    given = {
        "attn_implementation": "eager",
        "text_config": {"_attn_implementation": FETCHED, "hidden_size": 8},
        "vision_config": {"layers": {"attn_implementation": [FETCHED]}},
        "attn_implementation_internal": None,
    }
    before = copy.deepcopy(given)
    assert hugging_face.without_code(given) == {
        "attn_implementation": "eager",
        "text_config": {"hidden_size": 8},
        "vision_config": {"layers": {}},
        "attn_implementation_internal": None,
    }
    assert given == before


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"a": value}
    return value


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "deep": ({"more": _nested(100)}, "nested more than 64 deep"),
    "very deep": ({"more": _nested(900)}, "nested more than 64 deep"),
    "layers without end": ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
    "far more layers": ({"num_hidden_layers": 9_999}, "asks for more than .* modules"),
    "layers of a part": ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is"),
    "a size without end": ({"hidden_size": 10**30}, "cannot be built from its config"),
    "a size of nothing": ({"num_attention_heads": 0}, "cannot be built from its config"),
    "another type": ({"hidden_size": {"a": 1}}, "cannot be built from its config"),
    "escapes": ({"hidden_act": "\x1b[2J\n"}, "cannot be built from its config"),
    "a class that is no name": ({"architectures": {"a": 1}}, "holds a None, which is not a model"),
    "a class with escapes": ({"architectures": ["\x1b[31mA\n"]}, r"holds a \\x1b\[31mA\\n, which"),
}


def _refused(action: Callable[[], object], message: str) -> None:
    """In bounded time, and on a line that a terminal shows as it is."""
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message) as error:
        action()
    assert time.process_time() - start < 20
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_that_nobody_should_believe(kind: str, tmp_path: Path) -> None:
    change, message = CONFIGS[kind]
    content = _llama(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text(json.dumps({**content, **change}))
    _refused(lambda: fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "out"), message)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_of_absurd_size(name: str, tmp_path: Path) -> None:
    _llama(tmp_path / "in")
    if name != "config.json":
        (tmp_path / "in" / "model.safetensors").unlink()
    with open(tmp_path / "in" / name, "wb") as file:
        file.truncate(LARGEST + 1)
    _refused(
        lambda: fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "out"),
        f"{LARGEST + 1} bytes, and at most",
    )


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS: dict[str, tuple[Any, str]] = {
    "escapes": ({"\x1b[31mw": ENTRY}, r"has the name '\\x1b\[31mw'"),
    "a line break": ({"a\nb": ENTRY}, r"has the name 'a\\nb'"),
    "a zero": ({"a\0b": ENTRY}, r"has the name 'a\\x00b'"),
    "another direction": ({"a\u202eb": ENTRY}, r"has the name 'a\\u202eb'"),
    "half a character": ({"\ud800": ENTRY}, r"has the name '\\ud800'"),
    "nothing": ({"": ENTRY}, "has the name ''"),
    "a long name": ({"w" * 10_000: ENTRY}, "has the name 'wwww"),
    "many sizes": ({"w": {**ENTRY, "shape": [2**62] * 100_000}}, "has the shape"),
    "no tensor of PyTorch": (
        {"w": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        "has the shape",
    ),
    "a long type": ({"w": {**ENTRY, "dtype": "\x1b" * 10_000}}, "has dtype"),
    "long offsets": ({"w": {**ENTRY, "data_offsets": ["\x1b"] * 10_000}}, "has data_offsets"),
    "deep": ({"w": {**ENTRY, "more": _nested(500)}}, "nested more than 64 deep"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_nobody_should_believe(kind: str, tmp_path: Path) -> None:
    entries, message = HEADERS[kind]
    _llama(tmp_path / "in")
    text = json.dumps(entries).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(4)
    (tmp_path / "in" / "model.safetensors").write_bytes(data)
    _refused(lambda: fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "out"), message)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"w": 1}, "no weight_map of files beside it"),
        ({"w": "../model.safetensors"}, "names ../model.safetensors, which is no file beside it"),
        ({"w": ".."}, r"names \.\., which is no file beside it"),
        ({"w": "a/b.safetensors"}, "which is no file beside it"),
        ({"w": "a" * 256}, "a, which is no file beside it"),
        ({"w": "é" * 128}, "é, which is no file beside it"),
        ({"w": "a\0.safetensors"}, r"has the name 'a\\x00\.safetensors'"),
        ({"w": "\x1b]0;a\x07"}, r"has the name '\\x1b"),
        ({"w\n": "a.safetensors"}, r"has the name 'w\\n'"),
    ],
)
def test_indexes_that_nobody_should_believe(
    where: dict[str, str], message: str, tmp_path: Path
) -> None:
    _llama(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    index = json.dumps({"weight_map": where})
    (tmp_path / "in" / "model.safetensors.index.json").write_text(index)
    _refused(lambda: fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "out"), message)


def test_a_generation_config_that_nobody_should_believe(tmp_path: Path) -> None:
    _llama(tmp_path / "in")
    fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "out", min_elements=256)
    path = tmp_path / "out" / "generation_config.json"
    for content in ([1], _nested(500), {"max_length": "\x1b[2J", "num_beams": [[]]}):
        path.write_text(json.dumps(content))
        try:
            fqcompile.load(None, tmp_path / "out")
        except CheckpointError as error:
            assert str(path) in str(error)
            assert str(error).isprintable()


def test_names_that_could_not_be_read_again_are_not_saved(tmp_path: Path) -> None:
    model = small()
    model.register_buffer("a\x1bb", torch.zeros(2))
    _refused(lambda: fqcompile.save(model, tmp_path / "out"), r"has the name 'a\\x1bb'")
    assert not (tmp_path / "out").exists()


def test_tensors_may_have_names_of_other_languages(tmp_path: Path) -> None:
    save_file({"größe.重み": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert list(read_header(tmp_path / "model.safetensors").tensors) == ["größe.重み"]


def test_the_class_may_be_named_without_a_list(tmp_path: Path) -> None:
    content = _llama(tmp_path / "in")
    named = {**content, "architectures": "LlamaForCausalLM"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(named))
    fqcompile.quantize_checkpoint(tmp_path / "in", tmp_path / "out", min_elements=256)
    assert type(fqcompile.load(None, tmp_path / "out")).__name__ == "LlamaForCausalLM"
