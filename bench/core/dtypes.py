"""The types that activations have in the benchmarks, by the names that the command line has."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
