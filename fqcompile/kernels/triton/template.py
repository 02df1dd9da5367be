"""The Triton dequantise-GEMM as a template: when it applies, its configuration, its launch."""

import torch

from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.template import PLAIN, PackedLinear, Template
from fqcompile.kernels.tile_config import TileConfig
from fqcompile.kernels.triton.dequant_gemm import closed_form_config, dequant_gemm

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _refuse(spec: GemmSpec) -> str | None:
    if spec.device_type != "cuda":
        return f"runs on cuda, not {spec.device_type}"
    if spec.dtype not in _DTYPES:
        return f"takes fp16, bf16 or fp32 activations, not {spec.dtype}"
    return None


def _closed_form(spec: GemmSpec) -> TileConfig | None:
    """Fixed on the node for a fixed number of rows; else the launch picks it by bucket."""
    if spec.dynamic_m:
        return None
    return closed_form_config(spec.m, spec.n, spec.k, spec.bits, spec.group_size, spec.gated)


def _linear(
    x: torch.Tensor,
    weight: PackedLinear,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    gated: bool,
    config: TileConfig | None,
) -> torch.Tensor:
    n = weight.rows // 2 if gated else weight.rows
    if config is None:
        config = closed_form_config(x.shape[0], n, weight.k, weight.bits, weight.group_size, gated)
    return dequant_gemm(
        x,
        weight.qweight,
        weight.scale,
        bias,
        residual,
        bits=weight.bits,
        group_size=weight.group_size,
        n=n,
        k=weight.k,
        activation=activation,
        gated=gated,
        config=config,
    )


TRITON_DEQUANT_GEMM = Template("triton_dequant_gemm", PLAIN, _refuse, _closed_form, _linear)
