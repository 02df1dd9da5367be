"""The rank of this process in torch.distributed; a single process is rank 0 of 1.

`agree`: all ranks of one model compare what they compile before they run it. Graphs with different
collectives would deadlock; different kernels for replicated tensors would make ranks diverge in
the last bit, and then in a token or an expert. Both are reported as errors. Ranks communicate
through the store of their process group, not through a collective, so that a missing rank is
detected and named.

FQCOMPILE_RANK_TIMEOUT is how many seconds to wait for the others; the default is half an hour, as
one rank may quantize or tune while others find all of it done.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from tqdm import tqdm

from fqcompile.errors import FineQuantError, OptionError, RankError
from fqcompile.torch_compat import default_store

T = TypeVar("T")

TIMEOUT = "FQCOMPILE_RANK_TIMEOUT"
_DEFAULT_SECONDS = "1800"
_LONGEST = 200
_times: Counter[tuple[int, ...]] = Counter()
_written: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)  # and not deleted yet


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _together() else 1


def own_folder(directory: Path) -> Path:
    """The folder for this rank's output: one per rank if there are several."""
    return directory / f"rank_{rank()}" if world_size() > 1 else directory


class Team:
    """Ranks that run a step together: all of them continue, or none.

    Attributes:
        index, size: this rank's position among them, and their number.
    """

    def __init__(self, ranks: Sequence[int] = (), group: Any = None) -> None:
        self.index = ranks.index(rank()) if ranks else 0
        self.size = max(1, len(ranks))
        self._group = group

    def together(self, step: Callable[[], T]) -> list[T]:
        """Run the step on all ranks; return the results of all.

        Raises:
            RankError: the step failed on another rank, or a rank exited. If it failed on this
                rank, the error itself is raised.
        """
        if self.size == 1:
            return [step()]
        error: Exception | None = None
        answers: list[Any] = [None] * self.size
        try:
            own: tuple[str | None, T | None] = (None, step())
        except (FineQuantError, OSError) as caught:
            error, own = caught, (f"{type(caught).__name__}: {caught}", None)
        try:
            dist.all_gather_object(answers, own, group=self._group)
        except RuntimeError as lost:
            raise RankError(f"a rank that takes part has ended: {lost}") from (error or lost)
        if error is not None:
            raise error
        for other, (text, _) in enumerate(answers):
            if text is not None:
                raise RankError(f"it failed on rank {other} of {self.size}: {text}")
        return [result for _, result in answers]


def progress(things: Iterable[T] = (), desc: str | None = None, **options: Any) -> "tqdm[T]":
    """A tqdm progress bar on rank 0 if standard error is a terminal; else none."""
    return tqdm(things, desc, disable=True if rank() else None, **options)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def agree(what: str, facts: Mapping[str, str], groups: Sequence[tuple[int, ...]]) -> None:
    """Wait until all ranks of each group have reached this point with the same facts.

    Raises:
        RankError: a rank has other facts, or did not arrive in time.
        OptionError: FQCOMPILE_RANK_TIMEOUT is not a number of seconds.
    """
    for ranks in groups:
        for other, theirs in _unlike(what, facts, ranks).items():
            raise RankError(_difference(what, facts, theirs, other))


def any_rank(what: str, flag: bool, groups: Sequence[tuple[int, ...]]) -> bool:
    """Wait until all ranks of each group have reached this point; whether the flag is set on any.

    Raises as `agree` does, where a rank has reached another point.
    """
    facts = {what: str(flag)}
    unlike = [found for ranks in groups for found in _unlike(what, facts, ranks).items()]
    for other, theirs in unlike:
        if theirs.keys() != facts.keys():
            raise RankError(_difference(what, facts, theirs, other))
    return flag or bool(unlike)


def _unlike(
    what: str, facts: Mapping[str, str], ranks: tuple[int, ...]
) -> dict[int, dict[str, str]]:
    """The facts of the ranks that have others than this one, once all have said theirs."""
    own = json.dumps(dict(facts))
    digest = sha256(own.encode()).hexdigest()
    store, seconds = default_store(), _seconds()
    place = f"fqcompile/{'-'.join(map(str, ranks))}/{_times[ranks]}"
    _times[ranks] += 1
    for key, value in ((f"{place}/{rank()}/facts", own), (f"{place}/{rank()}", digest)):
        store.set(key, value)
        _written[ranks].append(key)
    answers = {r: _wait(store, f"{place}/{r}", what, r, seconds) for r in ranks}
    _forget(store, ranks)
    unlike = [other for other, answer in answers.items() if answer != digest.encode()]
    return {other: json.loads(store.get(f"{place}/{other}/facts")) for other in unlike}


def _forget(store: Store, ranks: tuple[int, ...]) -> None:
    """Delete this rank's keys of earlier rounds: every rank in this round has read them."""
    earlier, _written[ranks] = _written[ranks][:-2], _written[ranks][-2:]
    for key in earlier:
        try:
            store.delete_key(key)
        except RuntimeError:  # a kind of store that cannot; it grows by two keys a graph
            return


def _wait(store: Store, key: str, what: str, other: int, seconds: float) -> bytes:
    try:
        store.wait([key], timedelta(seconds=seconds))
        return bytes(store.get(key))
    except RuntimeError as error:  # each kind of store has its own
        raise RankError(
            f"rank {rank()} has compiled {what}, and rank {other} has not come that far in "
            f"{seconds:g} s: it has ended, or runs another graph; see its output. Raise {TIMEOUT} "
            f"(seconds) if it only needs longer ({type(error).__name__})"
        ) from error


def _difference(what: str, own: Mapping[str, str], theirs: Mapping[str, str], other: int) -> str:
    names = [n for n in dict.fromkeys([*own, *theirs]) if own.get(n) != theirs.get(n)]
    name = names[0] if names else "the order of its sites"
    mine, his = ((facts.get(name) or "nothing")[:_LONGEST] for facts in (own, theirs))
    return (
        f"{what} is not the same on all ranks: for {name!r} rank {rank()} has {mine}, and rank "
        f"{other} has {his}. Give all ranks the same options and inputs; if only the kernels "
        "differ, let all share one FQCOMPILE_CACHE_DIR, or compile with autotune='off'"
    )


def _seconds() -> float:
    text = os.environ.get(TIMEOUT) or _DEFAULT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise OptionError(f"{TIMEOUT} is {text!r}; allowed: a number of seconds above 0")
    return seconds
