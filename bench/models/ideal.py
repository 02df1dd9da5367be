"""The least time of a step or a prefill: what it must read and compute, over the device's rates.

    read      each weight once as the way holds it, tables that are looked up in left out, and of
              experts what random routing is expected to hit; the keys and values of the context
    compute   2 for each token and weight of a linear layer, 4 for each token, token that it attends
              to and value of a head; at the rate of a dense product in 16 bits

The longer of the two. On a GPU the rates are those that copies and cuBLAS reach (`kernels.spec`);
on a CPU they are measured: reading a large tensor, and F.linear in the model's type.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bench.models.phases import Decoding, Prefill, head_size
from fqcompile.kernels.roofline import read_bandwidth
from fqcompile.kernels.spec import gpu_of
from fqcompile.report import CompileReport

_ROWS, _SIDE, _PRODUCTS = 1024, 2048, 5
_STACKED = 3  # dimensions of the parameters of experts


@dataclass(frozen=True)
class Rates:
    """Of a device: bytes/s that it reads, and flop/s of its dense products."""

    bandwidth: float
    flops: float


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """Those that the ideal is taken from; a CPU's are of as many threads as PyTorch uses now."""
    if device.type == "cuda":
        gpu = gpu_of(device)
        return Rates(gpu.bandwidth, gpu.matrix_flops)
    return Rates(read_bandwidth(), _product_flops(dtype, torch.get_num_threads()))


@cache
def _product_flops(dtype: torch.dtype, threads: int) -> float:
    x, weight = torch.ones(_ROWS, _SIDE, dtype=dtype), torch.ones(_SIDE, _SIDE, dtype=dtype)
    seconds = []
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        F.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * _ROWS * _SIDE * _SIDE / min(seconds)


def experts_hit(model: nn.Module, rows: int) -> float:
    """The share of the experts that `rows` tokens are expected to read; 1 without experts."""
    config: Any = model.config
    experts = getattr(config, "num_experts", None)
    return 1 - (1 - config.num_experts_per_tok / experts) ** rows if experts else 1.0


def weight_bytes_read(model: nn.Module, hit: float = 1.0) -> float:
    """Bytes of the parameters that a pass through the model reads, each once; of experts `hit`."""
    multiplied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - multiplied
    read = [p for p in model.parameters() if id(p) not in tables]
    return sum(_nbytes(p) * (hit if p.dim() == _STACKED else 1) for p in read)


def _nbytes(tensor: Tensor) -> int:
    """Of the tensors inside, where it is packed."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_nbytes(getattr(tensor, name)) for name in names)


def bytes_saved(found: Iterable[CompileReport], hit: float = 1.0) -> float:
    """By how much the quantized weights are smaller than they were; of experts `hit`."""
    sites = (site for report in found for site in report.plan.quantized)
    return sum(
        (site.bytes_before - site.bytes_after) * (hit if len(site.shape) == _STACKED else 1)
        for site in sites
    )


def flops_of(model: nn.Module, phase: Decoding | Prefill) -> int:
    """Of linear layers and attention; what else there is costs next to nothing."""
    config: Any = model.config
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    experts = sum(p.numel() for p in model.parameters() if p.dim() == _STACKED)
    inner = 2 * phase.rows * (linears - head.weight.numel() + experts * experts_hit(model, 1))
    last = 2 * phase.head_rows * head.weight.numel()
    width = config.num_attention_heads * head_size(config)
    attention = 4 * phase.attended * config.num_hidden_layers * width
    return int(inner + last + attention)


def ideal_ms(bytes_read: float, flops: float, rates: Rates) -> float:
    """The longer of reading and computing."""
    return 1e3 * max(bytes_read / rates.bandwidth, flops / rates.flops)
