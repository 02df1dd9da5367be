"""A Triton driver for machines without a GPU: kernels are compiled and bound, never launched."""

from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from fqcompile.kernels.spec import H200


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


def install() -> StubDriver:
    """Make Triton use it in this process from now on.

    It is one for all: a kernel that was compiled before keeps the launcher of its driver.
    """
    driver.set_active(_STUB)
    return _STUB
