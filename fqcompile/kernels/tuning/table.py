"""TunedTable: measurements of one machine, in a JSON file that many processes may share.

A file that cannot be used (missing, truncated, of another machine or version) counts as empty, and
the reason is logged. Every change is merged with the current content of the file, which is replaced
atomically.
"""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Self, cast, get_args

from fqcompile.files.trusted import (
    cache_directory,
    check_trusted,
    replace_file,
    warn_unusable,
    writing,
)
from fqcompile.kernels.spec import Config, Gpu, parse_config
from fqcompile.kernels.template import SearchMode
from fqcompile.kernels.tuning.key import Bucket, fingerprint, kernel_source_hash

log = logging.getLogger("fqcompile")

SCHEMA = 1
Fingerprint = Mapping[str, str]
_UNUSABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError
)  # fmt: skip
_LONGEST_SEARCH = 1800.0  # seconds; a process that has waited this long searches as well


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median, and the 20th and 80th percentile.

    Raises:
        ValueError: not 0 < low <= median <= high < infinity.
    """

    microseconds: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.microseconds <= self.high < math.inf:
            raise ValueError(f"{self} is not a timing: 0 < low <= median <= high must hold")

    @property
    def spread(self) -> float:
        """The distance between the two percentiles, relative to the median."""
        return (self.high - self.low) / self.microseconds

    def __str__(self) -> str:
        return f"{self.microseconds:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried: its timing, or why it was refused."""

    config: Config
    timing: Timing | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Case:
    """All trials of one matmul at one bucket of M; `searched` is the widest completed search."""

    trials: tuple[Trial, ...] = ()
    searched: SearchMode | None = None

    @property
    def best(self) -> Trial | None:
        """The fastest trial; if several are equally fast, the one tried first."""
        timed = [(t.timing.microseconds, i) for i, t in enumerate(self.trials) if t.timing]
        return self.trials[min(timed)[1]] if timed else None

    @property
    def failure(self) -> str | None:
        """The message if every trial was refused, else None."""
        if not self.trials or self.best is not None:
            return None
        first = self.trials[0]
        count = len(self.trials)
        return f"all {count} configurations failed, {first.config} with {first.refusal}"

    def has(self, mode: SearchMode) -> bool:
        """Whether a search of this mode, or a wider one, was completed."""
        return self.searched in ("max", mode)

    def trial(self, config: Config) -> Trial | None:
        return next((t for t in self.trials if t.config == config), None)

    def merged(self, other: "Case") -> "Case":
        """The trials of both (`other` wins for the same configuration), and the wider search."""
        trials = {t.config: t for t in (*self.trials, *other.trials)}
        widest: SearchMode | None = "max" if "max" in (self.searched, other.searched) else None
        return Case(tuple(trials.values()), widest or other.searched or self.searched)


Cases = dict[tuple[str, Bucket], Case]


class TunedTable:
    """The measurements for one fingerprint: `cases`, kept in the file `path`."""

    def __init__(self, path: Path, fingerprint: Fingerprint, cases: Cases) -> None:
        self.path = path
        self.fingerprint = dict(fingerprint)
        self._cases = cases
        self._in_memory = False

    @classmethod
    def load(cls, path: Path, fingerprint: Fingerprint) -> Self:
        """The table in `path`, or an empty one if the file cannot be used."""
        return cls(path, fingerprint, _own_cases(path, fingerprint))

    def case(self, key: str, bucket: Bucket) -> Case:
        """The trials of this matmul and bucket; empty if there are none."""
        return self._cases.get((key, bucket), Case())

    def add(self, key: str, bucket: Bucket, trial: Trial) -> None:
        """Store one more trial, in memory and in the file."""
        self._merge({(key, bucket): Case((trial,))})

    @contextmanager
    def search_alone(self) -> Iterator[None]:
        """Let one of the processes that share the file search; the others wait and use its result.

        The ranks of a model need the same kernels at the same time: they are measured once.
        If locking fails, each process searches itself, and `add` logs why nothing is stored.
        """
        with ExitStack() as held:
            if not self._in_memory:
                with suppress(OSError):
                    lock = f"{self.path.stem}.searching"
                    held.enter_context(writing(self.path.parent, lock, _LONGEST_SEARCH))
                    if self.path.exists():
                        self._cases = merged(_own_cases(self.path, self.fingerprint), self._cases)
            yield

    def finish(self, key: str, bucket: Bucket, mode: SearchMode) -> None:
        """Record that a search of this mode was completed."""
        self._merge({(key, bucket): Case((), mode)})

    def _merge(self, news: Cases) -> None:
        self._cases = merged(self._cases, news)
        if self._in_memory:
            return
        try:
            with writing(self.path.parent):
                self._cases = merged(_own_cases(self.path, self.fingerprint), self._cases)
                replace_file(self.path, [_as_json(self._cases, self.fingerprint).encode()])
        except OSError as error:
            self._in_memory = True
            warn_unusable(self.path.parent, error)


