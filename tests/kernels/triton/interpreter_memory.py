"""Memory as a launch sees it: the tensors passed to it, who wrote and read them, in which order.

A program is a sequence of segments, numbered through the whole trace; a synchronizing atomic ends
one. Each byte of a tensor's storage has the last segment that stored to it, loaded from it and
updated it atomically. A race is an access to a byte that a segment of another program of the same
launch touched, one of the two not a load, unless atomics order the two:

* Two atomics never race. An atomic and a plain access do.
* An atomic on a single element (a counter, a lock) with release semantics publishes everything that
  its program did before; one with acquire semantics, on the same element, orders that before what
  its program does afterwards. An atomic on a block of elements orders nothing.

A launch that is allowed to start early (`launch_pdl`) overlaps the launch before it: each program
has to wait for that before any access, before it lets the next launch start, and before it ends.
"""

from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Any

import numpy as np
import torch

Program = tuple[int, int, int]


class RaceError(RuntimeError):
    """The result depends on the order in which programs, or lanes of a store, run."""


class OrderError(RuntimeError):
    """A program does before `gdc_wait` what it may do only when earlier launches are complete."""


class Access(Enum):
    LOAD = "loads"
    STORE = "stores to"
    ATOMIC = "updates"

    @property
    def past(self) -> str:
        return {"loads": "loaded", "stores to": "stored to", "updates": "updated"}[self.value]


CONFLICTS = {
    Access.LOAD: (Access.STORE, Access.ATOMIC),
    Access.STORE: (Access.STORE, Access.LOAD, Access.ATOMIC),
    Access.ATOMIC: (Access.STORE, Access.LOAD),
}


