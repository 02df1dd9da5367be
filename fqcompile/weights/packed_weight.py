"""PackedWeight: codes and scales that stand in a module where a dense weight stood.

A tensor of the weight's shape and type whose memory is two other tensors. Matmuls with it run on
them (see `packed_ops`); what cannot gets the dequantised weight. torch.compile takes it apart into
the two, under every backend.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fqcompile.errors import FineQuantError
from fqcompile.kernels.gpu import gpu_of
from fqcompile.kernels.ops import dequantize
from fqcompile.kernels.registry import LAYOUTS, TEMPLATES, select_kernel
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.template import PLAIN, Layout, PackedLinear
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.weights.stacks import pack_stack, unpack_stack

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
# What answers an operator, by its full name; None: all others. `packed_ops` fills it.
HANDLERS: dict[str | None, Handler] = {}


@dataclass(frozen=True)
class PackedForm:
    """How to read the two tensors.

    Attributes:
        rows, k: of the matrix, or of one of `experts` matrices (0: there is no stack).
        transposed: the tensor is the matrices' transpose, [K, N] or [E, K, N].
        scale_method: how scales were chosen; new values that are copied in are quantised so.
        layout: the name of the order in memory.
    """

    bits: int
    group_size: int
    rows: int
    k: int
    experts: int = 0
    transposed: bool = False
    scale_method: str = "mse"
    layout: str = PLAIN.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        matrix = (self.k, self.rows) if self.transposed else (self.rows, self.k)
        return (self.experts, *matrix) if self.experts else matrix

    @property
    def reader(self) -> str:
        """A kernel that knows the layout."""
        return next(t.name for t in TEMPLATES.values() if t.layout.name == self.layout)


class PackedWeight(Tensor):
    """See the module's docstring.

    Attributes:
        qweight, scale: in the layout that `form` names.
        ids: where experts have been gathered by an index, that index [P]; the shape is [P, ...].
    """

    qweight: Tensor
    scale: Tensor
    ids: Tensor | None
    form: PackedForm

    @staticmethod
    def __new__(
        cls: type["PackedWeight"],
        qweight: Tensor,
        scale: Tensor,
        form: PackedForm,
        dtype: torch.dtype,
        ids: Tensor | None = None,
    ) -> "PackedWeight":
        shape = form.shape if ids is None else (ids.shape[0], *form.shape[1:])
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=qweight.device)
        self.qweight, self.scale, self.form, self.ids = qweight, scale, form, ids
        return self

    @classmethod
    def of(
        cls,
        weight: QuantizedWeight,
        *,
        dtype: torch.dtype,
        experts: int = 0,
        transposed: bool = False,
        scale_method: str = "mse",
    ) -> "PackedWeight":
        """Packs as the kernel of this device and type wants it.

        Args:
            weight: in the plain layout, rows [N, K], or [E * N, K] of a stack.
            dtype: of the weight it stands for, and so of the activations.
        """
        rows, k = weight.shape
        rows //= max(1, experts)
        form = PackedForm(
            weight.bits, weight.group_size, rows, k, experts, transposed, scale_method
        )
        layout = best_layout(form, dtype, weight.scale.dtype, weight.qweight.device)
        qweight, scale = pack_stack(weight, experts, layout)
        return cls(qweight, scale, replace(form, layout=layout.name), dtype)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[PackedForm, torch.dtype]]:
        names = ["qweight", "scale"] + (["ids"] if self.ids is not None else [])
        return names, (self.form, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: tuple[PackedForm, torch.dtype], *_: Any
    ) -> "PackedWeight":
        form, dtype = context
        return PackedWeight(inner["qweight"], inner["scale"], form, dtype, inner.get("ids"))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        handler = HANDLERS.get(str(func)) or HANDLERS[None]
        return handler(func, args, kwargs or {})

    def __repr__(  # type: ignore[override]
        self, *, tensor_contents: Any = None
    ) -> str:
        f = self.form
        group = "column" if f.group_size >= f.k else f"groups of {f.group_size}"
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, int{f.bits}, {group}, layout={f.layout})"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """In the plain layout, which every machine reads."""
        weight, form = self.quantized(), self.form
        is_parameter = isinstance(self, nn.Parameter)
        stack = (form.experts, form.transposed, form.scale_method)
        parts = (weight.qweight, weight.scale, weight.bits, weight.group_size, weight.shape)
        return rebuild_packed_weight, (*parts, self.dtype, *stack, is_parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        if id(self) not in memo:
            copied = self.clone()
            parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, requires_grad=False) if parameter else copied
        return memo[id(self)]  # type: ignore[no-any-return]

    @property
    def data(self) -> "PackedWeight":
        """The same memory; values that are assigned are quantised into it, as by copy_."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, values: Tensor) -> None:
        with torch.no_grad():
            self.copy_(values)

    def data_ptr(self) -> int:
        """Raises: two tensors have no one address; a file written from it would be garbage."""
        raise FineQuantError(
            f"a packed weight {tuple(self.shape)} has no memory of its own to be read or written "
            "as a dense one; save the model with fqcompile.save(model, directory), or call "
            "fqcompile.restore(model) first"
        )

    @property
    def layout_in_memory(self) -> Layout:
        return LAYOUTS[self.form.layout]

    @property
    def packed(self) -> PackedLinear:
        """As operators and kernels take it."""
        f = self.form
        return PackedLinear(self.qweight, self.scale, f.bits, f.group_size, f.rows, f.k)

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and scales, with what fills up the kernel's layout."""
        return self.qweight.nbytes + self.scale.nbytes

    def quantized(self) -> QuantizedWeight:
        """Plain codes and scales, rows [N, K] or [E * N, K]; of the whole stack where gathered."""
        return unpack_stack(self.packed, self.form.experts, self.layout_in_memory)

    def dequantized(self) -> Tensor:
        """The dense tensor of this shape, type and device."""
        w_hat = self._matrix_or_stack()
        w_hat = w_hat if self.ids is None else w_hat[self.ids]
        return w_hat.transpose(-2, -1) if self.form.transposed else w_hat

    def _matrix_or_stack(self) -> Tensor:
        """[N, K] or [E, N, K], by the operator that knows the layout."""
        form = self.form
        formats = (form.bits, form.group_size, form.rows, form.k, self.dtype, form.reader)
        if not form.experts:
            matrix: Tensor = dequantize(self.qweight, self.scale, *formats)
            return matrix
        pairs = zip(self.qweight.unbind(), self.scale.unbind(), strict=True)
        return torch.stack([dequantize(*pair, *formats) for pair in pairs])

    def with_form(self, **changes: Any) -> "PackedWeight":
        """The same memory, read in another way."""
        form = replace(self.form, **changes)
        return PackedWeight(self.qweight, self.scale, form, self.dtype, self.ids)


