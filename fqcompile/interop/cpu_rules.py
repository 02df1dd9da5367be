"""Rules on layers that vLLM is to run on a CPU: one kernel for linears, and few for experts.

Facts of vLLM 0.32, in vllm/model_executor:
- kernels/linear/mixed_precision/cpu.py, CPUWNA16LinearKernel.can_implement: uint4 and uint4b8
  alone, even group sizes, K and N on each device multiples of 32.
- layers/fused_moe/oracle/int_wna16.py, _get_priority_backends: ZEN_CPU and CPU alone; then
  layers/fused_moe/experts/cpu_moe.py, CPUExpertsInt4: int4, on x86 with AMX; and
  experts/zentorch_moe.py, ZentorchExpertsInt4: int4 in groups, where zentorch is installed.
vLLM was seen to stop so: "No WNA16 MoE backend supports the deployment configuration".
"""

from collections.abc import Iterator, Mapping, Sequence

from fqcompile.interop.findings import Finding, Subject
from fqcompile.interop.layers import Layer, is_split_along_k, is_split_along_n, stack_of

_BITS, _MULTIPLE = 4, 32
_ON_GPU = "serve it on a GPU"


def cpu_rules(subject: Subject, linears: Mapping[str, Sequence[Layer]]) -> Iterator[Finding]:
    """All findings that are about the CPU; `linears`: the parts of each as the engine has them."""
    if subject.engine != "vllm" or subject.device != "cpu":
        return
    for parts in linears.values():
        if parts[0].scheme is not None:
            yield from _linear(subject, parts)
    stacks: dict[str, Layer] = {}
    for layer in subject.packed:
        stack = stack_of(layer.name)
        if stack is not None:
            stacks.setdefault(stack, layer)
    for stack, layer in stacks.items():
        yield _experts(subject, stack, layer)


def _linear(subject: Subject, parts: Sequence[Layer]) -> Iterator[Finding]:
    names, scheme = [layer.name for layer in parts], parts[0].scheme
    assert scheme is not None
    if scheme.bits != _BITS:
        yield subject.finding(
            "cpu-bits", "refused", names, f"{scheme} has no kernel on a CPU, which takes 4 bits",
            f"quantize to 4 bits, or {_ON_GPU}",
        )  # fmt: skip
        return
    if scheme.group_size is not None and scheme.group_size % 2:
        yield subject.finding(
            "cpu-group-size", "refused", names, f"group {scheme.group_size} is odd",
            "repeat the scales to an even group size",
        )  # fmt: skip
    k, n = parts[0].k, sum(layer.n for layer in parts)
    if is_split_along_k(names[0]):
        k //= subject.tp
    elif is_split_along_n(names[0]):
        n //= subject.tp
    if k % _MULTIPLE or n % _MULTIPLE:
        yield subject.finding(
            "cpu-shape", "refused", names,
            f"{n} x {k} on each device are no multiples of {_MULTIPLE}, as a CPU's kernel needs",
            f"leave the layer dense, or {_ON_GPU}",
        )  # fmt: skip


def _experts(subject: Subject, stack: str, layer: Layer) -> Finding:
    scheme = layer.scheme
    assert scheme is not None
    where = (
        "experts of 4 bits run on x86 CPUs with AMX, or with zentorch, alone"
        if scheme.bits == _BITS
        else f"experts of {scheme} have no kernel on a CPU"
    )
    return subject.finding(
        "cpu-experts", "refused", [stack], where,
        f"{_ON_GPU}, or leave experts dense (--exclude experts)",
    )  # fmt: skip
