"""What others quantized opens with packed weights of the same values, and runs."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("compressed_tensors", reason="the dev extra is not installed")

import transformers as hf

import fqcompile
from fqcompile.errors import CheckpointError
from fqcompile.integrations.transformers import FineQuantHfConfig
from fqcompile.interop.layers import Scheme
from fqcompile.weights.parameter import PackedWeight
from tests.helpers import assert_close, finequant, report
from tests.interop.checkpoints import config
from tests.interop.models import library_dense, make, tensors_of
from tests.interop.writers import (
    arguments,
    awq_parts,
    gptq_parts,
    words,
    write_by_library,
    write_checkpoint,
    write_dense,
    write_each_layer,
    write_four_bit,
)


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**inputs).logits
    return result


def assert_same_values(loaded: Any, oracle: Any, packed: int) -> None:
    """Every parameter is bit for bit the oracle's, `packed` of them without being dense."""
    expected = dict(oracle.named_parameters(remove_duplicate=False))
    found = dict(loaded.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    assert sum(isinstance(w, PackedWeight) for w in found.values()) == packed
    for name, weight in found.items():
        dense = weight.dequantized() if isinstance(weight, PackedWeight) else weight
        assert dense.dtype == expected[name].dtype, name
        assert torch.equal(dense, expected[name]), name


SCHEMES = [(4, 32, True), (4, 128, True), (8, None, True), (8, 64, True), (4, 64, False)]


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_models_that_the_library_saved(
    bits: int, group_size: int | None, symmetric: bool, tmp_path: Path
) -> None:
    model, inputs = make("llama", tmp_path / "plain")
    write_by_library(model, arguments(bits, group_size, symmetric), tmp_path / "packed")
    if symmetric:
        oracle = type(model).from_pretrained(tmp_path / "packed").eval()
    else:  # this transformers takes no zero points
        dense = library_dense(tmp_path / "packed")
        dense = {k: v for k, v in dense.items() if not k.endswith("weight_zero_point")}
        write_dense(tmp_path / "plain", tmp_path / "dense", dense)
        oracle = type(model).from_pretrained(tmp_path / "dense").eval()
    expected = logits(oracle, inputs)  # by its dense weights
    loaded: Any = fqcompile.load(None, tmp_path / "packed")
    bits_found = {p.format.bits for p in loaded.parameters() if isinstance(p, PackedWeight)}
    assert bits_found == {bits} if symmetric else {8}  # 4 bits less a zero point reach further
    assert_close(logits(loaded, inputs), expected, depth=14)
    assert torch.equal(logits(fqcompile.restore(loaded), inputs), expected)


MIXED = {
    "experts": arguments(4, 32),
    "self_attn.q_proj": arguments(8, None),
    "self_attn": arguments(4, 64),
    "mlp": arguments(4, None),
}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_experts_that_the_library_packed(name: str, tmp_path: Path) -> None:
    model, inputs = make(name, tmp_path / "plain")
    own = {"kv_b_proj": arguments(4, 32), "q_b_proj": arguments(4, 32)}
    dense = write_each_layer(tmp_path / "plain", tmp_path / "packed", {**own, **MIXED})
    oracle = type(model).from_pretrained(write_dense(tmp_path / "plain", tmp_path / "dense", dense))
    loaded = fqcompile.load(None, tmp_path / "packed")
    assert_same_values(loaded, oracle, packed=16 if name == "deepseek-v3" else 12)
    assert torch.equal(logits(fqcompile.restore(loaded), inputs), logits(oracle.eval(), inputs))


def test_experts_of_one_layer_in_different_schemes(tmp_path: Path) -> None:
    """One stack of the model holds them all, exactly."""
    model, _ = make("mixtral", tmp_path / "plain")
    schemes = {
        "experts.1.w1": arguments(8, 32),
        "experts.2": arguments(4, None),
        "experts": arguments(4, 32),
    }
    dense = write_each_layer(tmp_path / "plain", tmp_path / "packed", schemes)
    oracle = type(model).from_pretrained(write_dense(tmp_path / "plain", tmp_path / "dense", dense))
    loaded = fqcompile.load(None, tmp_path / "packed")
    assert_same_values(loaded, oracle, packed=4)


def zero_points(low: int, high: int) -> Any:
    return lambda rng, shape: rng.integers(low, high + 1, shape)


GPTQ: dict[str, Any] = {"quant_method": "gptq", "desc_act": False, "sym": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "version": "gemm", "zero_point": True}
FOUR_BIT = {
    "gptq symmetric": (gptq_parts, GPTQ, zero_points(8, 8), 4),
    "gptq": (gptq_parts, GPTQ, zero_points(1, 15), 8),
    "gptq v2": (partial(gptq_parts, less=0), {**GPTQ, "checkpoint_format": "gptq_v2"},
                zero_points(0, 15), 8),
    "awq symmetric": (awq_parts, AWQ, zero_points(8, 8), 4),
    "awq": (awq_parts, AWQ, zero_points(0, 15), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_gptq_and_awq(
    kind: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packer, quantization, zeros, bits = FOUR_BIT[kind]
    model, _ = make(name, tmp_path / "plain")
    dense = write_four_bit(tmp_path / "plain", tmp_path / "packed", packer, quantization, zeros)
    oracle = type(model).from_pretrained(write_dense(tmp_path / "plain", tmp_path / "dense", dense))
    loaded = fqcompile.load(None, tmp_path / "packed")
    assert_same_values(loaded, oracle, packed=14 if name == "llama" else 12)
    found = {p.format.bits for p in loaded.parameters() if isinstance(p, PackedWeight)}
    assert found == {bits}
    assert ("weights are held as int8 codes" in caplog.text) == (bits == 8)


class Largest(TorchDispatchMode):
    """The largest floating-point tensor that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            real = isinstance(tensor, torch.Tensor) and not tensor.is_meta
            if real and not isinstance(tensor, PackedWeight) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_dense_weight_is_ever_made(tmp_path: Path) -> None:
    make("mixtral", tmp_path / "plain")
    schemes = {"experts": arguments(4, 32), "self_attn": arguments(8, None)}
    write_each_layer(tmp_path / "plain", tmp_path / "packed", schemes)
    with Largest() as largest:
        loaded = fqcompile.load(None, tmp_path / "packed")
    stacks = [p for p in loaded.parameters() if isinstance(p, PackedWeight) and p.dim() == 3]
    assert len(stacks) == 4
    dense = max(p.numel() for p in loaded.parameters() if not isinstance(p, PackedWeight))
    assert largest.elements <= dense < min(p.numel() for p in stacks)


def test_an_imported_model_runs_compiled_and_is_saved(tmp_path: Path) -> None:
    _, inputs = make("mixtral", tmp_path / "plain", torch.float32)
    schemes = {"experts": arguments(4, 32), "self_attn": arguments(8, None)}
    write_each_layer(tmp_path / "plain", tmp_path / "packed", schemes)
    model = fqcompile.load(None, tmp_path / "packed")
    compiled = finequant(model, min_elements=1024, exclude=["lm_head"])
    assert_close(logits(compiled, inputs), logits(model, inputs), depth=14)
    assert len(report().plan.quantized) == 12
    fqcompile.save(model, tmp_path / "saved")
    again = fqcompile.load(None, tmp_path / "saved")
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        fqcompile.load(None, directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"desc_act": 0}, "quantization_config.desc_act is 0, and only True or False"),
        ({"bits": 3}, "quantization_config.bits is 3, and only 4"),
        ({"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format is 'marlin'"),
        ({"quant_method": "aqlm"}, "quantization_config.quant_method is 'aqlm'; this opens"),
    ],
)
def test_gptq_that_has_no_exact_conversion(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make("llama", tmp_path / "plain")
    quantization = {**GPTQ, **changes}
    write_four_bit(
        tmp_path / "plain", tmp_path / "packed", gptq_parts, quantization, zero_points(8, 8)
    )
    refused(tmp_path / "packed", message)


def test_act_order_is_seen_in_the_order_itself(tmp_path: Path) -> None:
    make("llama", tmp_path / "plain")

    def shuffled(codes: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
        parts = gptq_parts(codes, zeros)
        return {**parts, "g_idx": parts["g_idx"][::-1]}

    write_four_bit(tmp_path / "plain", tmp_path / "packed", shuffled, GPTQ, zero_points(8, 8))
    refused(tmp_path / "packed", "g_idx is not k // group_size")


def test_a_zero_point_that_programs_read_differently(tmp_path: Path) -> None:
    make("llama", tmp_path / "plain")
    write_four_bit(tmp_path / "plain", tmp_path / "packed", gptq_parts, GPTQ, zero_points(0, 15))
    refused(tmp_path / "packed", "qzeros stores 15")


def test_awq_in_the_order_of_another_kernel(tmp_path: Path) -> None:
    make("llama", tmp_path / "plain")
    quantization = {**AWQ, "version": "gemv"}
    write_four_bit(
        tmp_path / "plain", tmp_path / "packed", awq_parts, quantization, zero_points(8, 8)
    )
    refused(tmp_path / "packed", "quantization_config.version is 'gemv'")


def loads_as_written(directory: Path, quantization: dict[str, Any], parts: Any, **more: Any) -> Any:
    """A llama whose every weight, opened again, is the one that was written."""
    model, _ = make("llama", directory / "plain")
    zeros = more.pop("zeros", zero_points(8, 8))
    dense = write_four_bit(
        directory / "plain", directory / "packed", parts, quantization, zeros, **more
    )
    oracle = type(model).from_pretrained(write_dense(directory / "plain", directory / "d", dense))
    loaded = fqcompile.load(None, directory / "packed")
    assert_same_values(loaded, oracle, packed=14)
    return loaded


@pytest.mark.parametrize("stored_format", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("less", [0, 1])
def test_the_zero_point_of_symmetric_gptq_is_8_however_it_was_stored(
    stored_format: str | None, less: int, tmp_path: Path
) -> None:
    quantization = {**GPTQ, "sym": True, "checkpoint_format": stored_format}
    loaded = loads_as_written(tmp_path, quantization, partial(gptq_parts, less=less))
    packed = [p for p in loaded.parameters() if isinstance(p, PackedWeight)]
    assert {p.format.bits for p in packed} == {4}


@pytest.mark.parametrize(
    ("sym", "stored", "message"),
    [
        (True, (1, 15), r"qzeros stores \d+ to \d+, and quantization_config.sym in .* is True"),
        (True, (9, 9), "qzeros stores 9 to 9, and quantization_config.sym in .* is True"),
        (None, (9, 9), "qzeros stores 8 alone, which is 8 for symmetric codes and 9 for others"),
        ("yes", (8, 8), "quantization_config.sym is 'yes', and only True or False"),
    ],
)
def test_zero_points_that_contradict_sym(
    sym: Any, stored: tuple[int, int], message: str, tmp_path: Path
) -> None:
    make("llama", tmp_path / "plain")
    less = 0 if stored == (9, 9) and sym else 1
    parts, options = partial(gptq_parts, less=less), {**GPTQ, "sym": sym}
    write_four_bit(tmp_path / "plain", tmp_path / "packed", parts, options, zero_points(*stored))
    refused(tmp_path / "packed", message)


def test_zero_points_without_sym(tmp_path: Path) -> None:
    """Those that differ speak for themselves."""
    options = {key: value for key, value in GPTQ.items() if key != "sym"}
    loads_as_written(tmp_path, options, gptq_parts, zeros=zero_points(1, 15))


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("group_size", [48, 96, 1000])
def test_gptq_groups_that_do_not_divide_k(group_size: int, desc_act: bool, tmp_path: Path) -> None:
    """The last is short; columns in their own order are no act-order, whatever desc_act says."""
    options = {**GPTQ, "desc_act": desc_act}
    parts = partial(gptq_parts, group_size=group_size)
    loads_as_written(tmp_path, options, parts, zeros=zero_points(1, 15), group_size=group_size)


def test_one_group_has_no_order(tmp_path: Path) -> None:
    def unordered(codes: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
        parts = gptq_parts(codes, zeros)
        del parts["g_idx"]
        return parts

    options = {**GPTQ, "group_size": -1, "desc_act": True}
    loads_as_written(tmp_path, options, unordered, group_size=1000)
    (tmp_path / "more").mkdir()
    make("llama", tmp_path / "more" / "plain")
    source, out = tmp_path / "more" / "plain", tmp_path / "more" / "packed"
    write_four_bit(source, out, unordered, {**GPTQ, "desc_act": True}, zero_points(8, 8))
    refused(out, "desc_act is True, and .* has no g_idx")


@pytest.mark.parametrize("group_size", [64, 48, -1, None, 0, True, "32"])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_group_size_that_the_scales_contradict(
    kind: str, group_size: Any, tmp_path: Path
) -> None:
    make("llama", tmp_path / "plain")
    parts, options = {"gptq": (gptq_parts, GPTQ), "awq": (awq_parts, AWQ)}[kind]
    options = {**options, "group_size": group_size}
    write_four_bit(tmp_path / "plain", tmp_path / "packed", parts, options, zero_points(8, 8))
    known = type(group_size) is int and group_size
    message = r"scales has \d+ groups, and K = \d+" if known else "quantization_config.group_size"
    refused(tmp_path / "packed", message)


def test_gptq_whose_layers_differ(tmp_path: Path) -> None:
    """`dynamic` gives layers other options; the first pattern that matches decides."""

    def of_its_own(codes: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
        return gptq_parts(codes, zeros, less=0, group_size=48)

    dynamic = {"-:.*lm_head": {}, r"+:.*\.layers\..*": {"group_size": 48, "sym": True}, ".*": {}}
    options = {**GPTQ, "group_size": 128, "dynamic": dynamic}
    loads_as_written(tmp_path, options, of_its_own, group_size=48)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"(": {}}, "dynamic.* which is not a regular expression"),
        ({".*": 3}, r"dynamic\.\.\* is 3; it must be"),
        ([1], r"dynamic is \[1\]; it must be"),
        ({".*_proj": {"bits": 8}}, "quantization_config.bits is 8, and only 4"),
    ],
)
def test_gptq_options_of_layers_that_are_refused(
    dynamic: Any, message: str, tmp_path: Path
) -> None:
    make("llama", tmp_path / "plain")
    options = {**GPTQ, "dynamic": dynamic}
    write_four_bit(tmp_path / "plain", tmp_path / "packed", gptq_parts, options, zero_points(8, 8))
    refused(tmp_path / "packed", message)


@pytest.mark.parametrize("group_size", [48, 96])
def test_awq_groups_that_do_not_divide_k(group_size: int, tmp_path: Path) -> None:
    options = {"quant_method": "awq", "version": "gemm", "w_bit": 4, "q_group_size": group_size}
    loads_as_written(tmp_path, options, awq_parts, zeros=zero_points(0, 15), group_size=group_size)


def test_awq_without_zero_points_is_symmetric(tmp_path: Path) -> None:
    options = {**AWQ, "zero_point": False}
    loads_as_written(tmp_path, options, awq_parts)
    (tmp_path / "more").mkdir()
    make("llama", tmp_path / "more" / "plain")
    source, out = tmp_path / "more" / "plain", tmp_path / "more" / "packed"
    write_four_bit(source, out, awq_parts, options, zero_points(0, 15))
    refused(out, r"qzeros stores \d+ to \d+, and quantization_config.zero_point in .* is False")


def test_a_model_in_place_of_none_is_refused(tmp_path: Path) -> None:
    model, _ = make("llama", tmp_path / "plain")
    schemes = {"mlp": arguments(4, 32)}
    write_each_layer(tmp_path / "plain", tmp_path / "packed", schemes)
    with pytest.raises(CheckpointError, match=r"got a LlamaForCausalLM.*give None.*or a function"):
        fqcompile.load(model, tmp_path / "packed")


class CustomConfig(hf.PretrainedConfig):  # type: ignore[misc]
    model_type = "fqcompile_custom"


class CustomModel(hf.PreTrainedModel):  # type: ignore[misc]
    """A class that transformers does not have, as with trust_remote_code."""

    config_class = CustomConfig

    def __init__(self, config: CustomConfig) -> None:
        super().__init__(config)
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(self.up(x).relu())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_class_of_its_own_is_built_by_a_function(dtype: torch.dtype, tmp_path: Path) -> None:
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    CustomModel(CustomConfig()).to(dtype).save_pretrained(dense)
    quantization = FineQuantHfConfig(min_elements=4096)
    model = CustomModel.from_pretrained(dense, quantization_config=quantization)
    model.save_pretrained(packed)
    loaded = fqcompile.load(lambda: CustomModel(CustomConfig()), packed)
    assert_same_values(loaded, fqcompile.restore(copy.deepcopy(model)), packed=2)
    x = torch.randn(3, 128, dtype=dtype)
    assert torch.equal(loaded(x), model(x))
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(CheckpointError, match=r"holds a CustomModel, which.*load takes a function"):
        fqcompile.load(None, packed)
    with pytest.raises(CheckpointError, match="function made a Linear; give one"):
        fqcompile.load(lambda: nn.Linear(3, 4), packed)
    with pytest.raises(CheckpointError, match=r"from_pretrained.*trust_remote_code=True"):
        fqcompile.quantize_checkpoint(dense, tmp_path / "out")


def test_experts_of_which_some_are_dense_are_refused(tmp_path: Path) -> None:
    make("mixtral", tmp_path / "plain")
    schemes = {f"experts.{e}": arguments(4, 32) for e in range(1, 8)}
    write_each_layer(tmp_path / "plain", tmp_path / "packed", schemes)
    with pytest.raises(CheckpointError, match=r"is packed and .*experts\.0.* is not"):
        fqcompile.load(None, tmp_path / "packed")


def write_in_groups(directory: Path, group_size: int, other: int, **parts: Any) -> Any:
    """A llama whose attention is int4 in groups of that size, packed by plain loops.

    The config also has a group of `other` for layers that are not there. Returns the dense oracle.
    """
    model, _ = make("llama", directory / "plain")
    rng, tensors, dense = np.random.default_rng(0), {}, {}
    for name, tensor in tensors_of(directory / "plain").items():
        tensors[name] = dense[name] = tensor
        if "self_attn" in name:
            n, k = tensor.shape
            codes = rng.integers(0, 16, (n, k))
            scale = torch.from_numpy(rng.uniform(0.01, 0.02, (n, -(-k // group_size)))).bfloat16()
            columns = scale.float().repeat_interleave(group_size, 1)[:, :k]
            dense[name] = (torch.from_numpy(codes - 8).float() * columns).to(tensor.dtype)
            module = name.removesuffix(".weight")
            del tensors[name]
            tensors[f"{module}.weight_packed"] = torch.from_numpy(words(codes, range(8)))
            tensors[f"{module}.weight_scale"] = scale
            tensors[f"{module}.weight_shape"] = torch.tensor([n, k])
            tensors |= {f"{module}.{part}": value.clone() for part, value in parts.items()}
    groups = [(["re:.*self_attn.*"], Scheme(4, group_size)), (["re:.*no_such"], Scheme(4, other))]
    own = config(*groups)["quantization_config"]
    write_checkpoint(directory / "plain", directory / "packed", tensors, own)
    return type(model).from_pretrained(write_dense(directory / "plain", directory / "d", dense))


@pytest.mark.parametrize(("group_size", "other"), [(48, 32), (96, 80), (100, 64), (1000, 128)])
def test_packed_groups_that_do_not_divide_k(group_size: int, other: int, tmp_path: Path) -> None:
    """As the config has them, be there a group of another size that makes as many scales."""
    oracle = write_in_groups(tmp_path, group_size, other)
    assert_same_values(fqcompile.load(None, tmp_path / "packed"), oracle, packed=8)


def test_an_order_beside_packed_weights(tmp_path: Path) -> None:
    own = torch.arange(128, dtype=torch.int32) // 32
    for name, index, right in (
        ("own", own, True),
        ("unset", torch.full_like(own, -1), True),
        ("other", own.flip(0), False),
        ("short", own[1:], False),
    ):
        oracle = write_in_groups(tmp_path / name, 32, 64, weight_g_idx=index.contiguous())
        if right:
            assert_same_values(fqcompile.load(None, tmp_path / name / "packed"), oracle, packed=8)
        else:
            refused(tmp_path / name / "packed", "weight_g_idx is not k // group_size")


def test_scales_of_no_group_size(tmp_path: Path) -> None:
    """No groups of one size make 100 of K = 128."""
    scale = torch.ones(128, 100, dtype=torch.bfloat16)
    write_in_groups(tmp_path, 32, 64, weight_scale=scale)
    refused(tmp_path / "packed", "are not codes and scales of")


def test_a_config_of_packed_layers_that_are_not_there(tmp_path: Path) -> None:
    """A dense model would be taken for a quantized one."""
    make("llama", tmp_path / "plain")
    for name, options in (("gptq", GPTQ), ("awq", AWQ)):
        own = {"bits": 4, "group_size": 32, **options}
        tensors = tensors_of(tmp_path / "plain")
        write_checkpoint(tmp_path / "plain", tmp_path / name, tensors, own)
        refused(tmp_path / name, "no tensor beside it is a qweight: its weights are not packed")


V2 = {**GPTQ, "format": "gptq_v2"}


@pytest.mark.parametrize("both", [False, True])
def test_gptq_v2_may_be_told_by_format_alone(both: bool, tmp_path: Path) -> None:
    options = {**V2, "checkpoint_format": "gptq_v2"} if both else V2
    loads_as_written(tmp_path, options, partial(gptq_parts, less=0), zeros=zero_points(0, 15))


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (gptq_parts, {**V2, "checkpoint_format": "gptq"}, "checkpoint_format gptq and format gp"),
        (gptq_parts, {**GPTQ, "format": "marlin"}, "quantization_config.format is 'marlin'"),
        (awq_parts, {"quant_method": "awq", "format": "gemv"}, "config.format is 'gemv'"),
        (
            awq_parts,
            {"quant_method": "awq", "checkpoint_format": "gemv_fast"},
            "config.checkpoint_format is 'gemv_fast'",
        ),
    ],
)
def test_formats_that_are_refused(parts: Any, options: Any, message: str, tmp_path: Path) -> None:
    make("llama", tmp_path / "plain")
    write_four_bit(tmp_path / "plain", tmp_path / "packed", parts, options, zero_points(8, 8))
    refused(tmp_path / "packed", message)


@pytest.mark.parametrize("kind", ["gptq symmetric", "awq"])
def test_linears_that_hold_k_by_n(kind: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D: packed by rows as all others, square or not."""
    transformers = pytest.importorskip("transformers")
    packer, options, zeros, _ = FOUR_BIT[kind]
    torch.manual_seed(0)
    own = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 128, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**own)).eval()
    model.save_pretrained(tmp_path / "plain")
    rng, dense = np.random.default_rng(0), tensors_of(tmp_path / "plain")
    tensors = dict(dense)
    for name in [name for name in dense if name.endswith(("c_attn.weight", "c_proj.weight"))]:
        k, n = dense[name].shape
        codes, zero = rng.integers(0, 16, (k, n)), zeros(rng, (k // 32, n))
        scale = torch.from_numpy(rng.uniform(0.01, 0.02, zero.shape)).half()
        wide = torch.from_numpy(codes - np.repeat(zero, 32, 0)).float()
        dense[name] = wide * scale.float().repeat_interleave(32, 0)
        layer = name.removesuffix(".weight")
        del tensors[name]
        parts = packer(codes, zero)
        tensors |= {f"{layer}.{p}": torch.from_numpy(v.copy()) for p, v in parts.items()}
        tensors[f"{layer}.scales"] = scale
    config = {"bits": 4, "group_size": 32, **options}
    write_checkpoint(tmp_path / "plain", tmp_path / "packed", tensors, config)
    write_dense(tmp_path / "plain", tmp_path / "dense", dense)
    oracle = type(model).from_pretrained(tmp_path / "dense").eval()
    loaded: Any = fqcompile.load(None, tmp_path / "packed")
    assert_same_values(loaded, oracle, packed=3)
    inputs = {"input_ids": torch.arange(6)[None]}
    assert_close(logits(loaded, inputs), logits(oracle, inputs), depth=6)
