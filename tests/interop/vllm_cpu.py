"""What vLLM for CPUs makes of checkpoints; run by the Python of .venv-engines, without fqcompile.

    python vllm_cpu.py TASKS.json

A task is {"directory", "out"} to load, with "prompts" to continue too. Each runs in a forked child,
which writes `out`.safetensors, the parameters as vLLM's own loader has filled them, and `out`.json:
{"error"}, or {"tokens", "logprobs"} of a greedy continuation of each prompt.

With "amx", true or false, vLLM takes the processor to have AMX or not, as experts need it. It then
loads weights and does not pack them for kernels that may not run here.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_INT4_W4A8="0",  # activations as they are, where the processor has AMX
)

import torch
from safetensors.torch import save_file
from vllm import LLM, EngineArgs, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import base_loader
from vllm.v1.worker.cpu_worker import CPUWorker

TOKENS = 12
ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "disable_log_stats": True,
}


def run(task: dict[str, Any]) -> dict[str, Any]:
    process, amx = base_loader.process_weights_after_loading, task.get("amx")
    if amx is not None:
        torch.cpu._is_amx_tile_supported = lambda: amx

    def keep(model: Any, *rest: Any) -> None:
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, Path(task["out"]).with_suffix(".safetensors"))
        if not amx:
            process(model, *rest)

    base_loader.process_weights_after_loading = keep
    if "prompts" in task:
        return generate(task["directory"], task["prompts"])
    config = EngineArgs(task["directory"], **ENGINE).create_engine_config()
    with set_current_vllm_config(config):
        worker = CPUWorker(config, 0, 0, f"file://{task['out']}.rank", is_driver_worker=True)
        worker.init_device()
        worker.load_model()
    return {}


def generate(directory: str, prompts: list[list[int]]) -> dict[str, Any]:
    engine = LLM(directory, **ENGINE)
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, detokenize=False)
    found = [
        result.outputs[0]
        for result in engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    ]
    return {
        "tokens": [list(one.token_ids) for one in found],
        "logprobs": [
            [of[token].logprob for token, of in zip(one.token_ids, one.logprobs, strict=True)]
            for one in found
        ],
    }


def answer(task: dict[str, Any]) -> None:
    try:
        found = run(task)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    Path(task["out"]).with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    for task in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        child = os.fork()
        if not child:
            answer(task)
            os._exit(0)
        os.waitpid(child, 0)