def table_for(gpu: Gpu) -> TunedTable:
    """The table for this GPU and these versions; its files are read once per process."""
    return _table(gpu, cache_directory() / "tuned")


@cache
def _table(gpu: Gpu, directory: Path) -> TunedTable:
    here = fingerprint(gpu, kernel_source_hash())
    digest = sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]
    slug = re.sub("[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return TunedTable.load(directory / f"{slug}-{digest}.json", here)


def merged(cases: Cases, news: Cases) -> Cases:
    """The cases of both, each with the trials of both."""
    return {**cases, **{at: cases.get(at, Case()).merged(new) for at, new in news.items()}}


def _own_cases(path: Path, fingerprint: Fingerprint) -> Cases:
    """The file's cases; none, with a warning, if it is unreadable or others may write to it."""
    try:
        check_trusted(path)
    except FileNotFoundError:
        pass  # `read_cases` logs it
    except OSError as error:
        warn_unusable(path.parent, error)
        return {}
    return read_cases(path, fingerprint)


def read_cases(path: Path, fingerprint: Fingerprint) -> Cases:
    """The file's cases, or none, with the reason logged, if the file does not apply here."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, this version reads {SCHEMA}")
        theirs = content["fingerprint"]
        other = [n for n in fingerprint if theirs[n] != fingerprint[n]]
        if other:
            name = other[0]
            raise ValueError(f"for {name} {theirs[name]!r}, here it is {fingerprint[name]!r}")
        return _cases_from(content["cases"])
    except _UNUSABLE as error:
        log.info("no tuned kernels from %s: %s: %s", path, type(error).__name__, error)
        return {}


def _cases_from(content: dict[str, dict[str, Any]]) -> Cases:
    cases: Cases = {}
    for key, buckets in content.items():
        for bucket, case in buckets.items():
            mode = case["searched"]
            if mode is not None and mode not in get_args(SearchMode):
                raise ValueError(f"searched is {mode!r}")
            trials = tuple(map(_trial_from, case["trials"]))
            cases[key, None if bucket == "open" else int(bucket)] = Case(
                trials, cast(SearchMode | None, mode)
            )
    return cases


def _trial_from(content: dict[str, Any]) -> Trial:
    trial = Trial(parse_config(content["config"]))
    if "refusal" in content:
        return replace(trial, refusal=str(content["refusal"]))
    return replace(trial, timing=Timing(*map(float, content["microseconds"])))


def _as_json(cases: Cases, fingerprint: Fingerprint) -> str:
    written: dict[str, dict[str, object]] = {}
    for (key, bucket), case in sorted(cases.items(), key=lambda item: str(item[0])):
        written.setdefault(key, {})["open" if bucket is None else str(bucket)] = {
            "searched": case.searched,
            "trials": [_trial_as_dict(t) for t in case.trials],
        }
    content = {"schema": SCHEMA, "fingerprint": dict(fingerprint), "cases": written}
    return json.dumps(content, indent=1)


def _trial_as_dict(trial: Trial) -> dict[str, object]:
    if trial.timing is None:
        return {"config": str(trial.config), "refusal": trial.refusal}
    t = trial.timing
    return {"config": str(trial.config), "microseconds": [t.microseconds, t.low, t.high]}
