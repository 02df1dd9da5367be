"""WeightDispatch: the callable that Dynamo keeps; finds the packed tensors of the weights given.

args ──► ids of the weights seen before? ──► unchanged? ──► inner(kept args, packed tensors)
                 │ no                          │ no
                 └──────── bind: decide, pack, (compile a variant) ◄──┘
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._dynamo.aot_compile_types import SerializableCallable

from fqcompile.weights.no_memory import lifetime
from fqcompile.weights.store import Fingerprint, fingerprint

Inner = Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """The graph compiled for one set of plans: the outer args it reads, and what fills the rest."""

    inner: Inner
    kept_args: tuple[int, ...]
    pack: Callable[[Sequence[Any]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Binding:
    variant: Variant
    packed: tuple[Tensor, ...]
    state: Fingerprint
    alive: tuple[weakref.ref[object], ...]


class WeightDispatch(SerializableCallable):
    """Runs the variant that fits the weights in `args`.

    What torch's `aot_compile` returns runs; it cannot be saved, since it would be without weights.

    Args:
        weight_inputs: positions of the constant weights among the outer arguments.
        variant_for: decides the plans for these arguments and returns their variant.
        detect_updates: compare storage and version of every weight on each call, and repack on a
            change; otherwise only new identities are noticed.
    """

    def __init__(
        self,
        weight_inputs: Sequence[int],
        variant_for: Callable[[Sequence[Any]], Variant],
        detect_updates: bool,
    ) -> None:
        self._inputs = tuple(weight_inputs)
        self._variant_for = variant_for
        self._detect = detect_updates
        self._bindings: dict[tuple[int, ...], _Binding] = {}

    def __call__(self, *args: Any) -> Any:
        weights = tuple([args[i] for i in self._inputs])
        binding = self._bindings.get(tuple(map(id, weights)))
        if binding is None or (self._detect and binding.state != fingerprint(weights)):
            binding = self.bind(args)
        variant = binding.variant
        return variant.inner(*[args[i] for i in variant.kept_args], *binding.packed)

    # Tools that show compiled functions, such as depyf, read a name from it.
    __code__ = __call__.__code__

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        """Refuse, before anything is written."""
        raise NotImplementedError(
            "a graph compiled by backend 'finequant' finds its packed weights in this process, so "
            "it cannot be saved; fqcompile.save(model, directory) keeps the packed weights"
        )

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        """Refuse: nothing of this class is ever written."""
        raise NotImplementedError("a graph compiled by backend 'finequant' cannot be saved")

    def bind(self, args: Sequence[Any]) -> _Binding:
        """Decide and pack for these weights; forget them when one of them dies."""
        weights = tuple(args[i] for i in self._inputs)
        ids = tuple(map(id, weights))
        bindings = self._bindings

        def forget(_: object) -> None:
            bindings.pop(ids, None)

        before = fingerprint(weights)
        variant = self._variant_for(args)
        packed = variant.pack(args)
        alive = tuple(weakref.ref(lifetime(w), forget) for w in weights)
        binding = _Binding(variant, packed, before, alive)
        bindings[ids] = binding
        return binding
