"""from_pretrained and save_pretrained of transformers: quantize, write and open, bit for bit.

The oracle is `quantize_` of the dense model with the same options.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo extra is not installed")
import transformers as hf
from transformers.quantizers import auto
from transformers.quantizers.quantizers_utils import should_convert_module

import fqcompile
from fqcompile.errors import CheckpointError, FineQuantError, OptionError, UnquantizableWeight
from fqcompile.integrations.transformers import FineQuantHfConfig
from fqcompile.weights.parameter import PackedWeight
from tests.dense_models import CASES, run
from tests.dense_models import build as build_dense
from tests.helpers import finequant
from tests.moe_models import MODELS, build

OPTIONS: dict[str, Any] = {"granularity": 64, "min_elements": 1024}


def written(name: str, directory: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """A dense checkpoint in several shards; the model that is loaded of it, and inputs."""
    if name in MODELS:
        model: Any = build(name, dtype, "grouped_mm")
        inputs = {"input_ids": torch.randint(1, 100, (2, 5))}
    else:
        model, inputs = build_dense(name, dtype)
    model.save_pretrained(directory, max_shard_size="100KB")
    return type(model).from_pretrained(directory), inputs


def quantized(model: Any, **options: Any) -> tuple[Any, fqcompile.Plan]:
    result = copy.deepcopy(model)
    return result, fqcompile.quantize_(result, calibration=None, **OPTIONS, **options)


def packed_names(model: nn.Module) -> set[str]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {name for name, p in parameters if isinstance(p, PackedWeight)}


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Any, dict[str, Tensor]]:
    model, inputs = written("llama", tmp_path / "dense", torch.bfloat16)
    return tmp_path / "dense", model, inputs


@pytest.mark.few(6)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", [*CASES, *MODELS])
def test_quantized_while_loading_written_and_opened(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, inputs = written(name, tmp_path / "dense", dtype)
    expected_model, plan = quantized(model)
    expected = run(expected_model, inputs)
    given: dict[str, Any] = {"quantization_config": FineQuantHfConfig(**OPTIONS)}
    loaded = type(model).from_pretrained(tmp_path / "dense", **given)
    assert torch.equal(run(loaded, inputs), expected)
    assert packed_names(loaded) == packed_names(expected_model) != set()
    rows = [site.as_dict() for site in loaded.hf_quantizer.plan.sites]
    assert rows == [site.as_dict() for site in plan.sites]

    loaded.save_pretrained(tmp_path / "packed", max_shard_size="100KB")
    fqcompile.save(expected_model, tmp_path / "saved", plan=plan)
    for directory in (tmp_path / "packed", tmp_path / "saved"):
        opened, info = type(model).from_pretrained(directory, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(run(opened, inputs), expected)
        assert packed_names(opened) == packed_names(expected_model)
        assert torch.equal(run(fqcompile.load(None, directory), inputs), expected)


def test_files_are_packed_sharded_and_described_in_the_config(llama: Any, tmp_path: Path) -> None:
    directory, _, inputs = llama
    config = FineQuantHfConfig(bits=8, modules_to_not_convert=["lm_head"], min_elements=1024)
    model = hf.AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    written_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written_config["quantization_config"] == {
        "quant_method": "finequant",
        "bits": 8,
        "min_elements": 1024,
        "modules_to_not_convert": ["lm_head"],
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert "model.layers.0.mlp.up_proj.weight.codes" in index["weight_map"]
    assert "lm_head.weight" in index["weight_map"]
    sizes = [p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")]
    dense = [p.stat().st_size for p in directory.glob("*.safetensors")]
    assert sum(sizes) < 0.75 * sum(dense), "the head and the table are half of this model"
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(run(again, inputs), run(model, inputs))
    assert again.config.quantization_config.to_dict() == config.to_dict()


def test_a_dict_is_a_config(llama: Any) -> None:
    directory, model, inputs = llama
    given = {"quant_method": "finequant", "bits": 8, **OPTIONS}
    loaded = hf.AutoModelForCausalLM.from_pretrained(directory, quantization_config=given)
    assert torch.equal(run(loaded, inputs), run(quantized(model, bits=8)[0], inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits"),
        ({"bitz": 4}, "bits"),
        ({"autotune": "max"}, "autotune is one of compiling"),
        ({"foo": 1}, r"unknown option foo; allowed: bits, [a-z_, ]*, on_unsupported(;|$)"),
        ({"method": "gptq"}, "method is 'gptq', and from_pretrained rounds weights .*quantize_"),
        ({"calibration": "synthetic"}, r"before a model could run: leave it out; fqcompile\.quant"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'; allowed"),
        ({"modules_to_not_convert": [1]}, r"modules_to_not_convert is \[1\]"),
        ({"modules_to_not_convert": ["("]}, r"modules_to_not_convert\[0\] is '\('"),
        ({"modules_to_not_convert": ["*proj"]}, r"for any beginning write '\.\*proj'"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; allowed here: 'finequant'"),
    ],
    ids=str,
)
def test_options_are_checked_when_they_are_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FineQuantHfConfig(**options)
    if "quant_method" not in options:
        with pytest.raises(OptionError, match=message):
            FineQuantHfConfig.from_dict({"quant_method": "finequant", **options})


def test_configs_that_from_pretrained_cannot_take_are_told_what_it_can(
    llama: Any, tmp_path: Path
) -> None:
    directory, _, _ = llama
    with pytest.raises(
        OptionError, match=r"give fqcompile\.integrations\.transformers\.FineQuantHf"
    ):
        hf.AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=fqcompile.FineQuantConfig()
        )
    given: dict[str, Any] = {"quantization_config": FineQuantHfConfig(**OPTIONS)}
    hf.AutoModelForCausalLM.from_pretrained(directory, **given).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"]["later"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(OptionError, match=r"^quantization_config: unknown option later;.* install"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    "kept",
    ["lm_head", "model.layers.0", "mlp.up_proj", "proj", r"model\.layers\..*\.mlp", "layers"],
)
def test_modules_to_not_convert_are_those_of_transformers(kept: str, llama: Any) -> None:
    directory, model, _ = llama
    config = FineQuantHfConfig(modules_to_not_convert=[kept], **OPTIONS)
    loaded = hf.AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    names = {name.removesuffix(".weight") for name in packed_names(quantized(model)[0])}
    expected = {f"{name}.weight" for name in names if should_convert_module(name, [kept])}
    assert packed_names(loaded) == expected


def test_devices_and_types_are_those_asked_for(llama: Any, tmp_path: Path) -> None:
    directory, model, inputs = llama
    expected_model, plan = quantized(model)
    fqcompile.save(expected_model, tmp_path / "saved", plan=plan)
    config = FineQuantHfConfig(**OPTIONS)
    for place in ("cpu", "auto", {"": "cpu"}):
        for given in ({"quantization_config": config}, {}):
            source = directory if given else tmp_path / "saved"
            loaded = hf.AutoModelForCausalLM.from_pretrained(source, device_map=place, **given)
            assert torch.equal(run(loaded, inputs), run(expected_model, inputs))
    other = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    weight = other.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32 and isinstance(weight, PackedWeight)
    assert torch.equal(run(other, inputs), run(expected_model.to(torch.float32), inputs))
    both = model.to(torch.float32)
    direct = hf.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=config
    )
    assert torch.equal(run(direct, inputs), run(quantized(both)[0], inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_saved_model_opens_as_the_type_that_it_had(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whether its config named none, as of a model that is made, or another, before `to`."""
    for before in (None, torch.bfloat16, torch.float32):
        model, _ = build_dense("llama", torch.float32)
        assert isinstance(model.config, hf.PreTrainedConfig)
        model.config.dtype = before
        fqcompile.quantize_(model.to(dtype), calibration=None, **OPTIONS)
        fqcompile.save(model, tmp_path / "saved")
        opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert opened.dtype == dtype
        for name, parameter in model.named_parameters():
            assert torch.equal(opened.get_parameter(name).detach() + 0, parameter.detach() + 0)


