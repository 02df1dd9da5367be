"""`python -m bench` lists the benchmarks, `python -m bench NAME ...` runs one."""

import sys
from importlib import import_module

BENCHMARKS = {
    "accuracy": "what quantization costs trained language models, ours and other libraries",
    "draws": "what 4 bits cost Gemma 3 270M, MiniLM and small models, calibrated and not",
    "levels": "derives the 16 normal levels, and what other levels would lose",
    "train_lm": "trains the small language models of the accuracy benchmark, once",
    "expert_decode": "a CPU: decoding through a layer of experts, against Inductor on it",
    "decode_attention": "a CPU: attention of one query, against Inductor and reading K and V once",
    "startup": "the first start of a model and the second, part by part",
    "memory": "peak and resident memory of each way to run a model in 4 bits, against bf16",
    "export": "speed and memory of exporting to compressed-tensors, codes compared",
    "static": "registers, copies and instructions of the Triton kernels, read from machine code",
    "experts": "a GPU: a layer of experts, routing included, against torch._grouped_mm in 16 bits",
    "kernels": "our kernels against dense ones, torch.compile and other libraries, by layer",
    "models": "decoding and prefill of whole models, random weights: time and ideal",
    "planner": "how far the planner's predictions are from all results",
    "launch_overhead": "Python's time in one call of the operator, against Triton's own launcher",
    "gpu": "fifteen minutes of a GPU: is it right, how fast, what is the fastest; in two parts",
    "short": "what `make bench` runs: each of the above on a small case, 10 minutes on 2 cores",
    "readme": "writes the README's tables, and docs/results.md, from the results",
}
# Below `bench`, where it is not the `run` of a folder of the benchmark's name.
MODULES = {
    "draws": "accuracy.draws",
    "levels": "accuracy.levels",
    "train_lm": "accuracy.train_lm",
    "expert_decode": "experts.decode",
    "startup": "start.startup",
    "memory": "start.memory",
    "gpu": "gpu",
    "short": "short",
    "readme": "readme",
}


def module_of(name: str) -> str:
    return f"bench.{MODULES.get(name, f'{name}.run')}"


def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    if name in BENCHMARKS:
        sys.argv = [f"python -m bench {name}", *arguments]
        module, errors = import_module(module_of(name)), import_module("fqcompile.errors")
        try:
            module.main()
        except errors.FineQuantError as error:
            raise SystemExit(f"bench {name}: {error}") from error
        return
    for known, text in BENCHMARKS.items():
        print(f"python -m bench {known:15} {text}")
    if name not in ("", "-h", "--help"):
        raise SystemExit(f"no benchmark is called {name!r}")


if __name__ == "__main__":
    main()
