"""Made-up tuning reports: a tiny one whose numbers are told here, a large one, one that bites."""

import torch

from fqcompile.kernels.spec import H200, GemmSpec
from fqcompile.kernels.tuning.table import Timing
from fqcompile.report.tuning_case import Candidate, TuningCase
from fqcompile.report.tuning_report import TuningReport
from tests.report.large_reports import BITE

REASON = "wrong result: relative error 0.3, allowed 0.0081"
ABOUT = {"device": "NVIDIA H200", "commit": "abc1234", "fingerprint": {"torch": "2.13.0"}}


def spec(n: int, k: int, m: int) -> GemmSpec:
    return GemmSpec(m, n, k, 4, 128, torch.bfloat16, torch.bfloat16, "cuda", gpu=H200)


def case(
    shape: tuple[int, int, int],
    times: dict[str, tuple[float, float, float] | str],
    choice: str,
    ideal_us: float = 10.0,
    final: dict[str, tuple[float, float, float]] | None = None,
    problem: str | None = None,
) -> TuningCase:
    """`times`: median, low and high of each candidate, or why it was refused."""
    n, k, m = shape
    candidates = tuple(
        Candidate(name, refusal=told) if isinstance(told, str) else Candidate(name, Timing(*told))
        for name, told in times.items()
    )
    again = {name: Timing(*told) for name, told in (final or {}).items()}
    return TuningCase(
        spec(n, k, m), "fake", f"M <= {m}", ideal_us, choice, candidates, problem, again
    )


# (shape, {candidate: (median, low, high) or why refused}, choice, ideal)
TINY = [
    case((64, 256, 1), {"a": (20.0, 19.0, 21.0), "b": (25.0, 24.0, 26.0), "c": REASON}, "a"),
    case((64, 256, 16), {"a": (21.0, 19.5, 22.0), "b": (20.0, 19.0, 20.5), "c": REASON}, "a"),
    case((512, 256, 16), {"a": (30.0, 29.0, 31.0), "b": (16.0, 15.0, 17.0), "c": REASON}, "a"),
    case(
        (512, 256, 64),
        {"a": (26.0, 25.0, 27.0), "b": (20.0, 19.0, 20.5), "c": "out of resource"},
        "a",
        final={"a": (24.0, 23.0, 25.0), "b": (20.4, 20.0, 20.8)},
    ),
    case((512, 256, 512), {"a": REASON, "b": REASON}, "a", problem="all 2 configurations failed"),
]


def tiny() -> TuningReport:
    return TuningReport(
        TINY, ABOUT, notes=("Checked before it was timed.",), left_out=("9x9: no time",)
    )


def large() -> TuningReport:
    """Four layers, ten buckets of M, a search of 60 configurations."""
    buckets = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
    cases = []
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        for m in buckets:
            ideal = n * k / 8.6e6
            times: dict[str, tuple[float, float, float] | str] = {}
            for i in range(60):
                middle = ideal * (1.2 + (i * 37 % 60) / 20)
                told = (middle, middle * 0.98, middle * 1.03)
                times[f"16x{64 * (1 + i % 3)}x128x{1 + i}w4s3"] = told if i % 11 else REASON
            cases.append(case((n, k, m), times, "16x128x128x2w4s3", ideal))
    return TuningReport(cases, ABOUT)


def biting() -> TuningReport:
    """Every text is markup."""
    times: dict[str, tuple[float, float, float] | str] = {BITE: (2.0, 1.0, 3.0), "b": BITE}
    bitten = case((64, 256, 1), times, BITE, problem=BITE)
    return TuningReport([bitten], {BITE: BITE}, BITE, (BITE,), (BITE,))
