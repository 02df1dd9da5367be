"""Rules on single linear layers, on those that an engine fuses into one, and on all on a CPU."""

from collections.abc import Iterator, Sequence

from fqcompile.interop.findings import Effect, Finding, Subject
from fqcompile.interop.layers import (
    BITS,
    GROUP_SIZES,
    Layer,
    fused_name,
    is_embedding,
    is_head,
    is_router,
    is_split_along_k,
    is_split_along_n,
    last,
    stack_of,
)
from fqcompile.interop.quantization_config import find_match, is_class, is_ignored

# What the fastest CUDA kernel takes without filling up with zeros.
_TILE_K, _TILE_N = 128, 64


def layer_rules(subject: Subject) -> Iterator[Finding]:
    """All findings about linear layers."""
    for layer in subject.packed:
        yield from _format(subject, layer)
        yield from _place(subject, layer)
        yield from _shards(subject, layer)
    for name, parts in _engine_layers(subject).items():
        found = _fused(subject, parts) or _matched(subject, name, parts)
        if found is not None:
            yield found


def _engine_layers(subject: Subject) -> dict[str, list[Layer]]:
    """The linear layers as the engine has them, with their parts; experts are not among them."""
    linears = [layer for layer in subject.layers if stack_of(layer.name) is None]
    names = {layer.name for layer in linears}
    found: dict[str, list[Layer]] = {}
    for layer in linears:
        fuses = subject.engine != "transformers"
        found.setdefault(fused_name(layer.name, names) if fuses else layer.name, []).append(layer)
    return found


def _format(subject: Subject, layer: Layer) -> Iterator[Finding]:
    scheme = layer.scheme
    assert scheme is not None
    if scheme.bits not in BITS:
        yield subject.finding(
            "bits", "refused", [layer.name], f"{scheme} has no kernel", "quantise to 4 or 8 bits"
        )
    size = scheme.group_size
    if size is not None and layer.k % size:
        yield subject.finding(
            "group-divides-k", "refused", [layer.name], f"K = {layer.k} is no multiple of {size}",
            f"repeat the scales to a group size that divides {layer.k}",
        )  # fmt: skip
    if size is not None and size not in GROUP_SIZES and subject.has_gpu_kernels:
        yield subject.finding(
            "group-size", "refused", [layer.name],
            f"group {size} has no kernel: they take {', '.join(map(str, GROUP_SIZES))} or channel",
            f"repeat the scales to {max((g for g in GROUP_SIZES if not size % g), default=32)}",
        )  # fmt: skip
    if not scheme.symmetric and scheme.bits == 8 and subject.engine != "transformers":
        yield subject.finding(
            "asymmetric", "refused", [layer.name], "int8 with zero points has no kernel",
            "quantise symmetrically",
        )  # fmt: skip


def _place(subject: Subject, layer: Layer) -> Iterator[Finding]:
    """Layers that engines keep dense."""
    if is_embedding(layer.name):
        yield subject.finding(
            "embedding", "refused", [layer.name], "embeddings are looked up, not multiplied",
            "leave it dense, and name it in ignore",
        )  # fmt: skip
    elif is_head(layer.name) and subject.tied:
        yield subject.finding(
            "tied-head", "wrong", [layer.name],
            "the config ties the head to the embedding, whose dense values it then gets",
            "leave the head dense, or set tie_word_embeddings to false",
        )  # fmt: skip
    elif is_router(layer.name) and subject.engine != "transformers":
        yield subject.finding(
            "router", "refused", [layer.name], "routers of experts are built dense",
            "leave it dense, and name it in ignore",
        )  # fmt: skip


def _shards(subject: Subject, layer: Layer) -> Iterator[Finding]:
    """What tensor parallelism leaves of the layer on each device, and the kernels for that."""
    scheme, tp = layer.scheme, subject.tp
    assert scheme is not None
    if subject.engine == "transformers" or stack_of(layer.name) is not None:
        return
    k, n = layer.k, layer.n
    if is_split_along_k(layer.name):
        k, rest = divmod(k, tp)
        if rest or k % (scheme.group_size or scheme.codes_per_word):
            yield tp_finding(subject, layer.name, layer.k, scheme.group_size)
            return
    elif is_split_along_n(layer.name):
        n, rest = divmod(n, tp)
        if rest:
            yield subject.finding(
                "tp-splits-n", "refused", [layer.name], 
                f"N = {layer.n} is no multiple of --tp {tp}",
                "take another degree of tensor parallelism",
            )  # fmt: skip
            return
    if k % scheme.codes_per_word:
        yield subject.finding(
            "words", "refused", [layer.name],
            f"K = {k} is no multiple of {scheme.codes_per_word}, the codes in a word",
            "leave the layer dense",
        )  # fmt: skip
    elif subject.has_gpu_kernels and (k % _TILE_K or n % _TILE_N):
        yield subject.finding(
            "tile", "slow", [layer.name],
            f"{n} x {k} on each device is filled up to multiples of {_TILE_N} x {_TILE_K}",
            "take a smaller --tp" if tp > 1 else "none: it is the layer's shape",
        )  # fmt: skip


