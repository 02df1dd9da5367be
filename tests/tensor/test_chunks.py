"""Pieces cover every row once; groups hold every weight once."""

import ctypes
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fqcompile.quant.choose import QuantPlan, quantize_weight
from fqcompile.tensor import chunks
from fqcompile.tensor.chunks import each_chunk, group_parts, grouped, plain_tensors, row_chunks
from fqcompile.tensor.format import num_groups
from tests.quant.strategies import group_sizes


@given(st.integers(1, 600), st.sampled_from([1, 7, 4096, 1 << 18]), st.floats(1e-6, 4.0))
def test_row_chunks_partition_the_rows(n, k, share):
    w = torch.empty(1, 1).expand(n, k)
    covered = [row for rows in row_chunks(w, share) for row in range(rows.start, rows.stop)]
    assert covered == list(range(n))


@given(st.integers(1, 4), st.integers(1, 200), group_sizes)
def test_grouped_and_parts_agree_on_who_is_in_which_group(n, k, g):
    w = torch.arange(1.0, n * k + 1).view(n, k)
    groups = grouped(w, g)
    assert groups.shape == (n, num_groups(k, g), g)
    assert torch.equal(groups.flatten(1)[:, :k], w)
    assert (groups.flatten(1)[:, k:] == 0).all()
    marks = torch.zeros(n, k)
    for part, index in group_parts(marks, torch.arange(num_groups(k, g)).expand(n, -1), g):
        part.add_(index)
    assert torch.equal(marks, (torch.arange(k) // g).float().expand(n, k))


@pytest.mark.parametrize("inference", [True, False])
def test_plain_tensors_are_ordinary_and_without_graph(inference):
    w = torch.nn.Parameter(torch.ones(2))
    with torch.inference_mode(inference), plain_tensors():
        made = w * 2
    assert not made.is_inference() and not made.requires_grad


SEVERAL_CHUNKS = torch.arange(300.0)[:, None].expand(300, 4096)


def column_sum(w):
    return torch.cat(each_chunk(lambda rows: w[rows, 0] + 0, w)).sum().item()


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_each_chunk_returns_in_order_and_leaves_the_thread_count(threads):
    starts = each_chunk(lambda rows: rows.start, SEVERAL_CHUNKS)
    assert len(starts) > 4 and starts == sorted(starts)
    assert torch.get_num_threads() == threads


def test_each_chunk_splits_operations_no_further(threads):
    assert set(each_chunk(lambda rows: torch.get_num_threads(), SEVERAL_CHUNKS)) == {1}


def test_a_tensor_of_a_trace_is_known_to_the_calling_thread_alone(threads):
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(SEVERAL_CHUNKS)
    ran = each_chunk(lambda rows: (threading.get_ident(), rows), fake)
    assert ran == [(threading.get_ident(), slice(0, len(fake)))]


def test_the_process_keeps_its_number_of_threads(threads, monkeypatch):
    """In the main thread, in threads that begin before, during and after, and at no time else."""
    calls, seen, done = [], [], threading.Event()
    set_num_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: calls.append(n) or set_num_threads(n))

    def watch():
        while not done.is_set():
            with ThreadPoolExecutor(1) as new:
                seen.append(new.submit(torch.get_num_threads).result())

    w = torch.randn(512, 4096)
    with ThreadPoolExecutor(1) as watcher:
        watching = watcher.submit(watch)
        for _ in range(3):
            chunks._pool.cache_clear()
            plan = QuantPlan(4, 128, "mse", torch.float16, 0.0)
            quantize_weight(w, plan)
            seen.append(torch.get_num_threads())
        done.set()
        watching.result()
    assert not calls
    assert len(seen) > 3 and set(seen) == {threads}


def test_without_openmp_pieces_run_one_after_the_other(monkeypatch):
    """With all of PyTorch's threads on each operation, and right."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    chunks._pool.cache_clear()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert chunks._pool(2) is None
        assert column_sum(SEVERAL_CHUNKS) == 299 * 150
        assert set(each_chunk(lambda rows: torch.get_num_threads(), SEVERAL_CHUNKS)) == {2}
    finally:
        torch.set_num_threads(before)
        chunks._pool.cache_clear()


def test_each_chunk_may_be_nested_and_works_without_grad(threads):
    w = torch.nn.Parameter(SEVERAL_CHUNKS.contiguous())
    sums = each_chunk(lambda rows: column_sum(w * 2), w)
    assert set(sums) == {2 * 299 * 150.0}
    assert not each_chunk(lambda rows: w[rows] * 2, w)[0].requires_grad


def test_each_chunk_hands_on_exceptions(threads):
    def fail(rows):
        raise ZeroDivisionError(rows.start)

    with pytest.raises(ZeroDivisionError, match="0"):
        each_chunk(fail, SEVERAL_CHUNKS)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(threads):
    column_sum(SEVERAL_CHUNKS)
    with multiprocessing.get_context("fork").Pool(1) as child:
        assert child.apply_async(column_sum, (SEVERAL_CHUNKS,)).get(timeout=60) == 299 * 150
