"""Check the arguments of a call, then run the kernel it names, or dequantize if it does not build.

One set of rules serves implementations and fakes. Kernels take raw addresses and sizes, so a wrong
x, bias, residual or routing must not reach one. Each check raises RuntimeError, as the dense call
does, and names the sizes of the layer.

`holds` evaluates a condition on sizes of activations: `bool` for numbers; `expect_true` for
symbolic sizes, which defers unknown conditions to run time. Devices: see `on_one_device`.
"""

import logging
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fqcompile.errors import KernelBuildError
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.epilogue import activation as activation_entry
from fqcompile.kernels.registry import EVERY_STEP, KernelChoice, build_every_step, parse_kernel
from fqcompile.kernels.spec import Config
from fqcompile.kernels.template import Layout, Routing, Run, Shape, one_by_one
from fqcompile.tensor.format import QTYPES, Format
from fqcompile.tensor.quantized import QuantizedTensor

log = logging.getLogger("fqcompile")
# Kernels that failed to build, with the reason: they are not tried or reported again. The oldest
# entries are dropped, because a process may see an unbounded number of sizes.
BROKEN: dict[tuple[Any, ...], str] = {}
_MOST_BROKEN = 1024
Holds = Callable[[Any], bool]
Op = TypeVar("Op", bound=Callable[..., Any])
_MOST_FORMS = 4096  # forms of layers whose shapes are remembered


def checked_weight(
    kernel: str,
    activation: str,
    experts: int | None,
    qweight: Tensor,
    scale: Tensor,
    bits: int,
    levels: str,
    group_size: int,
    rows: int,
    k: int,
) -> QuantizedTensor:
    """Codes and scales in the layout of the kernel; with `experts`, those of a stack [E, ...].

    Every eager call of a layer runs this check, so facts about its form are cached.

    Raises:
        RuntimeError: they belong to another layer, or to another layout.
        OptionError: the activation is unknown.
        NoKernelError: the kernel is not installed.
    """
    # Symbolic numbers of experts, which fakes may have, cannot be looked up.
    find = _expected if experts is None or type(experts) is int else _expected.__wrapped__
    form, codes, scales = find(kernel, activation, bits, levels, group_size, rows, k, experts)
    if qweight.shape != codes or scale.shape != scales:
        raise _other_form(qweight, scale, form, kernel)
    return QuantizedTensor(qweight, scale, form)


@lru_cache(_MOST_FORMS)
def _expected(
    kernel: str,
    activation: str,
    bits: int,
    levels: str,
    group_size: int,
    rows: int,
    k: int,
    experts: int | None,
) -> tuple[Format, Shape, Shape]:
    """The format, and the shapes of qweight and scale."""
    activation_entry(activation)
    if (bits, levels) not in QTYPES:
        raise RuntimeError(f"no format has {bits} bits and {levels} levels; there are {[*QTYPES]}")
    layout = parse_kernel(kernel).template.layout
    form = Format(bits, group_size, rows, k, experts or 0, layout=layout.name, levels=levels)
    stack = () if experts is None else (experts,)
    codes, scales = layout.shapes(bits, group_size, rows, k)
    return form, (*stack, *codes), (*stack, *scales)


def experts_in(qweight: Tensor) -> int:
    """How many a stack has, whatever its shape is."""
    return qweight.shape[0] if qweight.dim() else 0


def _other_form(qweight: Tensor, scale: Tensor, form: Format, kernel: str) -> RuntimeError:
    layout = parse_kernel(kernel).template.layout
    codes, scales = layout.shapes(form.bits, form.group_size, form.rows, form.k)
    return RuntimeError(
        f"qweight and scale have the shapes {tuple(qweight.shape)} and {tuple(scale.shape)}; "
        f"{kernel} reads {codes} and {scales} for {form.bits} bits, groups of {form.group_size}, "
        f"{form.rows} rows and K={form.k}{', of each expert' if form.experts else ''}"
    )