def tp_finding(
    subject: Subject, name: str, k: int, size: int | None, experts: bool = False
) -> Finding:
    """K, split over devices, breaks a group."""
    tp = subject.tp
    each = f"{k // tp} on each of {tp} devices" if k % tp == 0 else f"no multiple of {tp} devices"
    fits = max((g for g in GROUP_SIZES if k % tp == 0 and (k // tp) % g == 0), default=None)
    other = f"a smaller --tp{' or expert parallelism' if experts else ''}"
    unit = f"group {size}" if size is not None else "the codes in a word"
    return subject.finding(
        "tp-splits-groups", "refused", [name], f"K = {k} is {each}, no multiple of {unit}",
        f"repeat the scales to group {fits}, or take {other}" if fits else f"take {other}",
    )  # fmt: skip


def _fused(subject: Subject, parts: Sequence[Layer]) -> Finding | None:
    """Parts of one fused layer must be alike."""
    names = [layer.name for layer in parts]
    schemes = {layer.scheme for layer in parts}
    if len(schemes) == 1:
        return None
    kinds = ", ".join(f"{last(p.name)} {p.scheme or 'dense'}" for p in parts)
    effect: Effect = "refused" if None in schemes else "wrong"
    takes = "an error" if effect == "refused" else "the scheme of the first is taken for all"
    return subject.finding(
        "fused-parts", effect, names, f"one fused layer of different schemes ({kinds}): {takes}",
        "give all of them one scheme: scales can be repeated and int4 codes stored as int8 without "
        "loss",
    )  # fmt: skip


def _matched(subject: Subject, name: str, parts: Sequence[Layer]) -> Finding | None:
    """The config must lead the engine to the scheme that is stored."""
    names, stored = [layer.name for layer in parts], parts[0].scheme
    if stored is None and (is_head(name) or is_router(name)):
        return None  # built dense by the engines, whatever matches
    ignored = {is_ignored(subject.config, part, subject.engine) for part in names}
    match = find_match(subject.config, name, names if len(names) > 1 else (), subject.engine)
    if ignored == {True, False}:
        return subject.finding(
            "ignored-parts", "refused", names, "parts of one fused layer are ignored, others not",
            "name all of them in ignore, or none",
        )  # fmt: skip
    if match.ignored or ignored == {True}:
        if stored is None:
            return None
        return subject.finding(
            "ignored",
            "refused",
            names,
            "it is packed, and ignore names it",
            "take it out of ignore",
        )
    if match.group is None:
        if stored is None:
            return _unlisted(subject, names)
        return subject.finding(
            "no-target", "refused", names, "it is packed, and no target matches it",
            "add a regular expression that also matches the fused name",
        )  # fmt: skip
    if stored is None:
        return subject.finding(
            "not-ignored", "refused", names, 
            f"it is dense, and target {match.pattern!r} matches it",
            "name it in ignore",
        )  # fmt: skip
    if match.group.scheme != stored:
        by_class = match.pattern is not None and is_class(match.pattern)
        return subject.finding(
            "class-target" if by_class else "other-target", "wrong", names,
            f"target {match.pattern!r} gives it {match.group.scheme}, and {stored} is stored",
            "write regular expressions that end in $ and match the fused name, not class names",
        )  # fmt: skip
    return None


def _unlisted(subject: Subject, names: Sequence[str]) -> Finding | None:
    if subject.engine != "sglang":
        return None
    return subject.finding(
        "unlisted", "refused", names, "it is dense, and neither a target nor ignore names it",
        "name it in ignore",
    )  # fmt: skip


# One kernel for linears on a CPU, and few for experts. Facts of vLLM 0.32, in vllm/model_executor:
# - kernels/linear/mixed_precision/cpu.py, CPUWNA16LinearKernel.can_implement: uint4 and uint4b8
#   alone, even group sizes, K and N on each device multiples of 32.
# - layers/fused_moe/oracle/int_wna16.py, _get_priority_backends: ZEN_CPU and CPU alone; then
#   layers/fused_moe/experts/cpu_moe.py, CPUExpertsInt4: int4, on x86 with AMX; and
#   experts/zentorch_moe.py, ZentorchExpertsInt4: int4 in groups, where zentorch is installed.
# vLLM was seen to stop so: "No WNA16 MoE backend supports the deployment configuration".
_CPU_BITS, _CPU_MULTIPLE = 4, 32
_ON_GPU = "serve it on a GPU"


def cpu_rules(subject: Subject) -> Iterator[Finding]:
    """All findings that are about the CPU."""
    if subject.engine != "vllm" or subject.device != "cpu":
        return
    for parts in _engine_layers(subject).values():
        if parts[0].scheme is not None:
            yield from _linear_on_cpu(subject, parts)
    stacks: dict[str, Layer] = {}
    for layer in subject.packed:
        stack = stack_of(layer.name)
        if stack is not None:
            stacks.setdefault(stack, layer)
    for stack, layer in stacks.items():
        yield _experts_on_cpu(subject, stack, layer)


def _linear_on_cpu(subject: Subject, parts: Sequence[Layer]) -> Iterator[Finding]:
    names, scheme = [layer.name for layer in parts], parts[0].scheme
    assert scheme is not None
    if scheme.bits != _CPU_BITS:
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
    if k % _CPU_MULTIPLE or n % _CPU_MULTIPLE:
        yield subject.finding(
            "cpu-shape", "refused", names,
            f"{n} x {k} on each device are no multiples of {_CPU_MULTIPLE}, as a CPU's kernel "
            "needs",
            f"leave the layer dense, or {_ON_GPU}",
        )  # fmt: skip


def _experts_on_cpu(subject: Subject, stack: str, layer: Layer) -> Finding:
    scheme = layer.scheme
    assert scheme is not None
    where = (
        "experts of 4 bits run on x86 CPUs with AMX, or with zentorch, alone"
        if scheme.bits == _CPU_BITS
        else f"experts of {scheme} have no kernel on a CPU"
    )
    return subject.finding(
        "cpu-experts", "refused", [stack], where,
        f"{_ON_GPU}, or leave experts dense (--exclude experts)",
    )  # fmt: skip
