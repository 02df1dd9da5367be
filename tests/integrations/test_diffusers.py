"""from_pretrained and save_pretrained of diffusers: quantize, write and open, bit for bit.

The oracle is `quantize_` of the dense model with the same options.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")
import diffusers

import fqcompile
from fqcompile.errors import CheckpointError, FineQuantError, OptionError, UnquantizableWeight
from fqcompile.integrations.diffusers import FineQuantDiffusersConfig, let_save
from fqcompile.integrations.transformers import FineQuantHfConfig
from fqcompile.weights.parameter import PackedWeight
from tests.helpers import assert_close, finequant

OPTIONS: dict[str, Any] = {"granularity": 64, "min_elements": 1024}
SHARDS = {"max_shard_size": "60KB"}  # codes and scales of a weight come to lie in two of them


def flux() -> tuple[Any, dict[str, Tensor]]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    )
    return model, {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 6, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(6, 3),
    }


def unet() -> tuple[Any, dict[str, Tensor]]:
    """Linears between convolutions."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    return model, {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(1, 6, 64),
    }


def dit() -> tuple[Any, dict[str, Tensor]]:
    model = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }


MODELS = {"flux": flux, "unet": unet, "dit": dit}


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():  # DiT's last layers are zero at first
        nn.init.normal_(parameter, std=0.05)
    asked = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.eval().to(dtype), asked


@torch.no_grad()
def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(**inputs).sample
    assert result.isfinite().all() and result.std() > 0
    return result


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, PackedWeight)}


def quantized(model: Any, **options: Any) -> tuple[Any, fqcompile.Plan]:
    result = copy.deepcopy(model)
    return result, fqcompile.quantize_(result, calibration=None, **OPTIONS, **options)


def opened(model: Any, directory: Path, **given: Any) -> Any:
    """By the model's class, as the dtype of the model."""
    return type(model).from_pretrained(directory, torch_dtype=model.dtype, **given)


def assert_same(model: Any, expected: Any, inputs: dict[str, Tensor]) -> None:
    """Bit for bit, but for what dense convolutions make of memory that begins elsewhere."""
    found, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert packed_names(model) == packed_names(expected) != set()
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        one, other = parameter, wanted[name]
        if isinstance(one, PackedWeight):
            assert one.packed.format == other.packed.format, name
            assert all(map(torch.equal, one.packed.tensors, other.packed.tensors)), name
        else:
            assert torch.equal(one, other), name
    assert_close(run(model, inputs), run(expected, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_quantized_while_loading_written_and_opened(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, inputs = built(name, dtype)
    model.save_pretrained(tmp_path / "dense", **SHARDS)
    model = opened(model, tmp_path / "dense")  # which may leave a buffer in another dtype
    expected, plan = quantized(model)
    assert not torch.equal(run(expected, inputs), run(model, inputs))

    # Either config is taken.
    kind = FineQuantDiffusersConfig if dtype == torch.bfloat16 else FineQuantHfConfig
    loaded = opened(model, tmp_path / "dense", quantization_config=kind(**OPTIONS))
    assert_same(loaded, expected, inputs)
    rows = [site.as_dict() for site in loaded.hf_quantizer.plan.sites]
    assert rows == [site.as_dict() for site in plan.sites]

    loaded.save_pretrained(tmp_path / "packed", **SHARDS)
    again, info = opened(model, tmp_path / "packed", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(again, expected, inputs)


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def test_what_quantize_packed_is_saved_once_diffusers_is_told(tmp_path: Path) -> None:
    model, inputs = built("flux")
    model.save_pretrained(tmp_path / "dense")
    packed, _ = quantized(model)
    with pytest.raises(FineQuantError, match=r"fqcompile\.save"):
        packed.save_pretrained(tmp_path / "refused")
    let_save(packed)
    packed.save_pretrained(tmp_path / "packed")
    assert size_of(tmp_path / "packed") < 0.3 * size_of(tmp_path / "dense")
    assert torch.equal(run(opened(model, tmp_path / "packed"), inputs), run(packed, inputs))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "finequant"}


def test_a_pipeline_keeps_its_packed_transformer(tmp_path: Path) -> None:
    transformer, inputs = built("dit")
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path / "dense")
    fqcompile.quantize_(pipe.transformer, calibration=None, **OPTIONS)
    let_save(pipe.transformer)
    pipe.save_pretrained(tmp_path / "packed")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "packed")
    assert packed_names(again.transformer) and not packed_names(again.vae)
    expected = run(pipe.transformer, inputs)
    assert torch.equal(run(again.transformer, inputs), expected)

    config = diffusers.PipelineQuantizationConfig(
        quant_backend="finequant", quant_kwargs=OPTIONS, components_to_quantize=["transformer"]
    )
    made = diffusers.DiTPipeline.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert torch.equal(run(made.transformer, inputs), expected)
    assert not packed_names(made.vae)
    asked = {"class_labels": [1], "guidance_scale": 1.0, "num_inference_steps": 2}
    images = [
        p(**asked, generator=torch.manual_seed(0), output_type="pt").images for p in (pipe, again)
    ]
    assert torch.equal(*images)
    text = config._resolve_quant_config(is_diffusers=False, module_name="transformer")
    assert type(text) is FineQuantHfConfig


def test_compiled_it_computes_what_it_does_eagerly(tmp_path: Path) -> None:
    model, inputs = built("flux")
    packed, _ = quantized(model)
    let_save(packed)
    packed.save_pretrained(tmp_path)
    again = opened(model, tmp_path)
    expected = run(again, inputs)
    compiled = run(finequant(again), inputs)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


def test_options_and_kept_modules(tmp_path: Path) -> None:
    model, _ = built("flux")
    model.save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="did you mean 'bits'"):
        FineQuantDiffusersConfig(bit=4)
    given = {"quant_method": "finequant", "bits": 8, "modules_to_not_convert": ["proj_out"]}
    loaded = opened(model, tmp_path, quantization_config={**OPTIONS, **given})
    plan = loaded.hf_quantizer.plan
    assert {site.bits for site in plan.quantized} == {8}
    kept = {site.name for site in plan.kept}
    assert {"proj_out.weight", "single_transformer_blocks.0.proj_out.weight"} <= kept
    assert packed_names(loaded) == {site.name for site in plan.quantized}
    assert loaded.proj_out.weight.requires_grad


