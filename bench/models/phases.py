"""A step of decoding, a prefill and a whole `generate()` of a model, to compile and to time.

A step reads a static cache that holds a context of random tokens; the steps of all that is compared
read and write the same one, from the same length on.

The least time of a step or a prefill is what it must read and compute, over the device's rates:

    read      each weight once as the way holds it, tables that are looked up in left out, and of
              experts what random routing is expected to hit; the keys and values of the context
    compute   2 for each token and weight of a linear layer, 4 for each token, token that it attends
              to and value of a head; at the rate of a dense product in 16 bits

The longer of the two. On a GPU the rates are those that copies and cuBLAS reach (`kernels.spec`);
on a CPU they are measured: reading a large tensor, and F.linear in the model's type.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bench.core.results import Row
from fqcompile.kernels.roofline import read_bandwidth
from fqcompile.kernels.spec import gpu_of
from fqcompile.report import CompileReport

_ROWS, _SIDE, _PRODUCTS = 1024, 2048, 5
_STACKED = 3  # dimensions of the parameters of experts

Work = Callable[[], Tensor]


@dataclass
class Ready:
    """A way that computes the right thing, compiled and warm, and what is known of it already.

    Attributes:
        rewind: forgets what the calls of `work` have added to the context.
    """

    work: Work
    rewind: Callable[[], None]
    row: Row = field(default_factory=dict)


class Decoding:
    """A batch of sequences of `context` tokens, each to be lengthened by up to `steps` more.

    Attributes:
        rows: tokens that go through the layers in a step; `head_rows` of them through the head.
        attended: pairs of a token and one that it attends to, in the first step.
        length: tokens that the cache has room for.
        context_bytes: of the keys and values of the context, of all layers.
    """

    dynamic = False

    def __init__(self, model: nn.Module, batch: int, context: int, steps: int) -> None:
        config: Any = model.config
        parameter = next(model.parameters())
        device, dtype = parameter.device, parameter.dtype
        self.context, self.length = context, context + steps
        self.rows = self.head_rows = batch
        self.attended = batch * (context + 1)
        cache_type = import_module("transformers").StaticCache
        self.cache = cache_type(config=config, max_cache_len=self.length)
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        self.cache.early_initialization(batch, key_heads, _head_size(config), dtype, device)
        tokens = random_tokens(model, context + 1, batch)
        self.tokens = tokens[:, -1:]
        self._fill(model, tokens[:, :-1])
        # These count in Python too, and a graph is compiled for one count. A full one loses a token
        # with each step.
        self.sliding = [layer for layer in self.cache.layers if layer.is_sliding]
        self.windows = [(layer.keys.clone(), layer.values.clone()) for layer in self.sliding]
        token = 2 * batch * key_heads * _head_size(config) * dtype.itemsize
        self.context_bytes = sum(
            token * min(context, layer.max_cache_len) for layer in self.cache.layers
        )
        self.positions = torch.full((batch, 1), context, device=device)
        # OPT counts positions from the mask where it is not given one.
        self.mask = torch.ones((batch, self.length), dtype=torch.long, device=device)

    @torch.no_grad()
    def _fill(self, model: nn.Module, tokens: Tensor) -> None:
        """By the model itself: Gemma makes of random keys and values what no rounding survives."""
        mask = torch.ones_like(tokens)
        model(tokens, mask, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def rewind(self) -> None:
        """Forget all tokens after the context."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        for layer, (keys, values) in zip(self.sliding, self.windows, strict=True):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        self.positions.fill_(self.context)

    def _rewind_sliding(self) -> None:
        for layer in self.sliding:
            layer.cumulative_length.fill_(self.context)
            layer.cumulative_length_int = self.context

    def step_of(self, model: Callable[..., Any], compiled: Callable[[Any], Any]) -> Work:
        """A compiled step of `model`: the logits [batch, vocabulary] after one more token."""
        cache, mask = self.cache, self.mask

        def step(tokens: Tensor, positions: Tensor) -> Tensor:
            output = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits: Tensor = output.logits[:, -1]
            return logits

        run = compiled(step)

        def work() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            self._rewind_sliding()
            logits: Tensor = run(self.tokens, self.positions)
            self.positions += 1
            return logits

        return work


class Prefill:
    """One prompt of `length` tokens; no cache is kept. Attributes as those of Decoding."""

    context_bytes = 0
    head_rows = 1
    dynamic = False

    def __init__(self, model: nn.Module, length: int) -> None:
        self.rows = length
        self.attended = length * (length + 1) // 2
        self.tokens = random_tokens(model, length)

    def rewind(self) -> None:
        """There is nothing to forget."""

    def step_of(self, model: nn.Module, compiled: Callable[[Any], Any]) -> Work:
        """A compiled prefill of `model`: the logits [1, vocabulary] of the last token."""

        def prefill(tokens: Tensor) -> Tensor:
            output = model(input_ids=tokens, use_cache=False, logits_to_keep=1)
            logits: Tensor = output.logits[:, -1]
            return logits

        run = compiled(prefill)

        def work() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            logits: Tensor = run(self.tokens)
            return logits

        return work


class Generation:
    """`generate()`: a prompt of `length` tokens, and `new` of them after it, the likeliest ones.

    With a static cache, and compiled as by `model.compile`: the prompt, a step, and where sizes of
    the cache are Python's numbers, a step for any of them.
    """

    dynamic = None

    def __init__(self, model: nn.Module, length: int, new: int) -> None:
        self.tokens, self.new = random_tokens(model, length), new
        mask = torch.ones_like(self.tokens)
        self.settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        self.settings |= {"attention_mask": mask, "cache_implementation": "static"}
        self.settings |= {"return_dict_in_generate": True, "output_logits": True}

    def rewind(self) -> None:
        """There is nothing to forget."""

    def step_of(self, model: nn.Module, compiled: Callable[[Any], Any]) -> Work:
        """A call of generate(): the logits [1, vocabulary] of its first new token."""
        changed: Any = model
        run = compiled(changed._call_impl)

        def work() -> Tensor:
            changed._compiled_call_impl = run
            try:
                made = changed.generate(self.tokens, disable_compile=True, **self.settings)
            finally:
                changed._compiled_call_impl = None
            logits: Tensor = made.logits[0]
            return logits

        return work


Phase = Decoding | Prefill | Generation


def random_tokens(model: nn.Module, length: int, batch: int = 1) -> Tensor:
    """Of sequences, [batch, length]."""
    config: Any = model.config
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(2)
    return torch.randint(config.vocab_size, (batch, length), device=device, generator=generator)


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


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
    width = config.num_attention_heads * _head_size(config)
    attention = 4 * phase.attended * config.num_hidden_layers * width
    return int(inner + last + attention)


def ideal_ms(bytes_read: float, flops: float, rates: Rates) -> float:
    """The longer of reading and computing."""
    return 1e3 * max(bytes_read / rates.bandwidth, flops / rates.flops)
