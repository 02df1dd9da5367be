"""What others offer for the same layer. Each quantizes, packs and runs by its own public interface.

cuBLAS          F.linear on the dequantized weight
torch.compile   the same, compiled by Inductor
tinygemm        the int4 kernel that PyTorch ships and torchao calls: our codes and scales
torchao         quantizes ŵ itself, compiled by Inductor
gemlite         our codes and scales; it tunes itself in its first call
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.results import missing, with_version
from bench.kernels.contenders import Contender, Problem, Run
from fqcompile.kernels.roofline import weight_bytes
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.tuning.measure import rotation
from fqcompile.tensor.codes import unpack
from fqcompile.tensor.format import QTYPES, UNIFORM

_INNER_K_TILES = 8
_TINYGEMM_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Baseline:
    """One of them. `refuse` says why it cannot run a layer, `prepare` sets it up for one."""

    name: str
    package: str
    refuse: Callable[[GemmSpec], str | None]
    prepare: Callable[["Baseline", Problem], Contender]

    def contender(self, run: Run, weights: Sequence[Any], quantizes: bool = False) -> Contender:
        return Contender(self.name, with_version(self.package), run, weights, quantizes)

    def absent(self, spec: GemmSpec) -> str | None:
        """Why there is nothing to measure; None if there is."""
        return missing(self.package) or self.refuse(spec)


def _anything(spec: GemmSpec) -> None:
    return None


def _only_gpu(spec: GemmSpec) -> str | None:
    return None if spec.device_type == "cuda" else f"runs on cuda, not {spec.device_type}"


def _tinygemm_refuses(spec: GemmSpec) -> str | None:
    if spec.bits != 4 or spec.dtype != torch.bfloat16:
        return "takes int4 and bf16"
    if spec.group_size not in _TINYGEMM_GROUPS:
        return f"takes groups of {', '.join(map(str, _TINYGEMM_GROUPS))}"
    if spec.n % 8 or spec.k % (16 * _INNER_K_TILES):
        return "takes N of a multiple of 8 and K of 128"
    return _only_gpu(spec)


def _torchao_refuses(spec: GemmSpec) -> str | None:
    if spec.bits == 8:
        return None if spec.group_size >= spec.k else "is compared for int8 with one scale a column"
    return _tinygemm_refuses(spec)


def _codes(problem: Problem) -> Tensor:
    """int8 [N, K], signed."""
    return unpack(problem.weight.qweight, QTYPES[problem.spec.bits, UNIFORM], problem.spec.k)


def _copies(problem: Problem) -> int:
    return rotation(weight_bytes(problem.spec))[0]


def _clones(tensors: Sequence[Tensor], copies: int) -> list[tuple[Tensor, ...]]:
    return [tuple(tensors), *(tuple(t.clone() for t in tensors) for _ in range(copies - 1))]


def _cublas(baseline: Baseline, problem: Problem) -> Contender:
    return baseline.contender(F.linear, problem.dense_copies)


def _compiled(mode: str | None) -> Callable[[Baseline, Problem], Contender]:
    def prepare(baseline: Baseline, problem: Problem) -> Contender:
        # A lambda of its own: what another contender compiled of F.linear does not count here.
        run = torch.compile(lambda x, w: F.linear(x, w), dynamic=False, mode=mode)
        return baseline.contender(run, problem.dense_copies)

    return prepare


def _tinygemm(baseline: Baseline, problem: Problem) -> Contender:
    spec = problem.spec
    # The even column in the high half of the byte, codes + 8; w = (code - 8) * scale + zero.
    codes = (_codes(problem) + 8).to(torch.uint8)
    halves = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(halves.contiguous(), _INNER_K_TILES)
    scale = problem.weight.scale.t().to(spec.dtype)
    scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()

    def run(x: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, weight[0], spec.group_size, weight[1])
        return y

    weights = _clones((packed, scale_and_zero), _copies(problem))
    return baseline.contender(run, weights)


def _torchao(baseline: Baseline, problem: Problem) -> Contender:
    ao, spec = import_module("torchao.quantization"), problem.spec
    # tile_packed_to_4d is tinygemm's layout; torchao's other int4 layouts call kernels of mslk.
    config = (
        ao.Int4WeightOnlyConfig(group_size=spec.group_size, int4_packing_format="tile_packed_to_4d")
        if spec.bits == 4
        else ao.Int8WeightOnlyConfig()
    )

    def quantized() -> Tensor:
        linear = nn.Linear(spec.k, spec.n, bias=False, device="meta")
        linear.weight = nn.Parameter(problem.w_hat.clone(), requires_grad=False)
        ao.quantize_(linear, config)
        return linear.weight

    run = torch.compile(lambda x, w: F.linear(x, w), dynamic=False)
    weights = [quantized() for _ in range(_copies(problem))]
    return baseline.contender(run, weights, quantizes=True)


def _gemlite(baseline: Baseline, problem: Problem) -> Contender:
    helper, spec = import_module("gemlite.helper"), problem.spec
    bias = 1 << (spec.bits - 1)
    codes = (_codes(problem).to(torch.int16) + bias).to(torch.uint8)
    scale = problem.weight.scale.to(spec.dtype)
    processor = helper.A16Wn(device=str(problem.device), dtype=spec.dtype)
    group = min(spec.group_size, spec.k)

    def packed() -> Any:
        zeros = torch.full_like(scale, bias)
        return processor.from_weights(codes.clone(), scale.clone(), zeros, spec.bits, group)

    weights = [packed() for _ in range(_copies(problem))]
    return baseline.contender(lambda x, layer: layer(x), weights)


CUBLAS, COMPILED, MAX_AUTOTUNE = "cuBLAS", "torch.compile", "torch.compile max-autotune"
_ALL = (
    Baseline(CUBLAS, "torch", _anything, _cublas),
    Baseline(COMPILED, "torch", _anything, _compiled(None)),
    Baseline(MAX_AUTOTUNE, "torch", _anything, _compiled("max-autotune-no-cudagraphs")),
    Baseline("tinygemm", "torch", _tinygemm_refuses, _tinygemm),
    Baseline("torchao", "torchao", _torchao_refuses, _torchao),
    Baseline("gemlite", "gemlite", _only_gpu, _gemlite),
)
BASELINES = {baseline.name: baseline for baseline in _ALL}