def best_layout(
    form: PackedForm, dtype: torch.dtype, scale_dtype: torch.dtype, device: torch.device
) -> Layout:
    """That of the kernel which runs a weight of this form here; it can be undone."""
    spec = spec_of(form, dtype, scale_dtype, device, None)
    return select_kernel(spec).template.layout


def spec_of(
    form: PackedForm,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: torch.device,
    routing: Any,
) -> GemmSpec:
    """Any number of rows of x; experts without a routing as grouped ones."""
    return GemmSpec(
        m=1,
        n=form.rows,
        k=form.k,
        bits=form.bits,
        group_size=form.group_size,
        dtype=dtype,
        scale_dtype=scale_dtype,
        device_type=device.type,
        needs_backward=True,
        m_range=(0, None),
        gpu=gpu_of(device) if device.type == "cuda" and torch.cuda.is_available() else None,
        experts=form.experts,
        routing=(routing or "grouped") if form.experts else None,
    )


def rebuild_packed_weight(
    qweight: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    experts: int,
    transposed: bool,
    scale_method: str,
    is_parameter: bool,
) -> Tensor:
    """What `torch.load` and unpickling call."""
    weight = QuantizedWeight(qweight, scale, bits, group_size, tuple(shape))  # type: ignore[arg-type]
    form = {"experts": experts, "transposed": transposed, "scale_method": scale_method}
    packed = PackedWeight.of(weight, dtype=dtype, **form)  # type: ignore[arg-type]
    return nn.Parameter(packed, requires_grad=False) if is_parameter else packed


torch.serialization.add_safe_globals([rebuild_packed_weight])