def test_another_class_takes_what_it_has(llama: Any, tmp_path: Path) -> None:
    """The body without its head, by names without the prefix; a head of its own is new."""
    directory, model, inputs = llama
    expected_model, plan = quantized(model)
    fqcompile.save(expected_model, tmp_path / "saved", plan=plan)
    hidden = run(expected_model.model, inputs)
    config = FineQuantHfConfig(**OPTIONS)
    for given in ({"quantization_config": config}, {}):
        source = directory if given else tmp_path / "saved"
        body = hf.AutoModel.from_pretrained(source, **given)
        assert torch.equal(run(body, inputs), hidden)
        assert packed_names(body) == packed_names(expected_model.model)
        classes = hf.LlamaForTokenClassification.from_pretrained(source, num_labels=64, **given)
        assert packed_names(classes.model) == packed_names(body)
        assert not isinstance(classes.score.weight, PackedWeight)
    body.save_pretrained(tmp_path / "body")
    whole = hf.AutoModel.from_pretrained(tmp_path / "body")
    assert torch.equal(run(whole, inputs), hidden)
    fresh = hf.LlamaForTokenClassification.from_pretrained(
        directory, num_labels=64, quantization_config=config
    )
    site = fresh.hf_quantizer.plan.site("score.weight")
    assert (site.status, site.reason) == (
        "kept", "no tensor of the checkpoint is its value, which is new"
    )  # fmt: skip


