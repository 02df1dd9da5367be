"""What every test starts from: verified passes, no network, few threads, a clean Dynamo."""

# ruff: noqa: E402  (what stands before the imports is for them)

import gc
import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

# What is imported stays: looking for cycles in it is a quarter of the time of collection.
gc.disable()
# Read once, when fqcompile.passes.pipeline is imported; so it is set before anything imports it.
os.environ["FQCOMPILE_VERIFY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("FQCOMPILE_DEBUG_DIR", None)
# The workers of pytest -n find the name, and share the x86 kernel that one of them has built.
OWN_CACHE = os.environ.get("FQTEST_CACHE") or tempfile.mkdtemp(prefix="fqcompile-tests-")
os.environ["FQCOMPILE_CACHE_DIR"] = os.environ["FQTEST_CACHE"] = OWN_CACHE
os.environ["FQCOMPILE_CACHE_SIZE"] = "0"  # a weight of one test is not found by the next

import pytest
import torch
from torch._C._dynamo import eval_frame
from torch._dynamo.backends import registry
from torch._subclasses.fake_tensor import FakeTensorMode

from fqcompile.report import clear_reports
from fqcompile.torch_compat import trace_log
from tests import tiers
from tests.helpers import InnerGraphs

# One process of several (pytest -n): more threads than cores only wait for each other.
torch.set_num_threads(1)

# With CUDA but no GPU, PyTorch 2.11 crashes where a thread makes the first one of a process.
with FakeTensorMode():
    pass

# pytest listens to loggers that do not propagate, and where somebody listens to this one, every
# compilation writes out its graphs and guards: a fifth of its time.
trace_log.propagate = True
trace_log.handlers.clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every test, not the quick tier alone")


def pytest_configure(config: pytest.Config) -> None:
    tiers.configure(config)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Not the thousands of tests of the zoo where nobody asked for them."""
    asked = "zoo" in config.option.markexpr or any("zoo" in argument for argument in config.args)
    return True if collection_path.name == "zoo" and not asked else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tiers.deselect(config, items)
    asked_for_zoo = "zoo" in config.option.markexpr
    for item in items:
        if item.get_closest_marker("zoo") and not asked_for_zoo:
            item.add_marker(pytest.mark.skip(reason="make zoo"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    result = yield
    gc.enable()
    gc.freeze()
    return result


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Data that a module draws as it is imported is the same in every process."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Compiled code and reports of one test are not seen by the next."""
    torch._dynamo.reset()
    _take_graph_breaks()
    clear_reports()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    clear_reports()


def _take_graph_breaks() -> None:
    """PyTorch 2.11 skips them within a fullgraph call, and after calls of several threads for good.

    Each call sets that for the process and puts back what it found, which another may have set.
    """
    if hasattr(eval_frame, "set_eval_frame_override"):
        eval_frame.set_eval_frame_override(eval_frame._EvalFrameOverride.NONE)


@pytest.fixture
def inner_graphs() -> Iterator[InnerGraphs]:
    """What reaches the inner compiler under inner_backend="fqtest_spy"."""
    spy = InnerGraphs()
    torch._dynamo.register_backend(spy, name="fqtest_spy")
    yield spy
    registry._COMPILER_FNS.pop("fqtest_spy")
