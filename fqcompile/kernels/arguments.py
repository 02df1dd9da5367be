"""What the operators' arguments must be: one set of rules for implementations and fakes.

Kernels take addresses and trust the sizes beside them, so a wrong x, bias, residual or routing must
not reach one. Each check raises RuntimeError, as the dense call does, with the sizes of the layer.

`holds` decides a condition on the sizes of activations: `bool` where they are numbers; for symbolic
ones `expect_true`, which leaves to run time what cannot be known. Devices: see `on_one_device`.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from fqcompile.kernels.epilogue import activation as activation_entry
from fqcompile.kernels.registry import parse_kernel
from fqcompile.kernels.template import Shape

Holds = Callable[[Any], bool]
Run = TypeVar("Run", bound=Callable[..., Any])
_MOST_FORMS = 4096  # forms of layers whose shapes are remembered


def check_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    activation: str,
    gated: bool,
    kernel: str,
    *,
    holds: Holds = bool,
) -> None:
    """x [..., K], bias [rows of the weight] and residual [..., N] of one type, and the weight.

    Raises:
        RuntimeError: one of them has another shape or type.
        OptionError: there is no such activation.
        NoKernelError: the kernel is not installed here.
    """
    rows = 2 * n if gated else n
    codes, scales = _shapes(kernel, activation, bits, group_size, rows, k)
    if qweight.shape != codes or scale.shape != scales:
        raise _other_form(qweight, scale, kernel, bits, group_size, rows, k, "")
    shape = x.shape
    if not shape or not holds(shape[-1] == k):
        raise RuntimeError(
            f"x has {shape[-1] if shape else 'no'} columns; the weight has K={k}: a layer of "
            f"N={n} takes x of shape [..., {k}], not {tuple(shape)}"
        )
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        raise _other_values(bias, (rows,), x, "bias")
    if residual is not None:
        added = (*shape[:-1], n)
        if residual.shape != added or residual.dtype != x.dtype:
            raise _other_values(residual, added, x, "residual")


def check_experts(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    activation: str,
    gated: bool,
    kernel: str,
    *,
    holds: Holds = bool,
) -> None:
    """x [M, K], one offset for each expert or one id for each row, bias [E, rows of one].

    Raises:
        RuntimeError: one of them has another shape or type.
        OptionError: there is no such activation.
        NoKernelError: the kernel is not installed here.
    """
    rows = 2 * n if gated else n
    _check_routed(x, "x", k, qweight, offsets, ids, holds)
    check_weight(qweight, scale, bits, group_size, rows, k, kernel, activation, stacked=True)
    each = (qweight.shape[0], rows)
    if bias is not None and (bias.shape != each or bias.dtype != x.dtype):
        raise _other_values(bias, each, x, "bias")


def check_experts_backward(
    dz: Tensor,
    qweight: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    bits: int,
    group_size: int,
    rows: int,
    k: int,
    kernel: str,
    *,
    holds: Holds = bool,
) -> None:
    """dz [M, rows of one expert], routed as x was.

    Raises:
        RuntimeError: one of them has another shape or type.
        NoKernelError: the kernel is not installed here.
    """
    _check_routed(dz, "dz", rows, qweight, offsets, ids, holds)
    check_weight(qweight, scale, bits, group_size, rows, k, kernel, stacked=True)


def check_weight(
    qweight: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    rows: int,
    k: int,
    kernel: str,
    activation: str = "none",
    *,
    stacked: bool = False,
) -> None:
    """qweight and scale as the kernel's layout has them, of a stack with [E, ...] in front.

    Raises:
        RuntimeError: they are of another layer, or of another layout.
        OptionError: there is no such activation.
        NoKernelError: the kernel is not installed here.
    """
    codes, scales = _shapes(kernel, activation, bits, group_size, rows, k)
    stack = qweight.shape[:1] if stacked else ()
    if qweight.shape != (*stack, *codes) or scale.shape != (*stack, *scales):
        each = ", of each expert" if stacked else ""
        raise _other_form(qweight, scale, kernel, bits, group_size, rows, k, each)


@lru_cache(_MOST_FORMS)
def _shapes(
    kernel: str, activation: str, bits: int, group_size: int, rows: int, k: int
) -> tuple[Shape, Shape]:
    """Of qweight and scale, of one matrix."""
    activation_entry(activation)
    return parse_kernel(kernel).template.layout.shapes(bits, group_size, rows, k)


def _other_form(
    qweight: Tensor,
    scale: Tensor,
    kernel: str,
    bits: int,
    group_size: int,
    rows: int,
    k: int,
    each: str,
) -> RuntimeError:
    codes, scales = _shapes(kernel, "none", bits, group_size, rows, k)
    return RuntimeError(
        f"qweight and scale have the shapes {tuple(qweight.shape)} and {tuple(scale.shape)}; "
        f"{kernel} reads {codes} and {scales} for {bits} bits, groups of {group_size}, {rows} rows "
        f"and K={k}{each}"
    )


def _check_routed(
    x: Tensor,
    name: str,
    columns: int,
    qweight: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    holds: Holds,
) -> None:
    if x.dim() != 2:
        raise RuntimeError(f"{name} has {x.dim()} dimensions; experts take [rows, {columns}]")
    if not holds(x.shape[1] == columns):
        kind = "K" if name == "x" else "rows"
        raise RuntimeError(f"{name} has {x.shape[1]} columns; the weight has {kind}={columns}")
    routing = offsets if ids is None else ids
    if routing is None or (offsets is not None and ids is not None):
        raise RuntimeError("rows are told their experts by offsets or by ids, by one of the two")
    if routing.dim() != 1:
        raise RuntimeError(f"routing has {routing.dim()} dimensions; it has 1")
    if routing.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"routing is {routing.dtype}; it must be int32 or int64")
    if ids is None and not holds(routing.shape[0] == qweight.shape[0]):
        raise RuntimeError(f"{routing.shape[0]} offsets for {qweight.shape[0]} experts")
    if ids is not None and not holds(ids.shape[0] == x.shape[0]):
        raise RuntimeError(f"{ids.shape[0]} ids for {x.shape[0]} rows of {name}")


def _other_values(values: Tensor, shape: Shape, x: Tensor, name: str) -> RuntimeError:
    """What is added has exactly this shape, and x's type: kernels neither broadcast nor cast."""
    return RuntimeError(
        f"{name} has the shape {tuple(values.shape)} and is {values.dtype}; x of shape "
        f"{tuple(x.shape)} takes one of {shape} that is {x.dtype}"
    )


def on_one_device(run: Run) -> Run:
    """Raises RuntimeError where the tensors among the arguments are on several devices.

    What is registered for the CPU needs it not: the dispatcher calls that where all are there.
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
