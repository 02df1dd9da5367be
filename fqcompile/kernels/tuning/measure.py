"""Measure one configuration on the GPU: first check its result, then time it.

In decoding, weights come from device memory and not from the L2 cache, so the timed calls cycle
through more packed weights than any cache holds. CUDA graphs of many calls exclude Python overhead.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median, quantiles

import torch

from fqcompile.errors import FineQuantError
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import Config, GemmSpec
from fqcompile.kernels.template import Layout, Routing, Template
from fqcompile.kernels.tuning.table import Timing
from fqcompile.tensor.chunks import plain_tensors
from fqcompile.tensor.codes import dequantize_rows, pack
from fqcompile.tensor.format import Format, num_groups
from fqcompile.tensor.quantized import QuantizedTensor

Run = Callable[[Config], torch.Tensor]
Measure = Callable[[Config], Timing]
ROTATED_BYTES = 256 << 20
_DEVICE = torch.device("cuda")
_MOST_COPIES = 257
_LEAST_CALLS = 16  # in one graph, so that the cost of launching the graph is negligible
_WARM_UPS, _REPLAYS = 5, 25
_REFERENCE_CHUNK = 1 << 26  # weights that the reference dequantizes at a time


class WrongResult(FineQuantError):
    """A configuration's result differs from the reference; the message says by how much."""


class DeviceLost(FineQuantError):
    """A configuration destroyed the process's CUDA context: nothing more can be measured."""


def measure_on_gpu(template: Template, spec: GemmSpec, m: int) -> Measure:
    """A function that times one configuration of `template` for M = `m` on the current GPU.

    The function raises WrongResult, DeviceLost, or whatever compiling and launching raise.

    Raises:
        FineQuantError: a CUDA graph is being captured, during which nothing can be timed.
    """
    if torch.cuda.is_current_stream_capturing():
        raise FineQuantError("a CUDA graph is being captured; call the model once before capturing")
    with plain_tensors():
        runs, expected = prepared(template, spec, m, _DEVICE)

    def measure(config: Config) -> Timing:
        try:
            with plain_tensors():
                wrong = difference(runs[0](config), expected, spec.k)
                if wrong is not None:
                    raise WrongResult(wrong)
                return _time(lambda: [run(config) for run in runs], rounds_of(len(runs)), len(runs))
        except Exception as error:
            check_device(error)
            raise

    return measure


