"""DenseView: a dequantized view of a packed weight, if codes cannot represent the view.

Its values are a dequantized copy, so writes to it would be lost: copy_ into whole rows is quantized
into the weight, and any other write is refused. Operators without a packed form also run here.
"""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor, nn

from fqcompile.errors import FineQuantError
from fqcompile.torch_compat import (
    decomposed,
    has_kernel,
    no_torch_function,
    schema_of,
    tree_leaves,
    tree_map_only,
)
from fqcompile.weights.memory import (
    Lifetime,
    Memory,
    NoMemory,
    Place,
    never_compiled,
    no_memory,
    values,
)
from fqcompile.weights.parameter import HANDLERS, PackedWeight

log = logging.getLogger("fqcompile")
_said: set[str] = set()
# Operators that use the same handlers as for a PackedWeight.
_ALIKE = {"aten.copy_.default", "aten.set_.source_Tensor"}
_COMPOSED = "CompositeImplicitAutograd"
_UNSAFE = ("aten::unsafe_", "aten::_unsafe_view")
_AFTER_CLONE = "aten._unsafe_view.default"  # what reshape calls after a copy
_AS_STRIDED = "aten.as_strided.default"


class DenseView(NoMemory):
    """See the module's docstring.

    Attributes:
        memory: that of the weight it is a view of; None if its place there is not known, as for
            the result of a compiled graph or for bits viewed as another dtype.
    """

    memory: Memory | None
    _shown: Tensor
    _number: int

    @staticmethod
    def __new__(
        cls: type["DenseView"], shown: Tensor, memory: Memory | None, offset: int | SymInt
    ) -> "DenseView":
        place = Place(shown.size(), shown.stride(), offset)
        self = cls.shaped(place, shown.dtype, shown.device)
        self._shown, self.memory, self.lifetime = shown, memory, Lifetime()
        self._number = 0 if memory is None else memory.number
        return self

    @property
    def shown(self) -> Tensor:
        """The current values of the view, as an ordinary tensor that must not be written to."""
        if self.memory is not None and self.memory.number != self._number:
            number = self.memory.number
            self._shown = values(self.memory, self.dtype).as_strided(*self.place)
            self._number = number
        return self._shown

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["shown"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], *_: Any) -> "DenseView":
        return DenseView(inner["shown"], None, 0)

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    @classmethod
    @never_compiled
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        handler = HANDLERS[str(func)] if str(func) in _ALIKE else densely
        return handler(func, args, kwargs or {})

    def __repr__(  # type: ignore[override]
        self, *, tensor_contents: Any = None
    ) -> str:
        return f"{type(self).__name__}({self.shown!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._apart().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._apart()
        return memo[id(self)]  # type: ignore[no-any-return]

    def _apart(self) -> Tensor:
        copied = self.shown.detach().clone()
        return (
            nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        )

    def __format__(self, spec: str) -> str:
        return format(self.shown, spec)

    def tolist(self) -> Any:
        return self.shown.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array; with `force` a writable copy."""
        if force:
            return self.shown.clone().numpy()
        array = self.shown.numpy()
        array.flags.writeable = False
        return array

    def data_ptr(self) -> int:
        """Refuse, because writes there would be lost."""
        raise no_memory(self.memory.name if self.memory is not None else "")


_Views = PackedWeight | DenseView


def densely(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on dequantized weights: correct for every operator, but slow.

    Raises:
        FineQuantError: it would write to a packed weight.
    """
    effects, shown = _effects(func), None
    for effect in effects.arguments:
        value = effect.of(args, kwargs)
        found = next((leaf for leaf in tree_leaves(value) if isinstance(leaf, _Views)), None)
        if found is not None and effect.writes:
            raise refusal(func, found)
        shown = shown if found is None else found
    if effects.is_composed:  # in inference mode; else autograd has done it
        return decomposed(func, args, kwargs)
    if str(func) not in _said:
        _said.add(str(func))
        log.info("%s has no packed form: the weight is dequantized for each call of it", func)
    if shown is not None and effects.is_view:
        return _viewed(func, shown, args, kwargs)
    plain = _as_laid_out if str(func) == _AFTER_CLONE else _dense
    dense = tree_map_only(_Views, plain, (args, kwargs))
    return func(*dense[0], **dense[1])


