"""Reports of models of real size, made up site by site, and one whose every text bites."""

import math

from fqcompile.report import CompileReport, PassRecord, Plan, Site

ROLES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
GROUPS = (16, 32, 64, 128, 256, 1 << 20)
BITE = f"<script>bitten = 1</script><img src=x onerror='bitten = 2'>\"'><b>&amp;{'w' * 120}"


def quantized(
    name: str,
    shape: tuple[int, ...],
    bits: int,
    group: int,
    error: float,
    *,
    kernel: str = "dequant_gemm 16x64x64x1w4s3",
    expert_errors: tuple[float, ...] | None = None,
) -> Site:
    """A site as the passes would report it, with fp16 weights and scales."""
    weights, k = math.prod(shape), shape[-1]
    group = min(group, k)
    nbytes = weights * bits // 8 + 2 * weights // k * math.ceil(k / group)
    return Site(
        name=name,
        kind="linear" if len(shape) == 2 else "experts",
        shape=shape,
        status="quantized",
        bits=bits,
        group_size=group,
        bytes_before=2 * weights,
        bytes_after=nbytes,
        relative_error=error,
        kernel=kernel,
        least_us=nbytes / 1e6,
        expert_errors=expert_errors,
    )


def kept(name: str, shape: tuple[int, ...], reason: str) -> Site:
    nbytes = 2 * math.prod(shape)
    return Site(
        name=name,
        kind="linear",
        shape=shape,
        status="kept",
        reason=reason,
        bytes_before=nbytes,
        bytes_after=nbytes,
    )


def _report(sites: list[Site], options: dict[str, object]) -> CompileReport:
    before = "def forward(self, x, w):\n    y = linear(x, w)\n    return y\n"
    after = before.replace("linear", "torch.ops.fqcompile.matmul")
    passes = (
        PassRecord("capture", 0.2, len(sites), tuple(s.name for s in sites), None, before),
        PassRecord("plan", 3.25, len(sites), (), before, before),
        PassRecord("rewrite", 0.05, 1, ("linear",), before, after),
    )
    versions = {"fqcompile": "0.1.0", "torch": "2.13.0"}
    return CompileReport("graph_0", Plan(tuple(sites), options), passes, (), versions, 5.0)


def llama_8b() -> CompileReport:
    """224 matrices of 32 layers, a head in eight bits, an embedding that is kept."""
    sites = []
    for layer in range(32):
        for at, (role, shape) in enumerate(ROLES.items()):
            group = GROUPS[(3 * layer + 5 * at + layer * at) % len(GROUPS)]
            error = 0.06 + 0.004 * GROUPS.index(group) + 0.0005 * ((7 * layer + at) % 11)
            bits = 8 if layer in (0, 31) and role == "mlp.down_proj" else 4
            name = f"model.layers.{layer}.{role}.weight"
            sites.append(quantized(name, shape, bits, group, error * (1 if bits == 4 else 0.07)))
    sites.append(quantized("lm_head.weight", (128256, 4096), 8, 4096, 0.0062, kernel="int8_gemv"))
    sites.append(
        kept("model.embed_tokens.weight", (128256, 4096), "embedding table: not quantized")
    )
    return _report(sites, {"bits": 4, "granularity": "range"})


def mixtral() -> CompileReport:
    """Eight layers of attention, eight experts each, and routers that are kept."""
    sites = []
    for layer in range(8):
        for at, role in enumerate(("q_proj", "o_proj")):
            group = GROUPS[(layer + at) % len(GROUPS)]
            error = 0.08 + 0.001 * layer
            name = f"model.layers.{layer}.self_attn.{role}.weight"
            sites.append(quantized(name, (4096, 4096), 8 if layer % 3 else 4, group, error))
        for at, (role, shape) in enumerate(
            {"gate_up_proj": (8, 28672, 4096), "down_proj": (8, 4096, 14336)}.items()
        ):
            errors = tuple(0.07 + 0.001 * ((5 * layer + 3 * i + at) % 17) for i in range(8))
            name = f"model.layers.{layer}.mlp.experts.{role}"
            mean = sum(errors) / 8
            sites.append(quantized(name, shape, 4, 64, mean, expert_errors=errors))
        sites.append(
            kept(f"model.layers.{layer}.mlp.gate.weight", (8, 4096), "router: its top-k decides")
        )
    return _report(sites, {"bits": 4, "granularity": "adaptive"})


def biting() -> CompileReport:
    """Three sites; every text that can come from outside would run, were it not escaped."""
    sites = [
        quantized(f"layers.0.{BITE}.weight", (64, 64), 4, 32, 0.08, kernel=BITE),
        quantized(BITE, (64, 64), 8, 64, 0.006, kernel="x86_stream"),
        kept(f"layers.1.{BITE}", (3, 5), BITE),
    ]
    graph = f"x = 1\n{BITE}\n"
    passes = (PassRecord(BITE, 0.1, 1, (BITE,), graph, f"{graph}{BITE}{BITE}\n"),)
    plan = Plan(tuple(sites), {BITE: BITE, "bits": 8})
    return CompileReport(BITE, plan, passes, (BITE,), {BITE: BITE}, 0.1)
