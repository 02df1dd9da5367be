"""What every test starts from: verified passes, no network, few threads, a clean Dynamo."""

import os
import tempfile
from collections.abc import Iterator

# Read once, when fqcompile.passes.pipeline is imported; so it is set before anything imports it.
os.environ["FQCOMPILE_VERIFY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("FQCOMPILE_DEBUG_DIR", None)
os.environ["FQCOMPILE_CACHE_DIR"] = tempfile.mkdtemp(prefix="fqcompile-tests-")
os.environ["FQCOMPILE_CACHE_SIZE"] = "0"  # a weight of one test is not found by the next

import pytest
import torch
from torch._dynamo.backends import registry

from fqcompile.report import clear_reports
from tests import tiers
from tests.helpers import InnerGraphs

# One process of several (pytest -n): more threads than cores only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every test, not the quick tier alone")


def pytest_configure(config: pytest.Config) -> None:
    tiers.configure(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tiers.deselect(config, items)
    asked_for_zoo = "zoo" in config.option.markexpr
    for item in items:
        if item.get_closest_marker("zoo") and not asked_for_zoo:
            item.add_marker(pytest.mark.skip(reason="make zoo"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Compiled code and reports of one test are not seen by the next."""
    torch._dynamo.reset()
    clear_reports()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    clear_reports()


@pytest.fixture
def inner_graphs() -> Iterator[InnerGraphs]:
    """What reaches the inner compiler under inner_backend="fqtest_spy"."""
    spy = InnerGraphs()
    torch._dynamo.register_backend(spy, name="fqtest_spy")
    yield spy
    registry._COMPILER_FNS.pop("fqtest_spy")
