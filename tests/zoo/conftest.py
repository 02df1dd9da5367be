"""The table at the end of a run of the zoo."""

import pytest
from tabulate import tabulate

HEADERS = ("architecture", "sites", "quantized", "of bytes", "seconds", "kept")
ROWS: list[tuple[object, ...]] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much of each architecture was quantized, and why the rest was not."""
    if ROWS:
        terminalreporter.section("zoo")
        terminalreporter.write_line(tabulate(ROWS, HEADERS, disable_numparse=True))