HANDLERS[None] = densely


def refusal(func: object, written: _Views) -> FineQuantError:
    """The error for a `func` that would write to a packed weight or a view of one."""
    memory = written.memory
    name = memory.name if memory is not None else ""
    place = f", {name}" if name else ""
    keep = f", or leave it dense by quantize_(model, exclude=[{name!r}])" if name else ""
    return FineQuantError(
        f"{func} would write to a packed weight {tuple(written.shape)}{place}; only copy_ of whole "
        "rows (as load_state_dict does) can: call fqcompile.restore(model) to change values in "
        f"place or to merge an adapter{keep}"
    )


class _Effect(NamedTuple):
    """An argument that an operator writes to, or that it may return, itself or as a view."""

    position: int
    name: str
    writes: bool

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The value of the argument; None if it was not given."""
        if self.position < len(args):
            return args[self.position]
        return kwargs.get(self.name)


class _Effects(NamedTuple):
    """`is_view`: the result may be a view. `is_composed`: the operator calls other operators."""

    arguments: tuple[_Effect, ...]
    is_view: bool
    is_composed: bool


@cache
def _effects(func: Any) -> _Effects:
    """The effects that the operator's schema declares, and two kinds that it does not.

    An operator whose name ends in an underscore writes to its first argument even if its schema is
    silent, as for collectives of torch.distributed. An "unsafe" operator returns undeclared views.
    """
    schema = schema_of(func)
    aliases = [(i, a.name, a.alias_info) for i, a in enumerate(schema.arguments)]
    found = [_Effect(i, name, said.is_write) for i, name, said in aliases if said is not None]
    unsafe = schema.name.startswith(_UNSAFE) and not found
    if unsafe:
        found = [_Effect(0, aliases[0][1], writes=False)]
    if not found and schema.name.endswith("_") and not schema.name.endswith("__"):
        found = [_Effect(0, aliases[0][1], writes=True)]
    returned = [result.alias_info for result in schema.returns]
    return _Effects(
        tuple(found),
        unsafe or any(said is not None and not said.is_write for said in returned),
        has_kernel(func.name(), _COMPOSED),
    )


def _dense(w: _Views) -> Tensor:
    return w.shown if isinstance(w, DenseView) else w.dequantized()


def _viewed(func: Any, shown: _Views, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gathered = isinstance(shown, PackedWeight) and shown.ids is not None  # its readers see a copy
    memory = None if gathered or shown.memory is None else shown.memory.root
    if memory is not None and str(func) == _AS_STRIDED:  # its offset is the weight's
        dense = values(memory, shown.dtype)
        place = Place(args[1], args[2], (*args[3:], shown.storage_offset())[0])
        return DenseView(dense.as_strided(*place), memory, place.offset)
    dense = _as_laid_out(shown)

    def plain(value: _Views) -> Tensor:
        return dense if value is shown else _dense(value)

    args, kwargs = tree_map_only(_Views, plain, (args, kwargs))
    start = shown.storage_offset() - dense.storage_offset()

    def view(result: Tensor) -> DenseView:
        known = memory if _is_strided_part(result, dense) else None
        return DenseView(result, known, start + result.storage_offset())

    result = func(*args, **kwargs)
    return view(result) if isinstance(result, Tensor) else [view(one) for one in result]


def _as_laid_out(shown: _Views) -> Tensor:
    """The values with the strides of `shown`, which decide what views are possible and where."""
    dense = _dense(shown)
    if dense.stride() == shown.stride():
        return dense
    return torch.empty_strided(
        shown.size(), shown.stride(), dtype=dense.dtype, device=dense.device
    ).copy_(dense)


def _is_strided_part(result: Tensor, dense: Tensor) -> bool:
    """Whether `result` is described by its size, stride and offset alone."""
    return result.dtype == dense.dtype and not result.is_neg() and not result.is_conj()
