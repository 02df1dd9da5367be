"""What transformers makes of each checkpoint of test_check, and what `check` says of it.

It has opened one correctly where nothing was missing, and each layer multiplies with the values
that its own tensors have, decompressed here by the scheme that they were written with.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("compressed_tensors", reason="the dev extra is not installed")
import transformers as hf
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

import fqcompile
from fqcompile.interop.layers import Layer, stack_of
from tests.interop.checkpoints import write
from tests.interop.models import tensors_of
from tests.interop.test_engine_verdicts import CHECKPOINTS, GUIDE, LOADS, WRONG, rows

RANDOM = "gives parameters random values"
SIZES = "You set `ignore_mismatched_sizes` to `False`"
CONVERSION = "We encountered some issues during automatic conversion"
# What transformers 5.23 did, or a part of its message.
SAID = {
    "fused shards of different group sizes": LOADS,
    "fused shards of different bits": SIZES,
    "fused shards with and without zero points": SIZES,
    "a fused shard left dense": LOADS,
    "a fused shard ignored though packed": RANDOM,
    "a class name as target beside others": LOADS,
    "a regular expression without an end": SIZES,
    "a fused layer whose first part has another target": SIZES,
    "packed and no target": RANDOM,
    "dense and not ignored": RANDOM,
    "dense and in no list": LOADS,
    "attention-only quantization of an MoE": CONVERSION,
    "mixed bits among the experts of a layer": CONVERSION,
    "projections of an MoE layer with different groups": CONVERSION,
    "mixed bits among the experts of different layers": CONVERSION,
    "mixed groups among the experts of different layers": CONVERSION,
    "experts whose group is not found by its targets": CONVERSION,
    "experts of which no projection matches": LOADS,
    "experts by names that SGLang does not look up": LOADS,
    "experts by names that vLLM does not look up": LOADS,
    "experts of Mixtral by the names of others": RANDOM,
    "class names in ignore": RANDOM,
    "a packed layer that ignore names": RANDOM,
    "packed experts that ignore names": LOADS,
    "a fused layer ignored by its own name alone": RANDOM,
    "a fused layer of which one part matches a target": RANDOM,
    "experts under a target of linears": CONVERSION,
    "asymmetric experts": CONVERSION,
    "asymmetric int4 without experts": SIZES,
    "asymmetric int8": SIZES,
    "a tied quantized head": "Linear has no attribute `weight`",
    "an untied quantized head that only a class names": LOADS,
    "a quantized embedding": "'Embedding' object has no attribute 'weight'",
    "a quantized router": RANDOM,
    "a group size without a kernel": LOADS,
    "K that is not a multiple of the group": "must be divisble by the given group_size",
    "K that fills no words": LOADS,
    "bits without a kernel": LOADS,
    "another format": LOADS,
    "mixed formats": LOADS,
    "nothing packed": LOADS,
    "experts per channel of a width without a kernel": LOADS,
    "one class-name group": LOADS,
    "one class-name group of experts": LOADS,
    "int8 per channel": LOADS,
    "layers that differ": LOADS,
    "experts of their own scheme": LOADS,
    "whole names": LOADS,
    "an untied quantized head that is named": LOADS,
    "a tied quantized head that is named": "Linear has no attribute `weight`",
    "a quantized embedding of Qwen3": "'Embedding' object has no attribute 'weight'",
    "an even group size": LOADS,
    "an odd group size": LOADS,
    "widths that are no multiples of 32": LOADS,
    "experts without AMX": LOADS,
}
_FORMAT = "the tensors are packed all the same, which no program writes"
OTHERWISE = {
    "another format": _FORMAT,
    "mixed formats": _FORMAT,
    "nothing packed": "who quantized a model did not want it dense",
}


def stored(layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
    """Values [N, K] of a layer's own tensors."""
    scheme = layer.scheme
    if scheme is None:
        return tensors[f"{layer.name}.weight"].float()
    words, scale = (tensors[f"{layer.name}.weight_{part}"] for part in ("packed", "scale"))
    codes = unpack_from_int32(words, scheme.bits, torch.Size([layer.n, layer.k])).float()
    size = scheme.group_size or layer.k
    return codes * scale.float().repeat_interleave(size, 1)[:, : layer.k]


def used(model: Any, layer: Layer) -> Tensor:
    """Values [N, K] that the model multiplies with."""
    name = layer.name.replace("block_sparse_moe", "mlp")
    stack = stack_of(name)
    if stack is None:
        module = model.get_submodule(name)
        if not isinstance(module, torch.nn.Linear):
            return module.weight.float()
        return module(torch.eye(layer.k, dtype=torch.bfloat16)).T.float()
    experts = model.get_submodule(stack)
    number, _, own = name.removeprefix(f"{stack}.").partition(".")
    joined, down = experts.gate_up_proj[int(number)], experts.down_proj[int(number)]
    gate, up = joined.chunk(2)
    parts = {"gate_proj": gate, "up_proj": up, "down_proj": down, "w1": gate, "w3": up, "w2": down}
    return parts[own].float()


@torch.no_grad()
def outcome(directory: Path, layers: list[Layer]) -> str:
    try:
        model, info = hf.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        if info["missing_keys"]:
            return RANDOM
        model(input_ids=torch.arange(4)[None])  # decompresses
        tensors = tensors_of(directory)
        # Both are rounded to bf16 once.
        same = [
            torch.allclose(used(model, layer), stored(layer, tensors), rtol=2**-8, atol=0)
            for layer in layers
        ]
    except (AttributeError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return LOADS if all(same) else WRONG


def test_each_checkpoint_is_in_the_table() -> None:
    assert SAID.keys() == CHECKPOINTS.keys() > OTHERWISE.keys()


def test_the_guide_has_the_table() -> None:
    assert rows("transformers", SAID, OTHERWISE) in GUIDE.read_text(encoding="utf-8")


@pytest.mark.few(6)
@pytest.mark.parametrize("name", SAID)
def test_transformers_does_what_check_says(name: str, tmp_path: Path) -> None:
    layers = CHECKPOINTS[name].layers
    directory = write(tmp_path, CHECKPOINTS[name].config, layers)
    said = outcome(directory, layers)
    assert SAID[name] in said
    effects = {f.effect for f in fqcompile.check(directory, "transformers") if not f.loads}
    if name in OTHERWISE:
        assert said == LOADS and effects
    else:
        assert effects == {LOADS: set(), WRONG: {"wrong"}, RANDOM: {"wrong"}}.get(said, {"refused"})
