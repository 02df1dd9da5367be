"""Launches to read machine code of: what `fqcompile.kernels.triton.launch` would launch, as values.

    case = gemm(spec(4, 128), TileConfig(16, 128, 128, 1, 4, 4))
    case.read().per_weight(case.weights)

`tests/kernels/triton/test_static.py` holds that both launch the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from bench.core.shapes import SHAPES
from bench.static.machine_code import Launch, MachineCode, read
from bench.static.plain import plain_kernel
from fqcompile.kernels.spec import A100, H200, GemmSpec, Gpu, TileConfig
from fqcompile.kernels.triton.configs import candidates
from fqcompile.kernels.triton.dependent_launch import LEAST_CAPABILITY
from fqcompile.kernels.triton.epilogue import finish_kernel
from fqcompile.kernels.triton.fragments import dequantize_kernel
from fqcompile.kernels.triton.gemm import gemm_kernel
from fqcompile.kernels.triton.launch import (
    DEQUANTIZE_ROWS,
    FINISH_BLOCK_N,
    forms_of,
    has_two_sums,
    is_whole,
)
from fqcompile.kernels.triton.layout import BLOCK_K, blocks_per_group, dot_width
from fqcompile.kernels.triton.target import kwidth
from fqcompile.tensor.format import NORMAL, QTYPES, UNIFORM

N = K = 4096
FORMATS = tuple(QTYPES)  # bits and levels
GROUP_SIZES = (K, 128, 64, 32, 16)  # the first: one scale a row
GPUS = {90: H200, 80: A100}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
CONVERSION = "subnormal_prmt"
ACTIVATION = "silu"
FINISHED_SHARES = 8

# For each BLOCK_M a tile that the registers hold. On sm_80 they hold no two sums of 64 rows.
TILES = {
    (90, False): ("16x128x128x1w4s4", "32x128x128x1w4s4", "64x128x128x1w8s3", "128x128x128x1w8s3"),
    (90, True): ("16x64x128x1w4s4", "32x64x128x1w4s4", "64x64x128x1w4s4", "128x64x128x1w8s3"),
    (80, False): ("16x128x128x1w4s4", "32x128x128x1w4s4", "64x128x128x1w8s4", "128x64x128x1w8s3"),
    (80, True): ("16x64x128x1w4s4", "32x64x128x1w4s4"),
}


@dataclass(frozen=True)
class Case:
    """A launch, and what it is of.

    kind: "gemm", "finish", "dequantize", "plain", or one of `bench.static.expert_launches`.
    weights: read in one iteration of the kernel's loop, or by a program where there is no loop; of
        "finish", the elements that a program writes.
    """

    kind: str
    launch: Launch
    spec: GemmSpec
    config: TileConfig | None
    weights: int

    @property
    def gpu(self) -> Gpu:
        assert self.spec.gpu is not None
        return self.spec.gpu

    @property
    def name(self) -> str:
        """Such as "gemm w4 normal g128 bf16 16x128x128x1w4s4 gated sm_90".

        Experts are told by E x N x K; levels that are uniform are not said.
        """
        spec = self.spec
        group = "column" if spec.group_size >= spec.k else f"g{spec.group_size}"
        parts = [self.kind]
        parts += [f"{spec.experts}x{spec.weight_rows}x{spec.k}"] if spec.experts else []
        parts += [f"w{spec.bits}"] + ([spec.levels] if spec.levels != UNIFORM else [])
        parts += [group, TYPES[spec.dtype]]
        parts += [str(self.config)] if self.config else []
        parts += ["gated"] if spec.gated else []
        return " ".join([*parts, self.gpu.arch])

    @property
    def bytes_per_weight(self) -> float:
        """Moved between the SMs and device memory; x, which caches hold, is left out."""
        spec, width = self.spec, self.spec.dtype.itemsize
        if self.kind.startswith("finish"):
            return (2 if spec.gated else 1) * FINISHED_SHARES * 4 + 2 * width
        codes = spec.bits / 8 + spec.scale_dtype.itemsize / min(spec.group_size, spec.k)
        return codes + (width if self.kind == "dequantize" else 0)

    def read(self) -> MachineCode:
        """Its machine code, compiled for the spec's GPU."""
        return read(self.launch, self.gpu.capability)


def spec(
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.bfloat16,
    gpu: Gpu = H200,
    gated: bool = False,
    act: str = ACTIVATION,
    levels: str = UNIFORM,
) -> GemmSpec:
    """A layer of 4096 x 4096 with everything that an epilogue can have."""
    return GemmSpec(
        m=16,
        n=N,
        k=K,
        bits=bits,
        group_size=group_size,
        dtype=dtype,
        scale_dtype=torch.float16,
        device_type="cuda",
        activation=act,
        gated=gated,
        has_bias=True,
        has_residual=True,
        gpu=gpu,
        levels=levels,
    )