def check_matmul(
    x: Tensor,
    weight: QuantizedTensor,
    routing: Routing | None,
    epilogue: Epilogue,
    zero_rest: bool = False,
    *,
    holds: Holds = bool,
) -> None:
    """x [..., K], bias [rows of the weight] and residual [..., N] of one type.

    With a routing x [M, K], one offset for each expert or one id for each row, and bias [E, rows].

    Raises:
        RuntimeError: one of them has another shape or type, or does not go with the routing.
    """
    rows, k = weight.format.rows, weight.format.k
    bias, residual, _, _ = epilogue
    if routing is None:
        shape = x.shape
        if not shape or not holds(shape[-1] == k):
            raise _other_columns(x, k, epilogue.columns(rows))
    else:
        _check_routed(x, "x", k, weight.qweight, routing, holds)
    if zero_rest and (routing is None or routing.offsets is None):
        raise RuntimeError("zero_rest=True is about rows past the last offset; it needs offsets")
    if bias is not None:
        biases = (rows,) if routing is None else (weight.qweight.shape[0], rows)
        if bias.shape != biases or bias.dtype != x.dtype:
            raise _other_values(bias, biases, x, "bias")
    if residual is not None:
        if routing is not None:
            raise RuntimeError(
                f"residual of shape {tuple(residual.shape)} beside offsets or ids: rows of experts "
                "take no residual; add it to the result"
            )
        added = (*x.shape[:-1], epilogue.columns(rows))
        if residual.shape != added or residual.dtype != x.dtype:
            raise _other_values(residual, added, x, "residual")


def check_backward(
    dz: Tensor, weight: QuantizedTensor, routing: Routing, *, holds: Holds = bool
) -> None:
    """dz [M, rows of one expert], routed as x was.

    Raises:
        RuntimeError: one of them has another shape or type.
    """
    _check_routed(dz, "dz", weight.format.rows, weight.qweight, routing, holds)


def _check_routed(
    x: Tensor,
    name: str,
    columns: int,
    qweight: Tensor,
    routing: Routing,
    holds: Holds,
) -> None:
    if x.dim() != 2:
        raise RuntimeError(f"{name} has {x.dim()} dimensions; experts take [rows, {columns}]")
    if not holds(x.shape[1] == columns):
        kind = "K" if name == "x" else "rows"
        raise RuntimeError(f"{name} has {x.shape[1]} columns; the weight has {kind}={columns}")
    offsets, ids = routing
    given = offsets if ids is None else ids
    if given is None or (offsets is not None and ids is not None):
        raise RuntimeError("rows are told their experts by offsets or by ids, by one of the two")
    if given.dim() != 1:
        raise RuntimeError(f"routing has {given.dim()} dimensions; it has 1")
    if given.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"routing is {given.dtype}; it must be int32 or int64")
    if ids is None and not holds(given.shape[0] == qweight.shape[0]):
        raise RuntimeError(f"{given.shape[0]} offsets for {qweight.shape[0]} experts")
    if ids is not None and not holds(ids.shape[0] == x.shape[0]):
        raise RuntimeError(f"{ids.shape[0]} ids for {x.shape[0]} rows of {name}")


def _other_columns(x: Tensor, k: int, n: int) -> RuntimeError:
    return RuntimeError(
        f"x has {x.shape[-1] if x.shape else 'no'} columns; the weight has K={k}: a layer of "
        f"N={n} takes x of shape [..., {k}], not {tuple(x.shape)}"
    )


def _other_values(values: Tensor, shape: Shape, x: Tensor, name: str) -> RuntimeError:
    """The error for an addend of another shape or dtype: kernels do not broadcast or cast."""
    return RuntimeError(
        f"{name} has the shape {tuple(values.shape)} and is {values.dtype}; x of shape "
        f"{tuple(x.shape)} takes one of {shape} that is {x.dtype}"
    )


