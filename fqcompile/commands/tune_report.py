"""What `fqcompile tune` shows: for each matmul and bucket of M the fastest configuration and the
closed form's, against the least time that memory and matrix units allow; in full as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from tabulate import tabulate

from fqcompile.kernels.launch_table import Config
from fqcompile.kernels.roofline import ideal_seconds
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.template import SearchMode, Template
from fqcompile.kernels.tuning.key import Bucket, bucket_name, rows_of
from fqcompile.kernels.tuning.search import at_bucket
from fqcompile.kernels.tuning.table import Case, Timing, Trial, TunedTable

HEADERS = ("case", "rows", "best", "us [p20, p80]", "of ideal", "closed form", "takes", "tried")


@dataclass
class TunedCase:
    """One matmul at one bucket of M, and what is known of it once it was tuned."""

    spec: GemmSpec
    template: Template
    key: str
    bucket: Bucket
    known: Case = field(default_factory=Case)
    problem: str | None = None

    @property
    def closed_form(self) -> Config | None:
        launches = self.template.launches(at_bucket(self.spec, self.bucket))
        return None if launches is None else launches.at(rows_of(self.bucket, self.spec))

    @property
    def closed_form_trial(self) -> Trial | None:
        return None if self.closed_form is None else self.known.trial(self.closed_form)

    @property
    def ideal_us(self) -> float:
        rows = rows_of(self.bucket, self.spec)
        return 1e6 * ideal_seconds(at_bucket(self.spec, self.bucket), rows)

    def of_ideal(self, timing: Timing) -> float:
        """The share of the roofline that a timing reaches."""
        return self.ideal_us / timing.microseconds

    @property
    def closed_form_ratio(self) -> float | None:
        """How many times the best one's time the closed form takes; None where one has no time."""
        best, closed = self.known.best, self.closed_form_trial
        if best is None or best.timing is None or closed is None or closed.timing is None:
            return None
        return closed.timing.microseconds / best.timing.microseconds


def format_cases(cases: Sequence[TunedCase]) -> list[str]:
    """A table of the cases, then a line for each refused configuration and each problem."""
    rows = [_row(case) for case in cases]
    lines = [tabulate(rows, HEADERS, disable_numparse=True)] if rows else []
    for case in cases:
        where = f"{_name(case)}, {bucket_name(case.bucket, case.spec)}"
        refused = [t for t in case.known.trials if t.refusal is not None]
        lines += [f"{where}: {t.config} refused: {t.refusal}" for t in refused]
        if case.problem is not None:
            lines.append(f"{where}: {case.problem}")
    return lines


def report_of(cases: Sequence[TunedCase], mode: SearchMode, table: TunedTable) -> dict[str, object]:
    """Everything, as JSON holds it."""
    return {
        "fingerprint": table.fingerprint,
        "table": str(table.path),
        "mode": mode,
        "cases": [_case_as_dict(case) for case in cases],
    }


def _name(case: TunedCase) -> str:
    spec = case.spec
    group = "column" if spec.group_size >= spec.k else f"g{spec.group_size}"
    dtype = str(spec.dtype).removeprefix("torch.")
    stack = f"{spec.experts}x" if spec.experts else ""
    ends = [word for word in ("gated" if spec.gated else None, spec.routing) if word]
    return " ".join([f"{stack}{spec.n}x{spec.k} int{spec.bits} {group} {dtype}", *ends])


def _row(case: TunedCase) -> tuple[str, ...]:
    best, ratio = case.known.best, case.closed_form_ratio
    refused = sum(trial.refusal is not None for trial in case.known.trials)
    timing = None if best is None else best.timing
    return (
        _name(case),
        bucket_name(case.bucket, case.spec),
        "none" if best is None else str(best.config),
        "" if timing is None else str(timing),
        "" if timing is None else f"{case.of_ideal(timing):.0%}",
        str(case.closed_form),
        "" if ratio is None else f"{ratio:.2f}x",
        f"{len(case.known.trials)}" + (f", {refused} refused" if refused else ""),
    )


def _case_as_dict(case: TunedCase) -> dict[str, object]:
    spec = case.spec
    return {
        "key": case.key,
        "kernel": case.template.name,
        "n": spec.n,
        "k": spec.k,
        "bits": spec.bits,
        "group_size": spec.group_size,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "gated": spec.gated,
        "experts": spec.experts,
        "routing": spec.routing,
        "bucket": case.bucket,
        "rows": rows_of(case.bucket, case.spec),
        "ideal_us": case.ideal_us,
        "best": None if case.known.best is None else str(case.known.best.config),
        "closed_form": str(case.closed_form),
        "closed_form_over_best": case.closed_form_ratio,
        "problem": case.problem,
        "trials": [_trial_as_dict(case, trial) for trial in case.known.trials],
    }


def _trial_as_dict(case: TunedCase, trial: Trial) -> dict[str, object]:
    content: dict[str, object] = {"config": str(trial.config)}
    if trial.timing is None:
        return {**content, "refusal": trial.refusal}
    return {**content, **asdict(trial.timing), "of_ideal": case.of_ideal(trial.timing)}
