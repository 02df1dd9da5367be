"""What SGLang's loader makes of checkpoints; run by the Python of .venv-engines, without fqcompile.

    python sglang_cpu.py TASKS.json

A task is {"directory", "out"}. Each is loaded in a forked child, on the CPU and as if for a GPU of
compute capability 8.0, which writes `out`.safetensors, the parameters as SGLang's own loader has
filled them, and `out`.json: {} or {"error"}. Nothing is packed for kernels, which are CUDA's.
"""
# ruff: noqa: E402

import importlib.abc
import importlib.machinery
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """For what SGLang imports and does not use here; torchvision needs a torch for GPUs."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        wanted = name.split(".")[0] in ("IPython", "gguf", "torchvision")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MagicMock(name=spec.name, __spec__=spec, __path__=[], __version__="0")

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.insert(0, StandIns())
torch.cuda.get_device_capability = lambda *_: (8, 0)

from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import parallel_state
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs

import_module("sglang.srt.models.registry")  # all models: 4 seconds, here not in each child


def load(directory: str, out: Path) -> None:
    args = ServerArgs(directory, device="cpu", skip_tokenizer_init=True)
    publish(args, role="test", ranks=SpawnRanks(world_rank=0))
    parallel_state.init_distributed_environment(
        world_size=1, rank=0, local_rank=0, backend="gloo",
        distributed_init_method=f"file://{out}.rank",
    )  # fmt: skip
    parallel_state.initialize_model_parallel(backend="gloo")
    DefaultModelLoader.postprocess_weights = lambda *_: None
    model = DefaultModelLoader(LoadConfig()).load_model(
        model_config=ModelConfig.from_server_args(args), device_config=DeviceConfig("cpu")
    )
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, out.with_suffix(".safetensors"))


def answer(task: dict[str, str]) -> None:
    out, found = Path(task["out"]), {}
    try:
        load(task["directory"], out)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    out.with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    for task in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        child = os.fork()
        if not child:
            answer(task)
            os._exit(0)
        os.waitpid(child, 0)
