"""Weights to draw: shapes with odd and tiny sides, several distributions, each dtype, views."""

import torch
from hypothesis import strategies as st

from fqcompile.tensor.format import QTYPES, QType

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SCALE_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
METHODS = ["mse", "absmax"]
KINDS = ["gaussian", "heavy", "outlier", "zero rows", "equal", "integers", "tiny"]


def matrix(kind: str, n: int, k: int, seed: int = 0) -> torch.Tensor:
    """A float32 matrix [n, k] of one of KINDS."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    if kind == "heavy":
        return w.sign() * w.abs() ** 3
    if kind == "outlier":
        w[n // 2, k // 3] = 1000.0
    elif kind == "zero rows":
        w[::2] = 0
    elif kind == "equal":
        return w[:, :1].expand(n, k).clone()
    elif kind == "integers":
        return torch.randint(-8, 8, (n, k), generator=generator).float()
    elif kind == "tiny":
        return w * 1e-6
    return w


@st.composite
def matrices(draw: st.DrawFn, max_n: int = 9, max_k: int = 150) -> torch.Tensor:
    """A matrix of any kind and dtype, contiguous, transposed or a strided view."""
    kind = draw(st.sampled_from(KINDS), label="kind")
    n = draw(st.integers(1, max_n), label="n")
    k = draw(st.integers(1, max_k), label="k")
    seed = draw(st.integers(0, 2**16), label="seed")
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]), label="layout")
    w = matrix(kind, n, k, seed).to(dtype)
    if layout == "transposed":
        return w.t().contiguous().t()
    if layout == "strided":
        return torch.stack([w, w], dim=-1)[..., 0]
    return w


qtypes: st.SearchStrategy[QType] = st.sampled_from(list(QTYPES.values()))
group_sizes = st.sampled_from([1, 2, 3, 7, 32, 50, 64, 128])
