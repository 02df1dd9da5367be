"""Pair: two processes that are the ranks of a gloo group, and run functions on request.

They live from the first request to the last, as importing and joining takes longer than most cases.
After a failure, in which a rank may wait for the other, both are ended and the next request starts
new ones: what one test does to its ranks is no other test's. Nothing waits without a limit, and the
limit of a request does not count what it takes to start.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fqcompile.distributed.ranks import TIMEOUT
from fqcompile.report import clear_reports

SIZE = 2
COLLECTIVE_SECONDS = 60.0
START_SECONDS = 300.0  # where others use the machine
Function = Callable[..., Any]


class Pair:
    """`run(function, *args)` calls it on both ranks; functions must be importable by name."""

    def __init__(self) -> None:
        # Ranks are forked from a process that has imported what they need, once for all of them.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.distributed.sharded_models"])
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Function, *args: Any, seconds: float = 120.0) -> list[Any]:
        """The results by rank; the test fails with the traceback of a rank that raised."""
        answers = self.outcomes(function, *args, seconds=seconds)
        failed = [f"rank {rank}: {a}" for rank, (good, a) in enumerate(answers) if not good]
        if failed:
            self.close()
            pytest.fail("\n".join(failed), pytrace=False)
        return [answer for _, answer in answers]

    def outcomes(
        self, function: Function, *args: Any, seconds: float = 120.0
    ) -> list[tuple[bool, Any]]:
        """By rank: (True, its result), or (False, why there is none)."""
        if not all(process.is_alive() for process, _ in self._ranks):
            self.close()
        if not self._ranks:
            self._start()
        answers: list[tuple[bool, Any]] = []
        try:
            for _, connection in self._ranks:
                connection.send((function, args))
            end = time.monotonic() + seconds
            answers = [self._answer(*rank, end, seconds) for rank in self._ranks]
        finally:
            # A rank that has not answered would answer the next request with it.
            if not answers or any(process.exitcode is not None for process, _ in self._ranks):
                self.close()
        return answers

    def close(self) -> None:
        """End the processes that this has started."""
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        store = Path(tempfile.mkdtemp(prefix="fqcompile-ranks-")) / "store"
        for rank in range(SIZE):
            ours, theirs = self._context.Pipe()
            arguments = (theirs, rank, str(store))
            process = self._context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        for step in ("import", "join"):
            end = time.monotonic() + START_SECONDS
            for rank in self._ranks:
                good, answer = self._answer(*rank, end, START_SECONDS)
                if not good:
                    self.close()
                    pytest.fail(f"the ranks do not start ({step}): {answer}", pytrace=False)
            for _, connection in self._ranks:
                connection.send(None)

    def _answer(
        self, process: Any, connection: Connection, end: float, seconds: float
    ) -> tuple[bool, Any]:
        try:
            if connection.poll(max(0.0, end - time.monotonic())):
                answer: tuple[bool, Any] = connection.recv()
                return answer
            process.kill()
            reason = f"no answer in {seconds} s"
        except (EOFError, ConnectionError):
            reason = "the process ended"
        process.join()
        return False, reason


def _serve(connection: Connection, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ[TIMEOUT] = str(COLLECTIVE_SECONDS)
    connection.send((True, "imported"))  # the others may need longer, and joining has a limit
    connection.recv()
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=SIZE,
        store=dist.FileStore(store, SIZE),
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    connection.send((True, "joined"))
    connection.recv()
    while True:
        function, args = connection.recv()
        torch._dynamo.reset()
        clear_reports()
        torch.manual_seed(0)
        try:
            connection.send((True, function(*args)))
        except BaseException:  # pytest's own failures are no Exceptions
            connection.send((False, traceback.format_exc()))