def test_what_cannot_be_quantized_stays_or_raises(tmp_path: Path) -> None:
    model, _ = build_dense("llama", torch.bfloat16)
    broken: Any = model
    broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path)
    config = FineQuantHfConfig(**OPTIONS)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    expected = quantized(model)[1].site("model.layers.0.mlp.up_proj.weight")
    site = loaded.hf_quantizer.plan.site(expected.name)
    assert (site.status, site.reason) == ("kept", expected.reason) and "NaN" in str(site.reason)
    assert not isinstance(loaded.get_parameter(site.name), PackedWeight)
    config = FineQuantHfConfig(on_unsupported="error", **OPTIONS)
    with pytest.raises(UnquantizableWeight, match=rf"{site.name}: .*NaN"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_a_config_of_another_size_is_refused(llama: Any, tmp_path: Path) -> None:
    directory, model, _ = llama
    fqcompile.save(quantized(model)[0], tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["intermediate_size"] = 128
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"down_proj.weight is \[128, 256\] in .* and \[128"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    options = {"quantization_config": FineQuantHfConfig(**OPTIONS), "intermediate_size": 128}
    if Version(hf.__version__) >= Version("5.23"):  # 5.17 compares no sizes where one quantizes
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            hf.AutoModelForCausalLM.from_pretrained(directory, **options)
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        directory, **options, ignore_mismatched_sizes=True
    )
    site = loaded.hf_quantizer.plan.site("model.layers.0.mlp.up_proj.weight")
    assert "which is new" in str(site.reason)


def test_what_transformers_cannot_do_with_packed_weights_is_refused(
    llama: Any, tmp_path: Path
) -> None:
    directory, model, _ = llama
    fqcompile.save(quantized(model)[0], tmp_path / "saved")
    opened = hf.AutoModelForCausalLM.from_pretrained
    config = {"quantization_config": FineQuantHfConfig(**OPTIONS)}
    disk = {"model": "cpu", "lm_head": "disk"}
    for source, given in ((directory, config), (tmp_path / "saved", {})):
        with pytest.raises(FineQuantError, match="device_map puts parts on cpu, disk, and packed"):
            opened(source, device_map=disk, offload_folder=tmp_path / "off", **given)
        sharded = hf.AutoConfig.from_pretrained(source)
        sharded.distributed_config = {"tp_size": 2}
        with pytest.raises(FineQuantError, match="load the dense model by tp_plan, and call fqcom"):
            opened(source, config=sharded, **given)
    with pytest.raises(CheckpointError, match="give from_pretrained their directory, and no state"):
        loaded = hf.AutoConfig.from_pretrained(tmp_path / "saved")
        hf.LlamaForCausalLM.from_pretrained(None, config=loaded, state_dict=model.state_dict())
    (tmp_path / "saved" / "model.safetensors.index.json").unlink()
    model.save_pretrained(tmp_path / "other")
    dense = (tmp_path / "other" / "model.safetensors").read_bytes()
    (tmp_path / "saved" / "model.safetensors").write_bytes(dense)
    with pytest.raises(CheckpointError, match=r"no metadata says by a key finequant"):
        opened(tmp_path / "saved")


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
def test_a_directory_of_two_models_opens_as_neither(
    shards: dict[str, Any], llama: Any, tmp_path: Path
) -> None:
    """save_pretrained leaves the manifest of fqcompile.save, which tells of the older model."""
    dense, model, _ = llama
    older, plan = quantized(model)
    fqcompile.save(older, tmp_path / "saved", plan=plan)
    fqcompile.load(None, tmp_path / "saved")
    config = FineQuantHfConfig(min_elements=1024, bits=8)
    newer = hf.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    newer.save_pretrained(tmp_path / "saved", **shards)
    with pytest.raises(CheckpointError, match=r"holds two models.* remove fqcompile\.json"):
        fqcompile.load(None, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="holds two models"):
        fqcompile.export(tmp_path / "saved", tmp_path / "export")
    if not shards:
        with pytest.raises(CheckpointError, match=r"model\.safetensors is there, which from_pre"):
            fqcompile.save(older, tmp_path / "saved", plan=plan)
    for file in tmp_path.glob("saved/fqcompile*"):
        file.unlink()
    opened = fqcompile.load(None, tmp_path / "saved")
    assert {p.packed.format.bits for p in opened.parameters() if isinstance(p, PackedWeight)} == {8}


def test_packed_weights_of_a_dtype_that_files_have_not_are_not_written(
    llama: Any, tmp_path: Path
) -> None:
    _, model, _ = llama
    packed, plan = quantized(model)
    packed.double()
    with pytest.raises(CheckpointError, match=r"has dtype torch\.float64.* model\.float\(\) first"):
        fqcompile.save(packed, tmp_path / "saved", plan=plan)
    assert not list(tmp_path.glob("saved/*"))
    fqcompile.save(packed.float(), tmp_path / "saved", plan=plan)
    wide = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"has dtype torch\.float64"):
        wide.save_pretrained(tmp_path / "wide")


