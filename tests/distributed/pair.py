"""Pair: two processes that are the ranks of a gloo group, and run functions on request.

They live from the first request to the last, as importing and joining takes longer than most cases.
After a failure, in which a rank may wait for the other, both are ended and the next request starts
new ones. Nothing waits without a limit.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fqcompile.distributed.agreement import TIMEOUT
from fqcompile.report import clear_reports

SIZE = 2
COLLECTIVE_SECONDS = 60.0
Function = Callable[..., Any]


class Pair:
    """`run(function, *args)` calls it on both ranks; functions must be importable by name."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
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
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((function, args))
        return [self._answer(*rank, seconds) for rank in self._ranks]

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

    def _answer(self, process: Any, connection: Connection, seconds: float) -> tuple[bool, Any]:
        try:
            if connection.poll(seconds):
                answer: tuple[bool, Any] = connection.recv()
                return answer
            process.kill()
            return False, f"no answer in {seconds} s"
        except EOFError:
            return False, "the process ended"


def _serve(connection: Connection, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ[TIMEOUT] = str(COLLECTIVE_SECONDS)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=SIZE,
        store=dist.FileStore(store, SIZE),
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    while True:
        function, args = connection.recv()
        torch._dynamo.reset()
        clear_reports()
        torch.manual_seed(0)
        try:
            connection.send((True, function(*args)))
        except BaseException:  # pytest's own failures are no Exceptions
            connection.send((False, traceback.format_exc()))
