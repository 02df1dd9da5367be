"""Launches of the kernels of experts, as `bench.static.launches` has those of one matrix.

    case = routed(layer("qwen3-30b-a3b", "gate_up", "grouped"), TileConfig(16, 64, 128, 1, 4, 4))

`tests/kernels/triton/test_expert_static.py` holds that `triton.launch` launches the same.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from bench.core.shapes import EXPERTS, MATRICES, Matrix, RoutingName, expert_spec
from bench.static.launches import (
    FINISHED_SHARES,
    GPUS,
    TYPES,
    Case,
    dequantize,
    epilogue_of,
    format_of,
    meeting,
    starts_early,
)
from bench.static.machine_code import Launch
from fqcompile.kernels.spec import H200, GemmSpec, Gpu, TileConfig
from fqcompile.kernels.triton.configs import candidates
from fqcompile.kernels.triton.expert_gemm import (
    expert_gemm_kernel,
    finish_experts_kernel,
)
from fqcompile.kernels.triton.launch import FINISH_BLOCK_N, filled_up, has_two_sums, is_whole
from fqcompile.kernels.triton.layout import BLOCK_K
from fqcompile.tensor.format import NORMAL, UNIFORM

DECODED, PREFILLED = (1, 2, 4, 8, 16), (256, 4096)  # tokens
IDS, OFFSETS = "*i64", "*i32"


def layer(
    model: str, matrix: Matrix, routing: RoutingName, tokens: int = 1, bits: int = 4,
    group_size: int = 128, dtype: torch.dtype = torch.bfloat16, gpu: Gpu = H200,
    levels: str = UNIFORM,
) -> GemmSpec:  # fmt: skip
    """One of the two matrices of a model's experts, for so many tokens; scales are fp16."""
    form = (bits, group_size, dtype, gpu)
    made = expert_spec(EXPERTS[model], matrix, routing, tokens, *form)
    return replace(made, scale_dtype=torch.float16, levels=levels)


def routed(spec: GemmSpec, config: TileConfig) -> Case:
    """`expert_gemm_kernel` as launched for the spec's routing."""
    dtype, grouped = TYPES[spec.dtype], spec.routing == "grouped"
    direct = is_whole(spec.n, spec.gated, config)
    gated = spec.gated and has_two_sums(spec.n, config)
    pointers = {"x_ptr": f"*{dtype}", "qweight_ptr": "*i32", "scale_ptr": "*fp16"}
    pointers |= {"routing_ptr": OFFSETS if grouped else IDS}
    pointers |= {"y_ptr": f"*{dtype}" if direct else "*fp32"}
    given = {"bias_ptr": f"*{dtype}" * (spec.has_bias and direct)} | meeting(config)
    pointers |= {name: pointer for name, pointer in given.items() if pointer}
    constants = format_of(spec) | epilogue_of(spec.activation if direct else "none")
    constants |= {name: None for name, pointer in given.items() if not pointer}
    constants |= {
        "GROUPED": grouped,
        "BLOCK_E": filled_up(spec.experts),
        "GATED": gated,
        "EVEN_K": spec.k % BLOCK_K == 0,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "SPLIT_K": config.SPLIT_K,
        "PDL": starts_early(spec),
    }
    launch = Launch(
        expert_gemm_kernel, pointers, constants, divisible=("N", "K", "stride_xm"),
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=starts_early(spec),
    )  # fmt: skip
    weights = (2 if gated else 1) * config.BLOCK_N * BLOCK_K
    return Case(str(spec.routing), launch, spec, config, weights)


def finish(spec: GemmSpec) -> Case:
    """`finish_experts_kernel` as launched after a GEMM of 8 shares."""
    dtype, grouped = TYPES[spec.dtype], spec.routing == "grouped"
    pointers = {"shares_ptr": "*fp32", "routing_ptr": OFFSETS if grouped else IDS}
    pointers |= {"y_ptr": f"*{dtype}"} | ({"bias_ptr": f"*{dtype}"} if spec.has_bias else {})
    constants = epilogue_of(spec.activation) | ({} if spec.has_bias else {"bias_ptr": None})
    constants |= {
        "GROUPED": grouped,
        "BLOCK_E": filled_up(spec.experts),
        "GATED": spec.gated,
        "SPLIT_K": FINISHED_SHARES,
        "BLOCK_N": FINISH_BLOCK_N,
        "PDL": starts_early(spec),
    }
    launch = Launch(
        finish_experts_kernel, pointers, constants, divisible=("N",), num_warps=2,
        launch_pdl=starts_early(spec),
    )  # fmt: skip
    return Case(f"finish {spec.routing}", launch, spec, None, FINISH_BLOCK_N)


def chosen(arch: int) -> Iterator[Case]:
    """What the closed form picks for the models, for 1 to 16 tokens, and grouped for many."""
    found: dict[tuple[object, ...], Case] = {}
    tokens: dict[RoutingName, tuple[int, ...]] = {
        "gathered": DECODED,
        "grouped": (*DECODED, *PREFILLED),
    }
    for model, routing, levels in product(EXPERTS, tokens, (UNIFORM, NORMAL)):
        for matrix, many in product(MATRICES, tokens[routing]):
            one = layer(model, matrix, routing, many, gpu=GPUS[arch], levels=levels)
            config = next(c for c in candidates(one, one.m, "max") if isinstance(c, TileConfig))
            config = replace(config, SPLIT_K=min(config.SPLIT_K, FINISHED_SHARES))
            found.setdefault((model, matrix, routing, levels, config), routed(one, config))
    yield from found.values()


def matrix(arch: int) -> Iterator[Case]:
    """What is chosen, and the kernels before and after."""
    yield from chosen(arch)
    for model in EXPERTS:
        one = layer(model, "gate_up", "grouped", gpu=GPUS[arch])
        yield finish(one)
        yield finish(replace(one, routing="gathered"))
        yield dequantize(one)


def selection(arch: int) -> Iterator[Case]:
    """One case for each thing that may go wrong: what the tests read."""
    gpu = GPUS[arch]
    qwen, mixtral = "qwen3-30b-a3b", "mixtral-8x7b"
    small, gated = TileConfig(16, 128, 128, 1, 4, 4), TileConfig(16, 64, 128, 1, 4, 4)
    large = TileConfig(64, 128, 128, 1, 8, 3 if arch == 90 else 4)
    for routing in ("gathered", "grouped"):
        yield routed(layer(qwen, "gate_up", routing, gpu=gpu), gated)
        yield routed(layer(qwen, "down", routing, gpu=gpu), small)
        yield routed(layer(qwen, "down", routing, gpu=gpu), replace(small, SPLIT_K=8))
        last = replace(small, SPLIT_K=8, last_finishes=True)
        yield routed(layer(qwen, "down", routing, gpu=gpu), last)
        yield routed(layer(mixtral, "down", routing, bits=8, group_size=1 << 20, gpu=gpu), small)
        yield finish(replace(layer(qwen, "gate_up", routing, gpu=gpu), has_bias=True))
    normal = partial(layer, qwen, gpu=gpu, levels=NORMAL)
    yield routed(normal("gate_up", "gathered"), gated)
    yield routed(normal("down", "grouped"), small)
    yield routed(normal("down", "grouped"), large)
    yield dequantize(normal("down", "grouped"))
    yield routed(layer(qwen, "down", "grouped", gpu=gpu, group_size=32), small)
    yield routed(layer(qwen, "down", "grouped", gpu=gpu), large)
    yield dequantize(layer(qwen, "down", "grouped", gpu=gpu))