@pytest.mark.parametrize("bits", [4, 8])
def test_without_the_import_nothing_is_random(
    bits: int, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers then knows no such method, and reads the files as if they were dense."""
    model, _ = quantized(llama[1], bits=bits)
    fqcompile.save(model, tmp_path / "saved")
    config = {"quantization_config": FineQuantHfConfig(bits=bits, **OPTIONS)}
    hf.AutoModelForCausalLM.from_pretrained(llama[0], **config).save_pretrained(tmp_path / "packed")
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, "finequant")
    for directory in (tmp_path / "saved", tmp_path / "packed"):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            hf.AutoModelForCausalLM.from_pretrained(directory)


def test_opened_models_are_used_like_others(llama: Any, tmp_path: Path) -> None:
    directory, model, inputs = llama
    expected_model, plan = quantized(model)
    expected = run(expected_model, inputs)
    config = FineQuantHfConfig(**OPTIONS)
    loaded = hf.AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    assert loaded.is_quantized and loaded.quantization_method == "finequant"
    assert torch.equal(run(copy.deepcopy(loaded), inputs), expected)
    compiled = run(finequant(copy.deepcopy(loaded), min_elements=1024), inputs)
    assert torch.equal(compiled, run(finequant(expected_model, min_elements=1024), inputs))
    tokens = loaded.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 2
    fqcompile.save(loaded, tmp_path / "saved", plan=loaded.hf_quantizer.plan)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    last = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(run(last, inputs), expected)
    dense = last.dequantize()
    assert not packed_names(dense) and not dense.is_quantized
    oracle = fqcompile.fake_quantize_(copy.deepcopy(model), plan)
    for name, parameter in oracle.named_parameters():
        assert torch.equal(dense.get_parameter(name), parameter), name
    dense.save_pretrained(tmp_path / "dense again")
    assert "quantization_config" not in (tmp_path / "dense again" / "config.json").read_text()


MEASURED = """
import gc, sys, threading, time
from pathlib import Path
import torch, transformers as hf
from fqcompile.integrations.transformers import FineQuantHfConfig
torch.set_num_threads(1)

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) << 10

def load(directory, **given):
    model = hf.AutoModelForCausalLM.from_pretrained(directory, **given)
    assert any(type(p).__name__ == "PackedWeight" for p in model.parameters())
    return model

small, large, out = sys.argv[1:]
given = {"quantization_config": FineQuantHfConfig(granularity=128)}
load(small, **given)  # all is imported
peak, done = 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

def measured(directory, **given):
    global peak, done
    gc.collect()
    before, peak, done = anonymous(), 0, False
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(directory, **given)
    done = True
    watcher.join()
    return model, peak - before

