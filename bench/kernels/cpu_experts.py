"""The experts of a mixture layer on a CPU, gate over up and down, for the ways of bench kernels.

Qwen3-30B-A3B's sizes with half of its experts: E = 64, hidden 2048, intermediate 768, top 8.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fqcompile.kernels.cpu.stream import X86_STREAM
from fqcompile.kernels.expert_ops import gathered_linear_inference
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.tuning.measure import random_problem

EXPERTS, HIDDEN, INTERMEDIATE, TOP = 64, 2048, 768, 8
BF16 = torch.bfloat16


class ExpertLayer:
    """Both stacks, packed, and dense in bf16 and fp32."""

    def __init__(self, bits: int, group: int) -> None:
        self.form = (bits, group)
        self.gate_up, self.dense_gate_up = self._stack(2 * INTERMEDIATE, HIDDEN)
        self.down, self.dense_down = self._stack(HIDDEN, INTERMEDIATE)

    def _stack(self, n: int, k: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        bits, group = self.form
        spec = GemmSpec(1, n, k, bits, min(group, k), BF16, BF16, "cpu")
        weight, _ = random_problem(spec, 1, torch.device("cpu"))
        qweight, scale = X86_STREAM.layout.pack(weight)
        packed = (qweight.repeat(EXPERTS, 1, 1, 1), scale.repeat(EXPERTS, 1, 1, 1))
        return packed, weight.dequantize(BF16).repeat(EXPERTS, 1, 1)

    def packed_bytes(self, ids: Tensor) -> int:
        """Of the experts that are hit."""
        nbytes = sum(t.nbytes for t in (*self.gate_up, *self.down))
        return nbytes // EXPERTS * len(ids.unique())

    def ours(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [tokens * TOP, HIDDEN], ids [tokens * TOP]."""
        first = (*self.form, INTERMEDIATE, HIDDEN, "silu", True, X86_STREAM.name)
        h = gathered_linear_inference(x, *self.gate_up, ids, None, *first)
        second = (*self.form, HIDDEN, INTERMEDIATE, "none", False, X86_STREAM.name)
        return gathered_linear_inference(h, *self.down, ids, None, *second)

    def others(self) -> dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor]]]:
        """bmm of the gathered weights, and PyTorch's grouped matmul, which takes bf16 alone."""
        found: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor]]] = {}
        for dtype, name in ((BF16, "bf16"), (torch.float32, "fp32")):
            weights = self.dense_gate_up.to(dtype), self.dense_down.to(dtype)
            bmm = torch.compile(_bmm, dynamic=False)
            found[f"bmm {name}"] = dtype, lambda x, ids, w=weights, run=bmm: run(x, ids, *w)
        grouped = torch.compile(_grouped, dynamic=False)
        dense = self.dense_gate_up, self.dense_down
        found["grouped_mm bf16"] = BF16, lambda x, ids: grouped(x, ids, *dense)
        return found


def _gate(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def _bmm(x: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    h = _gate(torch.bmm(gate_up[ids], x.unsqueeze(-1)).squeeze(-1))
    return torch.bmm(down[ids], h.unsqueeze(-1)).squeeze(-1)


def _grouped(x: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    order = ids.argsort()
    offsets = torch.bincount(ids, minlength=EXPERTS).cumsum(0).to(torch.int32)
    h = _gate(torch._grouped_mm(x[order], gate_up.transpose(1, 2), offsets))
    y = torch._grouped_mm(h, down.transpose(1, 2), offsets)
    return torch.empty_like(y).index_copy_(0, order, y)