def format_of(spec: GemmSpec) -> dict[str, Any]:
    """The constants of every kernel that reads a packed weight."""
    assert spec.gpu is not None
    return {
        "BLOCKS_PER_GROUP": blocks_per_group(spec.group_size, spec.k),
        "DOT_K": dot_width(spec.group_size, spec.k),
        "BITS": spec.bits,
        "LEVELS": spec.levels,
        "KWIDTH": kwidth(spec.gpu),
        "CONVERSION": CONVERSION,
    }


def starts_early(spec: GemmSpec) -> bool:
    """Whether its kernels are launched before the kernel before them ends."""
    return spec.gpu is not None and spec.gpu.capability >= LEAST_CAPABILITY


def epilogue_of(name: str) -> dict[str, Any]:
    """The constants of every kernel that ends with an activation."""
    return dict(zip(("ACTIVATION", "UP"), forms_of(name), strict=True))


def meeting(config: TileConfig) -> dict[str, str]:
    """The pointers to shares and arrivals; "" where there are none."""
    pointers = {"shares_ptr": "*fp32", "arrivals_ptr": "*i32"}
    return {name: pointer * config.last_finishes for name, pointer in pointers.items()}


def gemm(spec: GemmSpec, config: TileConfig, **changes: Any) -> Case:
    """`gemm_kernel` as launched, but for `changes` to its constants."""
    dtype = TYPES[spec.dtype]
    direct = is_whole(spec.n, spec.gated, config)
    gated = spec.gated and has_two_sums(spec.n, config)
    pointers = {"x_ptr": f"*{dtype}", "qweight_ptr": "*i32", "scale_ptr": "*fp16"}
    pointers["y_ptr"] = f"*{dtype}" if direct else "*fp32"
    ends = {"bias_ptr": spec.has_bias and direct, "residual_ptr": spec.has_residual and direct}
    given = {name: f"*{dtype}" * there for name, there in ends.items()} | meeting(config)
    pointers |= {name: pointer for name, pointer in given.items() if pointer}
    constants = format_of(spec) | {name: None for name, pointer in given.items() if not pointer}
    constants |= {
        **epilogue_of(spec.activation if direct else "none"),
        "GATED": gated,
        "EVEN_K": spec.k % BLOCK_K == 0,
        **{name: getattr(config, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K")},
        "PDL": starts_early(spec),
    }
    launch = Launch(
        gemm_kernel, pointers, constants | changes,
        divisible=("N", "K", "stride_xm", "stride_rm"),
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=starts_early(spec),
    )  # fmt: skip
    weights = (2 if gated else 1) * config.BLOCK_N * BLOCK_K
    return Case("gemm", launch, spec, config, weights)


def finish(spec: GemmSpec) -> Case:
    """`finish_kernel` as launched after a GEMM of 8 shares."""
    dtype = TYPES[spec.dtype]
    pointers = {"shares_ptr": "*fp32"}
    pointers |= dict.fromkeys(("bias_ptr", "residual_ptr", "y_ptr"), f"*{dtype}")
    constants = {
        **epilogue_of(spec.activation),
        "GATED": spec.gated,
        "SPLIT_K": FINISHED_SHARES,
        "BLOCK_N": FINISH_BLOCK_N,
        "PDL": starts_early(spec),
    }
    launch = Launch(
        finish_kernel, pointers, constants, divisible=("N", "stride_rm"), num_warps=2,
        launch_pdl=starts_early(spec),
    )  # fmt: skip
    return Case("finish", launch, spec, None, FINISH_BLOCK_N)


def dequantize(spec: GemmSpec, **changes: Any) -> Case:
    """`dequantize_kernel` as launched, but for `changes` to its constants."""
    pointers = {"qweight_ptr": "*i32", "scale_ptr": "*fp16", "w_ptr": f"*{TYPES[spec.dtype]}"}
    constants = format_of(spec) | {"BLOCK_N": DEQUANTIZE_ROWS, "BLOCK_K": BLOCK_K}
    constants["STACK"] = spec.experts > 0
    launch = Launch(
        dequantize_kernel, pointers, constants | changes, divisible=("rows", "K")
    )  # fmt: skip
    return Case("dequantize", launch, spec, None, DEQUANTIZE_ROWS * BLOCK_K)


def plain(spec: GemmSpec, config: TileConfig) -> Case:
    """The kernel of `bench.static.plain`, in the same tile."""
    dtype = TYPES[spec.dtype]
    pointers = {"x_ptr": f"*{dtype}", "qweight_ptr": "*u8", "scale_ptr": "*fp16"}
    pointers["y_ptr"] = f"*{dtype}"
    constants = {
        "GROUP_SIZE": spec.group_size,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
    }
    launch = Launch(
        plain_kernel, pointers, constants,
        divisible=("N", "K", "stride_xm", "stride_qn", "stride_sn"),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return Case("plain", launch, spec, config, config.BLOCK_N * config.BLOCK_K)


def matrix(arch: int) -> Iterator[Case]:
    """Every format in every tile; K is split where there are few rows, and finished in both ways
    but of gated layers, whose product a second kernel finishes as any other."""
    gpu = GPUS[arch]
    for (bits, levels), group_size, dtype in product(FORMATS, GROUP_SIZES, TYPES):
        for gated in (False, True):
            layer = spec(bits, group_size, dtype, gpu, gated, levels=levels)
            tiles = [TileConfig.parse(text) for text in TILES[arch, gated]]
            yield from (gemm(layer, tile) for tile in tiles)
            for last, tile in product((True,) if gated else (True, False), tiles[:2]):
                yield gemm(layer, replace(tile, SPLIT_K=FINISHED_SHARES, last_finishes=last))
    for dtype, gated in product(TYPES, (False, True)):
        yield finish(spec(4, 128, dtype, gpu, gated))
    for (bits, levels), group_size, dtype in product(FORMATS, GROUP_SIZES, TYPES):
        yield dequantize(spec(bits, group_size, dtype, gpu, levels=levels))


def chosen(arch: int) -> Iterator[Case]:
    """What the closed form picks for the layers of well-known models and up to 16 rows."""
    found: dict[tuple[object, ...], Case] = {}
    sides = {side for shapes in SHAPES.values() for side in shapes} | {(768, 3072), (1024, 1024)}
    choices = product(sorted(sides), FORMATS, GROUP_SIZES, (False, True), (1, 16))
    for (n, k), (bits, levels), group_size, gated, m in choices:
        form = partial(spec, bits, gpu=GPUS[arch], gated=gated, levels=levels)
        layer = replace(form(k if group_size == K else group_size), n=n, k=k)
        config = candidates(layer, m, "fast")[0]
        assert isinstance(config, TileConfig), "few rows are never dequantized first"
        # One kernel serves all layers; of the shares it matters whether there are any.
        config = replace(config, SPLIT_K=min(config.SPLIT_K, FINISHED_SHARES))
        case = gemm(form(group_size), config)
        found.setdefault((bits, levels, group_size, gated, config), case)
    yield from found.values()


def selection(arch: int) -> Iterator[Case]:
    """Of `matrix`, one case for each thing that may go wrong: what the tests read."""
    gpu, pair = GPUS[arch], TileConfig.parse(TILES[arch, True][0])
    shares = partial(replace, SPLIT_K=FINISHED_SHARES)
    small, _, medium, large = map(TileConfig.parse, TILES[arch, False])
    bf16, fp16 = torch.bfloat16, torch.float16
    formats = [(4, 128, bf16), (4, 128, fp16), (4, K, bf16), (4, 64, fp16), (4, 32, bf16)]
    formats += [(4, 16, bf16), (8, K, bf16), (8, 128, fp16), (8, 32, bf16)]
    yield from (gemm(spec(*given, gpu=gpu), small) for given in formats)
    yield gemm(spec(4, 128, gpu=gpu), shares(small))
    yield gemm(spec(4, 128, gpu=gpu), shares(small, last_finishes=True))
    yield gemm(spec(4, 128, gpu=gpu, gated=True), pair)
    yield gemm(spec(4, 128, gpu=gpu, gated=True), shares(pair, last_finishes=True))
    yield gemm(spec(4, 128, gpu=gpu), medium)
    yield gemm(spec(8, K, gpu=gpu), large)
    yield finish(spec(4, 128, gpu=gpu, gated=True))
    yield from map(dequantize, (spec(4, 128, gpu=gpu), spec(8, K, gpu=gpu)))
    normal = partial(spec, 4, gpu=gpu, levels=NORMAL)
    given = [(128, bf16), (128, fp16), (K, bf16), (64, fp16), (32, bf16), (16, bf16)]
    yield from (gemm(normal(*one), small) for one in given)
    yield gemm(normal(128), shares(small))
    yield from (gemm(normal(128, gated=tile is pair), tile) for tile in (pair, medium))
    yield dequantize(normal(128))


def plain_cases(arch: int) -> Iterator[Case]:
    """The usual formulation in the tiles of its counterparts."""
    for text in TILES[arch, False][::2]:
        yield plain(spec(4, 128, gpu=GPUS[arch]), TileConfig.parse(text))