def on_one_device(run: Op) -> Op:
    """Raise RuntimeError if the tensors among the arguments are on several devices.

    CPU implementations do not need this check: the dispatcher calls them only if all are there.
    """

    @wraps(run)
    def checked(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        found = dict.fromkeys(str(tensor.device) for tensor in tensors)
        if len(found) > 1:
            text = ", ".join(found)
            raise RuntimeError(f"expected all tensors to be on the same device, but found {text}")
        return run(*args, **kwargs)

    return checked  # type: ignore[return-value]


def run_matmul(
    x: Tensor, weight: QuantizedTensor, routing: Routing | None, epilogue: Epilogue, kernel: str
) -> Tensor:
    """The matmul [M, N] for x [M, K], M >= 1, by the kernel named; see `template.Run`.

    Raises:
        IndexError: on a CPU, the routing names an expert or a row that does not exist.
        KernelBuildError: the kernel does not build here, and its layout cannot be dequantized.
    """
    choice = parse_kernel(kernel)
    config = None if choice.launches is None else choice.launches.at(x.shape[0])
    if EVERY_STEP:
        build_every_step(choice, x, weight, routing, epilogue)
    if not BROKEN or _build(choice, config, x, weight, epilogue) not in BROKEN:
        try:
            return choice.template.run(x, weight, routing, epilogue, config)
        except KernelBuildError as error:
            if choice.template.layout.dequantize is None:
                raise
            _note_broken(choice, config, x, weight, epilogue, error)
    return _plainly(choice.template.layout)(x, weight, routing, epilogue, None)


def _note_broken(
    choice: KernelChoice,
    config: Config | None,
    x: Tensor,
    weight: QuantizedTensor,
    epilogue: Epilogue,
    error: KernelBuildError,
) -> None:
    while len(BROKEN) >= _MOST_BROKEN:
        BROKEN.pop(next(iter(BROKEN)), None)
    BROKEN[_build(choice, config, x, weight, epilogue)] = str(error)
    log.warning(
        "kernel %s does not build here: %s; its layers are dequantized and multiplied by "
        "PyTorch instead, which is slower",
        choice.template.name if config is None else f"{choice.template.name}:{config}",
        error,
    )


def _build(
    choice: KernelChoice,
    config: Config | None,
    x: Tensor,
    weight: QuantizedTensor,
    epilogue: Epilogue,
) -> tuple[Any, ...]:
    """The properties that a kernel is compiled for."""
    formats = (x.dtype, weight.scale.dtype, weight.format, epilogue.activation, epilogue.gated)
    return (choice.template.name, config, x.device, *formats)


def _plainly(layout: Layout) -> Run:
    dequantize = layout.dequantize
    assert dequantize is not None, "checked before"

    def multiply(x: Tensor, weight: QuantizedTensor, epilogue: Epilogue) -> Tensor:
        z = F.linear(x, dequantize(weight, x.dtype), epilogue.bias)
        return epilogue.apply_to_biased(z)

    return one_by_one(multiply)


def run_backward(dz: Tensor, weight: QuantizedTensor, routing: Routing, kernel: str) -> Tensor:
    """dz[m] @ ŵ[e(m)] [M, K], one expert's ŵ at a time; zero for rows without an expert."""
    dx = dz.new_zeros(dz.shape[0], weight.format.k)
    for expert, rows in routing.rows_of_experts(weight.qweight.shape[0], dz.shape[0]):
        w_hat = dequantize_weight(weight.expert(expert), dz.dtype, kernel)
        dx[rows] = dz[rows] @ w_hat
    return dx


def dequantize_weight(weight: QuantizedTensor, dtype: torch.dtype, kernel: str) -> Tensor:
    """ŵ [rows, K] in `dtype`, from the layout of the kernel named.

    Raises:
        KernelBuildError: that layout cannot be dequantized.
    """
    layout = parse_kernel(kernel).template.layout
    if layout.dequantize is None:
        raise KernelBuildError(f"layout {layout.name!r} cannot be dequantized")
    return layout.dequantize(weight, dtype)
