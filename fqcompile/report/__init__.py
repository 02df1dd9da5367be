"""Reports for users: plans, compile reports, dumps and HTML pages."""

from fqcompile.report.compile_report import (
    CompileReport,
    PassRecord,
    amend,
    clear_reports,
    installed_version,
    record,
    recorded,
    reports,
)
from fqcompile.report.dump import dump_report, is_traced, trace_report
from fqcompile.report.plan import Plan, Totals
from fqcompile.report.site import Site

__all__ = [
    "CompileReport",
    "PassRecord",
    "Plan",
    "Site",
    "Totals",
    "amend",
    "clear_reports",
    "dump_report",
    "installed_version",
    "is_traced",
    "record",
    "recorded",
    "reports",
    "trace_report",
]
