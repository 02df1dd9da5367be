"""The experts of one layer on a device, and the ways to run them: what `bench.experts.run` times.

    hidden [T, H], ids and weights [T, top_k]  ->  Σ_k weights * down(silu(gate) * up)  [T, H]

All ways get the same ids and weights, and do the same in eager PyTorch around their two matmuls:
gathering copies each token for each of its experts; grouping sorts those copies by expert.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.shapes import GROUPED_MM, MATRICES, ExpertShape, Matrix, RoutingName, expert_spec
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.registry import select_kernel
from fqcompile.kernels.spec import DENSE, Config, GemmSpec, Gpu
from fqcompile.kernels.template import Routing
from fqcompile.kernels.tuning.launches import Mode, tuned_launches
from fqcompile.kernels.tuning.measure import allowed_error, random_problem, rotation
from fqcompile.tensor.quantized import QuantizedTensor

GATHERED, GROUPED, DENSE_WAY = "fqcompile gathered", "fqcompile grouped", "fqcompile dense"
_MOST_CALLS = 64

Matmul = Callable[[Tensor, Tensor], Tensor]  # (rows, ids or offsets) -> rows
Run = Callable[[int, Tensor], Tensor]  # (copy of the weights, ids) -> [T, H]


@dataclass(frozen=True)
class Way:
    """`run(copy, ids)` is the layer; `detail` is its configurations."""

    name: str
    detail: str
    run: Run


class ExpertLayer:
    """Random quantized weights, hidden states for the most tokens, and the ways to run them."""

    def __init__(
        self, shape: ExpertShape, most_tokens: int, bits: int, group_size: int,
        dtype: torch.dtype, device: torch.device, gpu: Gpu,
    ) -> None:  # fmt: skip
        self.shape, self.dtype, self.device = shape, dtype, device
        self._form = (bits, group_size, dtype, gpu, device.type)
        specs = {matrix: self.spec(matrix, "grouped", 1) for matrix in MATRICES}
        self._quantized = {m: random_problem(specs[m], 1, device)[0] for m in MATRICES}
        self.copies = rotation(sum(stack.nbytes for stack in self._quantized.values()))[0]
        generator = torch.Generator(device).manual_seed(2)
        draw = partial(torch.randn, device=device, generator=generator)
        self._hidden = draw(most_tokens, shape.hidden).mul_(shape.hidden**-0.5).to(dtype)
        self._weights = draw(most_tokens, shape.top_k).softmax(-1).to(dtype)

    def spec(self, matrix: Matrix, routing: RoutingName, tokens: int) -> GemmSpec:
        return expert_spec(self.shape, matrix, routing, tokens, *self._form)

    def token_ids(self, tokens: int) -> list[Tensor]:
        """int64 [T, top_k], no expert twice for a token. Each routing hits the experts after those
        that the one before hit, so that calls in turn read all there are."""
        generator = torch.Generator(self.device).manual_seed(tokens)
        scores = torch.rand(tokens, self.shape.experts, device=self.device, generator=generator)
        ids = scores.topk(self.shape.top_k).indices
        hit = ids.unique()
        rank, width = torch.searchsorted(hit, ids), hit.numel()
        return [rank + start for start in range(0, self.shape.experts - width + 1, width)]

    def calls(self, way: Way, tokens: int) -> list[Callable[[], Tensor]]:
        """One for each copy of the weights and each routing."""
        routings = self.token_ids(tokens)
        pairs = [(copy, ids) for copy in range(self.copies) for ids in routings]
        return [partial(way.run, copy, ids) for copy, ids in pairs[:_MOST_CALLS]]

    def ways(self, tokens: int, tune: Mode) -> Iterator[Way]:
        """Ours in each regime that there is a kernel for, and PyTorch's grouped matmul."""
        gathered = {m: self._config(m, "gathered", tokens, tune) for m in MATRICES}
        yield self._ours(GATHERED, gathered, "gathered", tokens)
        grouped = {m: self._config(m, "grouped", tokens, tune) for m in MATRICES}
        yield self._ours(GROUPED, grouped, "grouped", tokens)
        if all(DENSE in self._candidates(m, tokens) for m in MATRICES):
            yield self._ours(DENSE_WAY, dict.fromkeys(MATRICES, DENSE), "grouped", tokens)
        yield self._grouped_mm(tokens)

    def _candidates(self, matrix: Matrix, tokens: int) -> Sequence[Config]:
        spec = self.spec(matrix, "grouped", tokens)
        return select_kernel(spec).template.candidates(spec, spec.m, "max")

    def _config(
        self, matrix: Matrix, routing: RoutingName, tokens: int, tune: Mode
    ) -> Config | None:
        """The tuned one or the closed form's; of grouped rows the best tile, whatever is dense."""
        spec = self.spec(matrix, routing, tokens)
        launches = tuned_launches(spec, select_kernel(spec).template, tune).launches
        config = None if launches is None else launches.at(spec.m)
        if config is not DENSE:
            return config
        return next(c for c in self._candidates(matrix, tokens) if c is not DENSE)

    @cached_property
    def _packed(self) -> list[dict[Matrix, QuantizedTensor]]:
        layout = select_kernel(self.spec("down", "grouped", 1)).template.layout
        first = {m: layout.pack(self._quantized[m]) for m in MATRICES}
        clones = [{m: w.clone() for m, w in first.items()} for _ in range(self.copies - 1)]
        return [first, *clones]

    @cached_property
    def _w_hat(self) -> list[dict[Matrix, Tensor]]:
        """[E, rows, K] in x's dtype, as many copies."""
        first = {m: self._quantized[m].dequantize(self.dtype) for m in MATRICES}
        clones = [{m: w.clone() for m, w in first.items()} for _ in range(self.copies - 1)]
        return [first, *clones]

    def _ours(
        self, name: str, configs: dict[Matrix, Config | None], routing: RoutingName, tokens: int
    ) -> Way:
        specs = {m: self.spec(m, routing, tokens) for m in MATRICES}
        templates = {m: select_kernel(specs[m]).template for m in MATRICES}

        def matmul(copy: int, matrix: Matrix, x: Tensor, rows_of: Tensor) -> Tensor:
            spec, weight, config = specs[matrix], self._packed[copy][matrix], configs[matrix]
            routed = Routing(rows_of) if routing == "grouped" else Routing(ids=rows_of)
            epilogue = Epilogue(activation=spec.activation, gated=spec.gated)
            return templates[matrix].run(x, weight, routed, epilogue, config)

        detail = ", ".join(f"{matrix} {config}" for matrix, config in configs.items())
        layer = by_grouping if routing == "grouped" else by_gathering
        return self._way(name, detail, tokens, layer, matmul)

    def _grouped_mm(self, tokens: int) -> Way:
        def matmul(copy: int, matrix: Matrix, x: Tensor, offsets: Tensor) -> Tensor:
            weight = self._w_hat[copy][matrix].transpose(1, 2)
            z = torch._grouped_mm(x, weight, offs=offsets)
            if matrix == "down":
                return z
            gate, up = z.chunk(2, -1)
            return F.silu(gate) * up

        return self._way(GROUPED_MM, torch.__version__, tokens, by_grouping, matmul)

    def _way(
        self, name: str, detail: str, tokens: int,
        layer: Callable[[Tensor, Tensor, Tensor, int, Matmul, Matmul], Tensor],
        matmul: Callable[[int, Matrix, Tensor, Tensor], Tensor],
    ) -> Way:  # fmt: skip
        hidden, weights = self._hidden[:tokens], self._weights[:tokens]

        def run(copy: int, ids: Tensor) -> Tensor:
            both = (partial(matmul, copy, "gate_up"), partial(matmul, copy, "down"))
            return layer(hidden, ids, weights, self.shape.experts, *both)

        return Way(name, detail, run)

    def expected(self, tokens: int) -> Tensor:
        """fp64 [T, H] for the first routing, one expert at a time; no template's code."""
        ids = self.token_ids(tokens)[0]
        hidden, weights = self._hidden[:tokens].double(), self._weights[:tokens].double()
        total = torch.zeros_like(hidden)
        for expert in ids.unique().tolist():
            token, place = (ids == expert).nonzero(as_tuple=True)
            w = {m: self._quantized[m].expert(expert).dequantize(torch.float64) for m in MATRICES}
            gate, up = (hidden[token] @ w["gate_up"].T).chunk(2, -1)
            y = (F.silu(gate) * up) @ w["down"].T
            total.index_add_(0, token, y * weights[token, place].unsqueeze(1))
        return total

    def wrong_result(self, y: Tensor, expected: Tensor) -> str | None:
        """How `y` is wrong, or None. Each token's relative error may be twice what the two matmuls,
        the product with the weights and the sum are off by in the mean square."""
        if y.shape != expected.shape or not bool(y.isfinite().all()):
            return "another shape, or not all elements are finite"
        off = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
        matmuls = sum(allowed_error(self.dtype, self.spec(m, "grouped", 1).k) for m in MATRICES)
        allowed = 2 * (matmuls + torch.finfo(self.dtype).eps)
        worst = float(off.max())
        return None if worst <= allowed else f"relative error {worst:.2g}, allowed {allowed:.2g}"


def by_gathering(
    hidden: Tensor, ids: Tensor, weights: Tensor, experts: int, gate_up: Matmul, down: Matmul
) -> Tensor:
    """A copy of each token for each of its experts, in their order."""
    rows = hidden.repeat_interleave(ids.shape[1], 0)
    y = down(gate_up(rows, ids.flatten()), ids.flatten())
    return _summed(y, weights)


def by_grouping(
    hidden: Tensor, ids: Tensor, weights: Tensor, experts: int, gate_up: Matmul, down: Matmul
) -> Tensor:
    """The same copies sorted by expert; offsets int32 [E]. Nothing waits for the device."""
    sorted_ids, order = ids.flatten().sort()
    of_all = torch.arange(experts, device=ids.device)
    offsets = torch.searchsorted(sorted_ids, of_all, right=True).to(torch.int32)
    y = down(gate_up(hidden[order // ids.shape[1]], offsets), offsets)
    return _summed(torch.empty_like(y).index_copy_(0, order, y), weights)


def _summed(y: Tensor, weights: Tensor) -> Tensor:
    return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)
