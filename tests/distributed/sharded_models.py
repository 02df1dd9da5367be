"""Small models of Hugging Face, whole and spread over the two ranks.

By the library's own plans (tensor parallel, or expert parallel for the experts), or, for those that
have none, by PyTorch's parallelize_module.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests import dense_models, moe_models
from tests.helpers import Mlp, frozen

RANKS = 2
MOE = ("mixtral", "qwen3-moe")
_EXPERTS: dict[str, int] = {"ep_size": RANKS}
if not hasattr(hf.distributed.DistributedConfig, "ep_size"):  # before transformers 5.23
    _EXPERTS = {"enable_expert_parallel": True}
# What a stack of gate and up is: half of each on a rank.
GATHERS_STRIDED = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="DTensor of PyTorch 2.11 makes no whole tensor of strided shards",
)
_ATTENTION = {"q_proj": "rows", "k_proj": "rows", "v_proj": "rows", "out_proj": "columns"}
_OPT = {f"self_attn.{name}": kind for name, kind in _ATTENTION.items()}
_OPT |= {"fc1": "rows", "fc2": "columns"}


def whole(name: str, dtype: torch.dtype, experts: str = "grouped_mm") -> nn.Module:
    """The same on every rank and in every process."""
    if name in MOE:
        return moe_models.build(name, dtype, experts)
    model, _ = dense_models.build(name, dtype)
    return model


def sharded(
    name: str, dtype: torch.dtype, folder: Path, way: str = "tp", experts: str = "grouped_mm"
) -> Any:
    """`whole` over both ranks; `way` is "tp", or "ep" where experts go whole to a rank."""
    model = whole(name, dtype, experts)
    if name == "opt":
        return _by_pytorch(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    config = hf.distributed.DistributedConfig(tp_size=RANKS, **(_EXPERTS if way == "ep" else {}))
    found = type(model).from_pretrained(folder, dtype=dtype, distributed_config=config)
    found.eval().requires_grad_(False)
    if name in MOE:
        found.set_experts_implementation(experts)
    return found


def _by_pytorch(model: Any) -> nn.Module:
    """OPT, of which each rank then has half of the heads."""
    styles = {"rows": ColwiseParallel, "columns": RowwiseParallel}
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.decoder.layers:
        parallelize_module(layer, mesh, {name: styles[kind]() for name, kind in _OPT.items()})
        layer.self_attn.num_heads //= RANKS
    return model.requires_grad_(False)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in parameters.items()}


def filled(model: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """The model with these parameters, each in a place of its own: tied ones may part."""
    for name, value in values.items():
        path, _, attribute = name.rpartition(".")
        own = nn.Parameter(value.detach().clone(), requires_grad=False)
        setattr(model.get_submodule(path), attribute, own)
    return model


class Net(nn.Module):
    """Two blocks; `router` is whole on every rank."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.first, self.second = Mlp(64, 128, seed=0), Mlp(64, hidden, seed=1)
        self.router = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.router(self.second(self.first(x)) + 1)
        return y


def net(hidden: int = 128) -> Any:
    """Both blocks over the two ranks."""
    model = frozen(Net(hidden))
    mesh = init_device_mesh("cpu", (2,))
    styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in (model.first, model.second):
        parallelize_module(block, mesh, styles, src_data_rank=None)
    return model
