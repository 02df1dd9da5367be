"""Whether this GPU's matrix units keep subnormal numbers, which our fastest conversion relies on.

    python -m bench subnormals

Every code of int4 and int8 goes through them as fp16 and as bf16, and must come out exactly.
"""

from collections.abc import Sequence

import torch

from fqcompile.errors import FineQuantError
from fqcompile.kernels.gpu import gpu_of
from fqcompile.kernels.triton.target import conversion, keeps_subnormals


def main(argv: Sequence[str] | None = None) -> None:
    device = torch.device("cuda")
    try:
        gpu = gpu_of(device)
    except FineQuantError as error:
        raise SystemExit(f"bench subnormals: {error}") from error
    print(f"{gpu.name}, {gpu.arch}")
    kept = {}
    for dtype in (torch.float16, torch.bfloat16):
        kept[dtype] = keeps_subnormals(device, dtype)
        found = "exact" if kept[dtype] else "LOST"
        print(f"{dtype}: subnormal codes {found}, conversion {conversion(device, dtype)!r}")
    if not all(kept.values()):
        raise SystemExit("subnormal codes are lost: another conversion is used, which is slower")


if __name__ == "__main__":
    main()