def prepared(
    template: Template, spec: GemmSpec, m: int, device: torch.device
) -> tuple[list[Run], torch.Tensor]:
    """Functions that run the matmul with a configuration, and the fp64 result of the first one.

    There is one function for each copy of the weight (`rotation` says how many), and for experts
    one for each copy and routing.
    """
    weight, x = random_problem(spec, m, device)
    epilogue = Epilogue(activation=spec.activation, gated=spec.gated)

    def run(packed: QuantizedTensor, routing: Routing | None, config: Config) -> torch.Tensor:
        return template.run(x, packed, routing, epilogue, config)

    if not spec.experts:
        copies, _ = packed_copies(weight, template.layout)
        return [partial(run, packed, None) for packed in copies], reference(x, weight, spec)
    in_turn = routings(spec, m, device)
    most = -(-_MOST_COPIES // len(in_turn))
    copies, _ = packed_copies(weight, template.layout, most)
    runs: list[Run] = [partial(run, one, routing) for one in copies for routing in in_turn]
    return runs, expert_reference(x, weight, in_turn[0], spec)


def expert_reference(
    x: torch.Tensor, stack: QuantizedTensor, routing: Routing, spec: GemmSpec
) -> torch.Tensor:
    """`reference` of each expert on its own rows; every row belongs to an expert."""
    y = x.new_empty((x.shape[0], spec.n), dtype=torch.float64)
    for expert, rows in routing.rows_of_experts(spec.experts, x.shape[0]):
        y[rows] = reference(x[rows], stack.expert(expert), spec)
    return y


def routings(spec: GemmSpec, m: int, device: torch.device) -> list[Routing]:
    """Routings of m rows to random experts that, called in turn, read the whole stack.

    A call reads only the experts that have rows. Each routing shifts these to the next range of
    experts, so that the cache holds none of the weights that the next call reads.
    """
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(spec.experts, (m,), device=device, generator=generator)
    hit = ids.unique()
    rank, width = torch.searchsorted(hit, ids), hit.numel()
    starts = range(0, spec.experts - width + 1, width)
    return [_routing(rank + start, spec) for start in starts]


def _routing(ids: torch.Tensor, spec: GemmSpec) -> Routing:
    if spec.routing == "gathered":
        return Routing(ids=ids)
    counts = torch.bincount(ids, minlength=spec.experts)
    return Routing(offsets=counts.cumsum(0).to(torch.int32))


def packed_copies(
    weight: QuantizedTensor, layout: Layout, most: int = _MOST_COPIES
) -> tuple[list[QuantizedTensor], int]:
    """The copies of a packed weight that `rotation` asks for, at most `most`, and its rounds."""
    packed = layout.pack(weight)
    copies, rounds = rotation(packed.nbytes)
    return [packed, *(packed.clone() for _ in range(min(copies, most) - 1))], rounds


def rotation(nbytes: int) -> tuple[int, int]:
    """How many copies of a packed weight to read in turn, and how often in one graph.

    Between two calls on the same copy, more than 256 MiB of other copies are read, and at least
    one copy. For weights below 1 MiB, whose time is launch overhead anyway, 257 copies are enough.
    """
    copies = min(_MOST_COPIES, max(2, ROTATED_BYTES // nbytes + 1))
    return copies, rounds_of(copies)


def rounds_of(copies: int) -> int:
    """How often a graph calls all copies, so that it holds at least 16 calls."""
    return -(-_LEAST_CALLS // copies)


def random_problem(
    spec: GemmSpec, m: int, device: torch.device
) -> tuple[QuantizedTensor, torch.Tensor]:
    """A random weight and x [m, K]: codes of the whole range, and scales that keep results near 1.

    For experts the weight is a stack, and x holds the routed rows. No scale is zero, and nothing
    overflows fp16, gated or not.
    """
    generator = torch.Generator(device).manual_seed(0)
    qtype, rows, k = spec.qtype, spec.weight_rows * max(1, spec.experts), spec.k
    codes = torch.randint(
        qtype.qmin, qtype.qmax + 1, (rows, k), dtype=torch.int8, device=device, generator=generator
    )
    groups = num_groups(k, spec.group_size)
    scale = torch.rand(rows, groups, device=device, generator=generator).add_(0.5).div_(qtype.qmax)
    x = torch.randn(m, k, device=device, generator=generator).mul_(k**-0.5).to(spec.dtype)
    scale = scale.to(spec.scale_dtype)
    sizes = (spec.group_size, spec.weight_rows, k, spec.experts)
    form = Format(spec.bits, *sizes, levels=spec.levels)
    return QuantizedTensor.of_rows(pack(codes, qtype), scale, form), x


def reference(x: torch.Tensor, weight: QuantizedTensor, spec: GemmSpec) -> torch.Tensor:
    """The layer in fp64 from the plain layout, independent of every template and of TF32."""
    step = max(1, _REFERENCE_CHUNK // spec.k)
    parts = []
    for start in range(0, spec.weight_rows, step):
        rows = slice(start, start + step)
        codes, scale = weight.qweight[rows], weight.scale[rows]
        w_hat = dequantize_rows(
            codes, scale, weight.format.qtype, spec.group_size, spec.k, torch.float64
        )
        parts.append(x.double() @ w_hat.t())
    return Epilogue(activation=spec.activation, gated=spec.gated).apply(torch.cat(parts, 1))


def allowed_error(dtype: torch.dtype, k: int) -> float:
    """The largest ‖y - ŷ‖ / ‖ŷ‖ of a correct kernel: 2u + K·2⁻²⁴ with u half an ulp of `dtype`.

    A kernel rounds each weight, and the result, to `dtype`: relative errors of at most u, hence
    u/√3 in the root mean square if uniformly distributed. They are independent, so a sum of
    products has a relative error of u/√3 too. In a gated layer the errors of gate and up count up
    to twice, where the activation amplifies them: at most √(2²+2²+1)·u/√3 < 2u. Sums are kept in
    fp32: K additions of 2⁻²⁴ each.
    """
    return torch.finfo(dtype).eps + k * 2.0**-24


def difference(actual: torch.Tensor, expected: torch.Tensor, k: int) -> str | None:
    """How `actual` is wrong, or None.

    The whole result may be wrong by `allowed_error`. One element may be wrong by six times the
    root mean square of that, since its error is a sum of many independent ones and hence normally
    distributed, and by five roundings of its own: if gated, the gate (which counts twice), up, the
    activation and their product.
    """
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = actual.double() - expected
    if not bool(error.isfinite().all()):
        return "not all elements are finite"
    allowed = allowed_error(actual.dtype, k)
    size = float(expected.norm())
    relative = float(error.norm()) / max(size, torch.finfo(torch.float64).tiny)
    if relative > allowed:
        return f"relative error {relative:.2g}, allowed {allowed:.2g}"
    usual = 6 * allowed * size / expected.numel() ** 0.5
    excess = error.abs() - 5 * torch.finfo(actual.dtype).eps / 2 * expected.abs()
    worst = int(excess.argmax())
    if float(excess.flatten()[worst]) > usual:
        found, wanted = float(actual.flatten()[worst]), float(expected.flatten()[worst])
        return f"an element is {found:.4g} where {wanted:.4g} is expected"
    return None


def timing_of(microseconds: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    low, _, _, high = quantiles(microseconds, n=5, method="inclusive")
    middle = median(microseconds)
    # Interpolating between equal numbers can be off by one rounding, in either direction.
    return Timing(middle, min(low, middle), max(high, middle))


def _time(rotate: Callable[[], object], rounds: int, copies: int) -> Timing:
    """The time per call, where `rotate` makes `copies` calls and one graph holds `rounds` of it."""
    times = replayed(captured(rotate, rounds), _WARM_UPS, _REPLAYS)
    return timing_of([microseconds / (rounds * copies) for microseconds in times])


def captured(rotate: Callable[[], object], rounds: int) -> torch.cuda.CUDAGraph:
    """A graph of `rounds` calls of `rotate`, which has run before: capturing cannot compile."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: CUDA calls of other threads, such as a data loader's, do not end the capture.
    # A stream of this device: the default is the stream, and so the device, of the process's first
    # capture.
    stream = torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(rounds):
            rotate()
    return graph


def replayed(graph: torch.cuda.CUDAGraph, warm_ups: int, replays: int) -> list[float]:
    """Microseconds of each replay by the GPU's clock, after `warm_ups` that are not counted."""
    for _ in range(warm_ups):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in pairwise(marks)]


def check_device(error: Exception) -> None:
    """Raise DeviceLost if an error such as an illegal access has destroyed the CUDA context."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise DeviceLost(f"{error}; the GPU then answers {lost}") from error
