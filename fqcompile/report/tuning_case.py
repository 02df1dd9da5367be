"""Tuning results of one matmul at one number of rows: each candidate's time, or why it has none.

Candidates are configurations of a kernel or, for kernels without configurations, the kernels
themselves. The choice is the candidate used without measuring: the heuristic configuration, or the
selected kernel.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from fqcompile.kernels.roofline import ideal_seconds
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.template import Template
from fqcompile.kernels.tuning.key import Bucket, bucket_name, rows_of, tuning_key
from fqcompile.kernels.tuning.launches import at_bucket
from fqcompile.kernels.tuning.table import Case, Timing

Verdict = Literal["best", "within the spread", "slower"]


@dataclass(frozen=True)
class Candidate:
    """One candidate: its timing, or why it was refused."""

    name: str
    timing: Timing | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class TuningCase:
    """All candidates of one matmul at one number of rows, in the order tried.

    Attributes:
        rows: label of the rows, such as "M <= 16"; `spec.m` is the number that was measured.
        ideal_us: roofline lower bound in microseconds.
        choice: the candidate used without measuring; None if there is none.
        problem: why a part of the case could not be measured.
        final: second measurement of the best and the choice, alternating, if it was made. The
            minimum over many noisy times is biased low; a second measurement is not.
        tuning: machine-readable details: key and bucket of the tuned table.
    """

    spec: GemmSpec
    kernel: str
    rows: str
    ideal_us: float
    choice: str | None
    candidates: tuple[Candidate, ...] = ()
    problem: str | None = None
    final: dict[str, Timing] = field(default_factory=dict)
    tuning: dict[str, object] = field(default_factory=dict)

    @property
    def layer(self) -> str:
        """Shape and formats, such as "4096x14336 int4 g128 bfloat16"."""
        spec = self.spec
        group = "column" if spec.group_size >= spec.k else f"g{spec.group_size}"
        dtype = str(spec.dtype).removeprefix("torch.")
        stack = f"{spec.experts}x" if spec.experts else ""
        ends = [word for word in ("gated" if spec.gated else None, spec.routing) if word]
        return " ".join([f"{stack}{spec.n}x{spec.k} {spec.qtype.name} {group} {dtype}", *ends])

    @property
    def name(self) -> str:
        return f"{self.layer}, {self.rows}"

    @property
    def timed(self) -> dict[str, Timing]:
        """The candidates with a time, in the order tried."""
        return {c.name: c.timing for c in self.candidates if c.timing is not None}

    @property
    def refused(self) -> list[Candidate]:
        return [c for c in self.candidates if c.timing is None]

    @property
    def best(self) -> str | None:
        """The fastest candidate; among equals the one tried first."""
        timed = self.timed
        return min(timed, key=lambda name: timed[name].microseconds, default=None)

    def share(self, timing: Timing) -> float:
        """The fraction of the roofline that a timing reaches."""
        return self.ideal_us / timing.microseconds

    @property
    def best_timing(self) -> Timing | None:
        """Of the second measurement, where there was one."""
        return self._latest(self.best)

    @property
    def choice_timing(self) -> Timing | None:
        """Of the second measurement, where there was one."""
        return self._latest(self.choice)

    def _latest(self, name: str | None) -> Timing | None:
        return None if name is None else self.final.get(name, self.timed.get(name))

    @property
    def choice_over_best(self) -> float | None:
        """Time of the choice over the time of the best."""
        best, choice = self.best_timing, self.choice_timing
        return None if best is None or choice is None else choice.microseconds / best.microseconds

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on the choice; None if it has no time."""
        return self._verdict(self.choice, self.choice_timing, self.best_timing)

    def standing(self, candidate: Candidate) -> Verdict | None:
        """The verdict on any candidate, by the first measurement."""
        return self._verdict(candidate.name, candidate.timing, self.timed.get(self.best or ""))

    def _verdict(
        self, name: str | None, timing: Timing | None, best: Timing | None
    ) -> Verdict | None:
        """Slower only if the percentile ranges do not overlap: smaller differences may be noise."""
        if timing is None or best is None:
            return None
        if name == self.best:
            return "best"
        return "slower" if timing.low > best.high else "within the spread"

    def as_dict(self) -> dict[str, object]:
        """All fields as JSON values; times in microseconds."""
        spec = self.spec
        return {
            **self.tuning,
            "kernel": self.kernel,
            "n": spec.n,
            "k": spec.k,
            "bits": spec.bits,
            "levels": spec.levels,
            "group_size": spec.group_size,
            "dtype": str(spec.dtype).removeprefix("torch."),
            "gated": spec.gated,
            "experts": spec.experts,
            "routing": spec.routing,
            "rows": spec.m,
            "ideal_us": self.ideal_us,
            "best": self.best,
            "choice": self.choice,
            "choice_over_best": self.choice_over_best,
            "verdict": self.verdict,
            "problem": self.problem,
            "final": {name: asdict(timing) for name, timing in self.final.items()},
            "trials": [self._candidate_as_dict(c) for c in self.candidates],
        }

    def _candidate_as_dict(self, candidate: Candidate) -> dict[str, object]:
        timing = candidate.timing
        if timing is None:
            return {"config": candidate.name, "refusal": candidate.refusal}
        shares = {"spread": timing.spread, "of_ideal": self.share(timing)}
        return {"config": candidate.name, **asdict(timing), **shares}


def searched_case(
    spec: GemmSpec, template: Template, bucket: Bucket, known: Case, problem: str | None
) -> TuningCase:
    """The case of a bucket of M on the spec's GPU, from a search now or earlier."""
    at, rows = at_bucket(spec, bucket), rows_of(bucket, spec)
    launches = template.launches(at)
    key = tuning_key(spec, template.layout.name)
    return TuningCase(
        spec=at,
        kernel=template.name,
        rows=bucket_name(bucket, spec),
        ideal_us=1e6 * ideal_seconds(at, rows),
        choice=None if launches is None else str(launches.at(rows)),
        candidates=tuple(Candidate(str(t.config), t.timing, t.refusal) for t in known.trials),
        problem=problem,
        tuning={"key": key, "bucket": bucket},
    )


def summary(cases: Sequence[TuningCase], choice: str) -> str:
    """How the choice (called `choice` in the text) did over all cases, including losses."""
    judged = [(case, case.choice_over_best) for case in cases]
    ratios = [(ratio, case) for case, ratio in judged if ratio is not None]
    if not ratios:
        return f"{choice}: no case has both a time of it and of the best"
    counts = dict.fromkeys(("best", "within the spread", "slower"), 0)
    for _, case in ratios:
        counts[case.verdict or "slower"] += 1
    text = (
        f"{choice}: the best in {counts['best']} of {len(ratios)} cases, "
        f"within the spread of the best in {counts['within the spread']}, "
        f"slower in {counts['slower']}"
    )
    worst, where = max(ratios, key=lambda pair: pair[0])
    return f"{text}; at most {worst:.2f}x ({where.name})" if worst > 1 else text


def doubts(cases: Sequence[TuningCase]) -> list[str]:
    """A warning if a time is below the roofline lower bound and so cannot be right."""
    bests = [(case, best) for case in cases if (best := case.best_timing) is not None]
    above = [(case.share(best), case.name) for case, best in bests if case.share(best) > 1]
    if not above:
        return []
    share, where = max(above)
    return [
        f"in {len(above)} of {len(cases)} cases the best is faster than the roofline, up to "
        f"{share:.0%} of it ({where}): the memory bandwidth was measured too low, for example "
        "while another program ran, or weights were still in a cache; with experts, fewer may "
        "have been hit than on average"
    ]