def test_a_weight_that_cannot_be_quantized_stays_or_raises(tmp_path: Path) -> None:
    model, _ = built("dit")
    name = "transformer_blocks.1.attn1.to_q.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    loaded = opened(model, tmp_path, quantization_config=FineQuantDiffusersConfig(**OPTIONS))
    assert "nan" in str(loaded.hf_quantizer.plan.site(name).reason)
    assert torch.equal(loaded.get_parameter(name).isnan(), model.get_parameter(name).isnan())
    config = FineQuantDiffusersConfig(**OPTIONS, on_unsupported="error")
    with pytest.raises(UnquantizableWeight, match=name):
        opened(model, tmp_path, quantization_config=config)


def test_modules_that_diffusers_keeps_in_float32_are_not_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = built("dit", torch.bfloat16)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules", ["proj_out_1"])
    loaded = opened(model, tmp_path, quantization_config=FineQuantDiffusersConfig(**OPTIONS))
    site = loaded.hf_quantizer.plan.site("proj_out_1.weight")
    assert site.status == "kept" and "float32" in str(site.reason)
    assert loaded.proj_out_1.weight.dtype == torch.float32


def test_dequantized_it_is_saved_as_a_dense_model(tmp_path: Path) -> None:
    model, inputs = built("dit")
    model.save_pretrained(tmp_path / "dense")
    config = FineQuantDiffusersConfig(**OPTIONS)
    loaded = opened(model, tmp_path / "dense", quantization_config=config)
    expected = run(loaded, inputs)
    loaded.dequantize().save_pretrained(tmp_path / "again")
    again = opened(model, tmp_path / "again")
    assert not packed_names(again)
    assert "quantization_config" not in again.config
    torch.testing.assert_close(run(again, inputs), expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_possible_is_refused(tmp_path: Path) -> None:
    model, _ = built("dit")
    with pytest.raises(FineQuantError, match=r"has no packed weight: call fqcompile\.quantize_"):
        let_save(model)
    with pytest.raises(FineQuantError, match="Linear, which is no model of diffusers"):
        let_save(nn.Linear(2, 2))
    packed, _ = quantized(model)
    let_save(packed)
    with pytest.raises(FineQuantError, match="safe_serialization"):
        packed.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(FineQuantError, match="cannot be offloaded"):
        opened(model, tmp_path / "packed", device_map={"": "disk"})
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no metadata says by a key finequant"):
        opened(model, tmp_path / "dense")