model, quantizing = measured(large, **given)
model.save_pretrained(out)
del model
print(quantizing, measured(out)[1])
"""


@pytest.mark.slow
def test_loading_takes_the_packed_model_and_one_shard(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    common = {"num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 64}
    small = hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, "num_hidden_layers": 1}, **common))
    small.to(torch.bfloat16).save_pretrained(tmp_path / "small")
    large = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **common)).to(torch.bfloat16)
    large.save_pretrained(tmp_path / "large", max_shard_size="10MB")
    dense = sum(p.stat().st_size for p in (tmp_path / "large").glob("*.safetensors"))
    shard = max(p.stat().st_size for p in (tmp_path / "large").glob("*.safetensors"))
    out = tmp_path / "out"
    command = [sys.executable, "-c", MEASURED, tmp_path / "small", tmp_path / "large", out]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    quantizing, opening = map(int, answer.split()[-2:])
    packed = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert packed < 0.3 * dense and shard < 0.12 * dense
    working = 16 * sizes["hidden_size"] * sizes["intermediate_size"]  # four of a weight in fp32
    assert quantizing < packed + 2 * shard + working < 0.7 * dense, (
        quantizing / dense,
        packed / dense,
    )
    assert opening < 2 * packed + shard, (opening / dense, packed / dense)


def test_eight_bits_of_save_and_of_the_command_are_opened(llama: Any, tmp_path: Path) -> None:
    """Their configs name all options, also levels that nobody gave and 8 bits do not have."""
    directory, model, inputs = llama
    own = copy.deepcopy(model)
    plan = fqcompile.quantize_(own, bits=8, calibration=None, min_elements=1024)
    fqcompile.save(own, tmp_path / "saved", plan=plan)
    fqcompile.quantize_checkpoint(directory, tmp_path / "written", bits=8, min_elements=1024)
    for where in ("saved", "written"):
        opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / where)
        assert torch.equal(run(opened, inputs), run(own, inputs))


@pytest.mark.parametrize("save", ["save_pretrained", "save"])
def test_weights_that_a_user_made_one_are_opened_by_each_name(
    save: str, llama: Any, tmp_path: Path
) -> None:
    """The class ties none of them, so `from_pretrained` looks for each."""
    directory, _, inputs = llama
    config = FineQuantHfConfig(quantize_embeddings=8, **OPTIONS)
    model = hf.AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    model.lm_head.weight = model.model.embed_tokens.weight
    if save == "save":  # transformers refuses dense ones that share memory
        layers[1].input_layernorm.weight = layers[0].input_layernorm.weight
        fqcompile.save(model, tmp_path / "out")
    else:
        model.save_pretrained(tmp_path / "out")
    opened, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(run(opened, inputs), run(model, inputs))
    loaded: Any = fqcompile.load(None, tmp_path / "out")
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    if save == "save":
        assert (
            loaded.model.layers[0].mlp.up_proj.weight is loaded.model.layers[1].mlp.up_proj.weight
        )


def test_tables_beside_a_packed_head_stay_dense(tmp_path: Path) -> None:
    """The head of LED comes after one of its tables by name, and before the others."""
    config = hf.LEDConfig(
        d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, vocab_size=256,
        attention_window=8, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64,
    )  # fmt: skip
    hf.LEDForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    given: dict[str, Any] = {"quantization_config": FineQuantHfConfig(**OPTIONS)}
    model = hf.LEDForConditionalGeneration.from_pretrained(tmp_path / "dense", **given)
    model.save_pretrained(tmp_path / "out")
    loaded: Any = fqcompile.load(None, tmp_path / "out")
    assert packed_names(loaded) == packed_names(model)
    assert loaded.led.encoder.embed_tokens.weight is loaded.led.shared.weight
    inputs = {"input_ids": torch.arange(16)[None], "decoder_input_ids": torch.arange(4)[None]}
    assert torch.equal(run(loaded, inputs), run(model, inputs))


def test_the_plan_of_a_packed_table_is_that_of_quantize(tmp_path: Path) -> None:
    """The head is tied to it after it was read and packed."""
    config = hf.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    given: dict[str, Any] = {**OPTIONS, "quantize_embeddings": 8}
    loaded = hf.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=FineQuantHfConfig(**given)
    )
    twin = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    plan = fqcompile.quantize_(copy.deepcopy(twin), calibration=None, **given)
    assert [s.as_dict() for s in loaded.hf_quantizer.plan.sites] == [
        s.as_dict() for s in plan.sites
    ]
    fqcompile.fake_quantize_(twin, loaded.hf_quantizer.plan)
    inputs = {"input_ids": torch.arange(16)[None]}
    torch.testing.assert_close(run(loaded, inputs), run(twin, inputs), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_dense_again_is_not_saved_as_a_packed_one(
    llama: Any, tmp_path: Path
) -> None:
    directory, _, inputs = llama
    given: dict[str, Any] = {"quantization_config": FineQuantHfConfig(**OPTIONS)}
    model = fqcompile.restore(hf.AutoModelForCausalLM.from_pretrained(directory, **given))
    with pytest.raises(
        FineQuantError, match=r"is packed, .* call model\.dequantize\(\) to save it"
    ):
        model.save_pretrained(tmp_path / "out")
    model.dequantize().save_pretrained(tmp_path / "dense")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **given)
    assert packed_names(again)
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(run(opened, inputs), run(model, inputs))