class Storage:
    """The last segment of each kind of access to every byte; 0 is none."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor  # Keeps the memory from being given to another tensor.
        # Rounded down, so that an aligned element is aligned here as well.
        self.begin = tensor.untyped_storage().data_ptr() // 16 * 16
        self.end = tensor.untyped_storage().data_ptr() + tensor.untyped_storage().nbytes()
        self.last: dict[Access, np.ndarray] = {}

    def elements(self, access: Access, size: int) -> np.ndarray:
        """The segments of [element, byte], for elements of that size. Writes go through."""
        if access not in self.last:
            self.last[access] = np.zeros(self.end - self.begin, np.int32)
        count = (self.end - self.begin) // size
        return self.last[access][: count * size].reshape(count, size)

    def written(self, size: int) -> np.ndarray:
        kinds = (self.elements(access, size) != 0 for access in (Access.STORE, Access.ATOMIC))
        return np.logical_or(*kinds).all(1)


class View:
    """A tensor argument: which addresses belong to it. What lies between its rows does not."""

    def __init__(self, name: str, tensor: torch.Tensor, storage: Storage) -> None:
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, interpreted kernels take CPU tensors")
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in strides)
        self.name, self.storage, self.element = name, storage, tensor.element_size()
        self.begin = tensor.data_ptr()
        self.end = self.begin + span * self.element
        self._belongs: np.ndarray | None = None
        if not tensor.is_contiguous():
            belongs = torch.zeros(span, dtype=torch.bool)
            belongs.as_strided(tensor.shape, tensor.stride()).fill_(True)
            self._belongs = belongs.numpy()

    def holds(self, addresses: np.ndarray, size: int) -> np.ndarray:
        inside = (addresses >= self.begin) & (addresses + np.uint64(size) <= self.end)
        if self._belongs is not None:
            for byte in (0, size - 1):
                index = (addresses + np.uint64(byte) - np.uint64(self.begin)) // self.element
                inside &= self._belongs[np.where(inside, index, 0).astype(np.int64)]
        return inside


@dataclass
class Memory:
    """Every launch of one `interpreted()` context.

    order: shuffles the programs of a launch. together: launches that wait for `together()` to end.
    """

    views: list[View] = field(default_factory=list)
    order: Random | None = None
    together: list[Any] | None = None
    program: Program = (0, 0, 0)
    _has_waited: bool = True
    _storages: dict[int, Storage] = field(default_factory=dict)
    # The program of each segment of this launch, the segment `_launch_begin` being the first.
    _programs: list[Program | None] = field(default_factory=list)
    _launch_begin: int = 1
    _program_begin: int = 1
    _ordered_before: set[int] = field(default_factory=set)
    _released: dict[int, set[int]] = field(default_factory=dict)

    def views_of(self, tensors: dict[str, torch.Tensor]) -> list[View]:
        """What the programs of a launch may touch."""
        present = {name: t for name, t in tensors.items() if t.numel()}
        return [View(name, t, self._storage_of(t)) for name, t in present.items()]

    def begin_launch(self) -> None:
        """Or several that run together: between their programs nothing is ordered."""
        self._launch_begin += len(self._programs)
        # The first segment stands for loads by several programs, which nothing orders.
        self._programs = [None]
        self._released = {}

    def begin_program(self, program: Program, views: list[View], starts_early: bool) -> None:
        self.program, self.views, self._has_waited = program, views, not starts_early
        self._programs.append(program)
        self._program_begin = self._segment
        self._ordered_before = set()

    def wait(self) -> None:
        self._has_waited = True

    def launch_dependents(self) -> None:
        self._require_wait("lets the next launch start")

    def end_program(self) -> None:
        self._require_wait("ends")

    def prefetch(self, addresses: np.ndarray, argument: str | None) -> None:
        """Returns no value, so it may come before the wait. The bytes are to be in an argument."""
        views = [view for view in self.views if argument in (None, view.name)]
        inside = [view.holds(addresses, 1) for view in views]
        if not np.any(inside, axis=0).all():
            raise IndexError(
                f"program {self.program} prefetches beyond {argument or 'all tensors'}"
            )

    def _require_wait(self, what: str) -> None:
        if not self._has_waited:
            raise OrderError(f"program {self.program} {what} before it waits for earlier launches")

    def unwritten(self, tensor: torch.Tensor) -> int:
        """How many elements of this view no launch has stored or atomically updated."""
        storage = self._storages.get(tensor.untyped_storage().data_ptr())
        if storage is None or not tensor.numel():
            return tensor.numel()
        size = tensor.element_size()
        first = (tensor.data_ptr() - storage.begin) // size
        written = torch.from_numpy(storage.written(size))
        return int((~written.as_strided(tensor.shape, tensor.stride(), first)).sum())

    def touch(self, access: Access, addresses: np.ndarray, size: int, argument: str | None) -> None:
        """Checks the elements of `size` bytes at these addresses, and takes note.

        They are to be in that argument; in any, where the pointer's origin is not known.
        """
        if not addresses.size:
            return
        self._require_wait(f"{access.value} {argument or 'memory'}")
        if (addresses % np.uint64(size)).any():
            raise IndexError(f"{access.value} {size} bytes at an address that is not aligned")
        views = [view for view in self.views if argument in (None, view.name)]
        left = addresses
        for view in views:
            inside = view.holds(left, size)
            if inside.any():
                self._touch_view(access, view, left[inside], size)
                left = left[~inside]
            if not left.size:
                return
        raise IndexError(
            f"{left.size} of {addresses.size} lanes are out of bounds: program {self.program} "
            f"{access.value} {size} bytes, {_nearest(views, int(left[0]), argument)}"
        )

    def acquire(self, address: int) -> None:
        """What the atomic on the element at `address` that comes next is ordered after."""
        self._ordered_before |= self._released.get(address, set())

    def release(self, address: int) -> None:
        """What the atomic on the element at `address` that was just made is ordered before."""
        mine = set(range(self._program_begin, self._segment + 1))
        self._released.setdefault(address, set()).update(self._ordered_before, mine)
        self._programs.append(self.program)

    @property
    def _segment(self) -> int:
        return self._launch_begin + len(self._programs) - 1

    def _storage_of(self, tensor: torch.Tensor) -> Storage:
        new = Storage(tensor)
        for old in self._storages.values():
            same = (old.begin, old.end) == (new.begin, new.end)
            assert same or old.end <= new.begin or new.end <= old.begin, "storages overlap"
        return self._storages.setdefault(tensor.untyped_storage().data_ptr(), new)

    def _touch_view(self, access: Access, view: View, addresses: np.ndarray, size: int) -> None:
        rows = ((addresses - np.uint64(view.storage.begin)) // np.uint64(size)).astype(np.int64)
        for earlier in CONFLICTS[access]:
            if earlier in view.storage.last:
                segments = view.storage.elements(earlier, size)[rows]
                racing = self._of_other_programs(segments)
                if racing.any():
                    lane, byte = np.argwhere(racing)[0]
                    offset = int(addresses[lane] + np.uint64(byte)) - view.begin
                    other = self._programs[segments[lane, byte] - self._launch_begin]
                    raise RaceError(
                        f"program {self.program} {access.value} {view.name} at byte {offset}, "
                        f"which program {other or 'several'} {earlier.past}"
                    )
        last = view.storage.elements(access, size)
        segment = self._segment
        if access is Access.STORE:
            last[rows] = segment
        else:
            # Of loads and atomics by several programs, the last says too little.
            last[rows] = np.where(self._of_other_programs(last[rows]), self._launch_begin, segment)

    def _of_other_programs(self, segments: np.ndarray) -> np.ndarray:
        """Those of this launch that are neither this program's nor ordered before it."""
        others = (segments >= self._launch_begin) & (segments < self._program_begin)
        if self._ordered_before and others.any():
            others &= ~np.isin(segments, list(self._ordered_before))
        return others


def _nearest(views: list[View], address: int, argument: str | None) -> str:
    if not views:
        return f"{argument or 'every tensor'} has no elements"
    view = min(views, key=lambda v: max(v.begin - address, address - v.end, 0))
    return f"{address - view.begin} bytes after the start of {view.name}"
