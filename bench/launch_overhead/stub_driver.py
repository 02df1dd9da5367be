"""A Triton driver for machines without a GPU: kernels are compiled and bound, never launched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from fqcompile.kernels.spec import H200
from fqcompile.kernels.triton import launch, target
from fqcompile.kernels.triton.dependent_launch import EARLY


class _Utils:
    """What `CompiledKernel` asks of the device's library."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": H200.shared_bytes, "multiprocessor_count": H200.num_sms}

    def load_binary(self, *arguments: object) -> tuple[int, int, int, int, int]:
        # Module, function, registers, spills, most threads. Without a module it is loaded again.
        return (1, 1, 0, 0, 1024)


class StubDriver(DriverBase):  # type: ignore[misc]
    """An H200 whose launcher does nothing; `launches` counts how often it did."""

    def __init__(self) -> None:
        self.utils = _Utils()
        self.launches = 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launches += 1

        return launch

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", H200.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here, so nothing can be timed")


_STUB = StubDriver()


@contextmanager
def as_on_an_h200() -> Iterator[StubDriver]:
    """Inside, our kernels are launched as there, with tensors of main memory.

    Triton uses the stub from then on. It is one for all: a kernel that was compiled before keeps
    the launcher of its driver.
    """
    driver.set_active(_STUB)
    # The probe would run a kernel. Its answer is kept for each device and type, as on a GPU.
    kept = patch.object(target, "keeps_subnormals", lambda device, dtype: True)
    early = patch.object(launch, "early_launch", cache(lambda device: EARLY))
    with kept, early, torch.no_grad():
        yield _STUB
