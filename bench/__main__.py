"""`python -m bench` lists the benchmarks; each is a module of its own."""

BENCHMARKS = {
    "bench.quantize": "how fast weights are quantised and dequantised, and with how much memory",
    "bench.granularity": "quality of the granularity rules against fixed groups, real weights",
    "bench.overhead": "share of fqcompile's passes in the whole compilation of a small Llama",
}

if __name__ == "__main__":
    for name, text in BENCHMARKS.items():
        print(f"python -m {name:18}  {text}")
