"""PackedWeight: codes and scales that stand in a module where a dense weight stood.

A tensor of the weight's shape and type whose memory is two other tensors. Matmuls with it run on
them (see `packed_ops`); what cannot gets the dequantised weight. torch.compile takes it apart into
the two, under every backend.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fqcompile.errors import FineQuantError
from fqcompile.kernels.ops import CACHE_TAG, dequantize
from fqcompile.kernels.registry import LAYOUTS
from fqcompile.kernels.template import Layout, PackedLinear
from fqcompile.quant.chunks import plain_tensors
from fqcompile.quant.quantized_weight import QuantizedWeight
from fqcompile.weights.packed_form import PackedForm, best_layout
from fqcompile.weights.stacks import pack_stack, unpack_stack

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
# What answers an operator, by its full name; None: all others. `packed_ops` fills it.
HANDLERS: dict[str | None, Handler] = {}


class _NoMemory(torch.UntypedStorage):
    """The storage of a tensor whose memory is two others'."""

    def data_ptr(self) -> int:
        raise FineQuantError(
            "a packed weight has no memory of its own to be read or written as a dense one: save "
            "the model with fqcompile.save(model, directory), or torch.save its state_dict, or "
            "make it dense again by fqcompile.restore(model)"
        )


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
        # What is made in inference mode could not be a view of what was not.
        with torch.inference_mode(False):
            self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=qweight.device)
        self.qweight, self.scale, self.form, self.ids = qweight, scale, form, ids
        return self

    @classmethod
    @plain_tensors()
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

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of no bytes: whoever asks it for an address, as safetensors does, is told what to do."""
        storage = super().untyped_storage()
        if type(storage) is torch.UntypedStorage:
            storage.__class__ = _NoMemory
        return storage

    def share_memory_(self) -> "PackedWeight":
        """Moves codes and scales to memory that other processes can be given."""
        self.qweight.share_memory_()
        self.scale.share_memory_()
        return self

    def is_shared(self) -> bool:
        return bool(self.qweight.is_shared())

    def _stable_hash_for_caching(self) -> str:
        """What AOTAutograd's cache knows it by: all that its compiled code depends on."""
        inner = [(t.shape, t.stride(), t.dtype) for t in (self.qweight, self.scale)]
        outer = (self.shape, self.stride(), self.dtype, self.device, self.requires_grad)
        gathered = None if self.ids is None else self.ids.dtype
        return f"{CACHE_TAG} {outer} {self.form} {inner} {gathered}"

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
