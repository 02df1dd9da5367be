"""Rules for single linear layers, for layers that an engine fuses, and for serving on a CPU."""

from collections.abc import Iterator, Sequence

from fqcompile.interop.findings import Effect, Finding, Rule, Subject
from fqcompile.interop.layers import (
    BITS,
    GROUP_SIZES,
    Layer,
    Scheme,
    fused_name,
    is_embedding,
    is_head,
    is_router,
    is_split_along_k,
    is_split_along_n,
    last,
    part_order,
    served_rows,
    stack_of,
)
from fqcompile.interop.quantization_config import find_match, is_class, is_ignored

# Tile sizes that the fastest CUDA kernel accepts without zero padding.
_TILE_K, _TILE_N = 128, 64
# One kernel for linears on a CPU, and few for experts. Facts of vLLM 0.32, in vllm/model_executor:
# - kernels/linear/mixed_precision/cpu.py, CPUWNA16LinearKernel.can_implement: uint4 and uint4b8
#   alone, even group sizes, K and N on each device multiples of 32.
# - layers/fused_moe/oracle/int_wna16.py, _get_priority_backends: ZEN_CPU and CPU alone; then
#   layers/fused_moe/experts/cpu_moe.py, CPUExpertsInt4: int4, on x86 with AMX; and
#   experts/zentorch_moe.py, ZentorchExpertsInt4: int4 in groups, where zentorch is installed.
#   Neither takes zero points, and CompressedTensorsWNA16MoEMethod asserts groups for both.
# vLLM's error then: "No WNA16 MoE backend supports the deployment configuration".
_CPU_BITS, _CPU_MULTIPLE = 4, 32
_ON_GPU = "serve it on a GPU"
# Model types whose classes in SGLang 0.5.23 have no packed_modules_mapping: a layer that these fuse
# is looked up by its own name alone, in targets and in ignore.
_OWN_NAME_ALONE = frozenset(
    """cohere glm4 glm4_moe gpt_oss granite llama mistral mixtral olmo2 olmoe qwen2 qwen2_moe qwen3
    stablelm starcoder2""".split()
)
_LEAVE = "leave it dense, and name it in ignore"
_ALIKE = (
    "give all of them one scheme: scales can be repeated and int4 codes stored as int8 without loss"
)


def layer_rules(subject: Subject) -> Iterator[Finding]:
    """All findings about linear layers."""
    for layer in subject.packed:
        yield from subject.broken([layer.name], _format(subject, layer))
        yield from subject.first_broken([layer.name], _place(subject, layer))
        if subject.serves and stack_of(layer.name) is None:
            yield from subject.first_broken([layer.name], _shards(subject, layer))
    for name, parts in _engine_layers(subject).items():
        names = [layer.name for layer in parts]
        unlike = list(subject.first_broken(names, _fused(subject, parts)))
        yield from unlike or subject.first_broken(names, _matched(subject, name, parts))


def _engine_layers(subject: Subject) -> dict[str, list[Layer]]:
    """The linear layers as the engine fuses them, with their parts in its order; no experts."""
    linears = [layer for layer in subject.layers if stack_of(layer.name) is None]
    names = {layer.name for layer in linears}
    found: dict[str, list[Layer]] = {}
    for layer in linears:
        name = fused_name(layer.name, names) if subject.serves else layer.name
        found.setdefault(name, []).append(layer)
    return {name: sorted(parts, key=part_order) for name, parts in found.items()}


def _format(subject: Subject, layer: Layer) -> list[Rule]:
    scheme, k = layer.scheme, layer.k
    assert scheme is not None
    size = scheme.group_size
    finer = max((g for g in GROUP_SIZES if size and not size % g), default=32)
    return [
        ("bits", "refused", subject.serves and scheme.bits not in BITS,
         f"{scheme} has no kernel", "quantize to 4 or 8 bits"),
        ("group-divides-k", "refused", size and k % size,
         f"K = {k} is not a multiple of {size}",
         f"repeat the scales to a group size that divides {k}"),
        ("group-size", "refused", size and size not in GROUP_SIZES and subject.has_gpu_kernels,
         f"group {size} has no kernel: they take {', '.join(map(str, GROUP_SIZES))} or channel",
         f"repeat the scales to {finer}"),
        ("asymmetric", "refused", subject.serves and scheme.bits == 8 and not scheme.symmetric,
         "int8 with zero points has no kernel", "quantize symmetrically"),
        ("asymmetric", "refused",
         not subject.serves and not scheme.symmetric and stack_of(layer.name) is None,
         "transformers 5.23 expects zero points that are not packed", "use fqcompile.load, or "
         "quantize symmetrically"),
    ]  # fmt: skip


def _place(subject: Subject, layer: Layer) -> list[Rule]:
    """Rules for layers that engines keep dense."""
    return [
        ("embedding", subject.unplaced if subject.serves else "refused", is_embedding(layer.name),
         "embeddings are looked up, not multiplied", _LEAVE),
        ("tied-head", "wrong" if subject.serves else "refused",
         is_head(layer.name) and subject.tied,
         "the config ties the head to the embedding, whose dense values it then gets",
         "leave the head dense, or set tie_word_embeddings to false"),
        ("router", subject.unplaced, is_router(layer.name),
         "routers of experts are built dense", _LEAVE),
    ]  # fmt: skip


def _shards(subject: Subject, layer: Layer) -> list[Rule]:
    """Rules for the shard of the layer on each device, and the kernels for it."""
    scheme, tp = layer.scheme, subject.tp
    assert scheme is not None
    rows = served_rows(layer.name, layer.n)
    k, n = _on_each_device(subject, layer.name, layer.k, rows)
    along_n = is_split_along_n(layer.name)
    words = scheme.codes_per_word
    split = tp if tp > 1 and is_split_along_k(layer.name) else 0
    return [
        tp_rule(subject, layer, split, "a smaller --tp"),
        ("tp-splits-n", "refused", along_n and rows % tp,
         f"N = {rows} is not a multiple of --tp {tp}",
         "take another degree of tensor parallelism"),
        ("words", "refused", k % words,
         f"K = {k} is not a multiple of {words}, the codes in a word", "leave the layer dense"),
        ("tile", "slow", subject.has_gpu_kernels and (k % _TILE_K or n % _TILE_N),
         f"{n} x {k} on each device is filled up to multiples of {_TILE_N} x {_TILE_K}",
         "take a smaller --tp" if tp > 1 else "none: it is the layer's shape"),
    ]  # fmt: skip


def _on_each_device(subject: Subject, name: str, k: int, n: int) -> tuple[int, int]:
    if is_split_along_k(name):
        return k // subject.tp, n
    return k, n // subject.tp if is_split_along_n(name) else n


def tp_rule(subject: Subject, layer: Layer, degree: int, other: str) -> Rule:
    """The rule that splitting K over devices must not cut a group; `degree` 0: not split."""
    scheme, k, tp = layer.scheme, layer.k, subject.tp
    assert scheme is not None
    size = scheme.group_size
    each = f"{k // tp} on each of {tp} devices" if k % tp == 0 else f"no multiple of {tp} devices"
    fits = max((g for g in GROUP_SIZES if k % tp == 0 and (k // tp) % g == 0), default=None)
    unit = f"group {size}" if size is not None else "the codes in a word"
    broken = degree and (k % degree or (k // degree) % (size or scheme.codes_per_word))
    remedy = f"repeat the scales to group {fits}, or take {other}" if fits else f"take {other}"
    return (
        "tp-splits-groups",
        "refused",
        broken,
        f"K = {k} is {each}, no multiple of {unit}",
        remedy,
    )


def _fused(subject: Subject, parts: Sequence[Layer]) -> list[Rule]:
    """The rule that parts of a fused layer must have the same scheme."""
    first = parts[0].scheme
    unlike = any(part.scheme != first for part in parts)
    shaped = all(part.scheme and part.scheme.is_shaped_as(first, part.k) for part in parts)
    kinds = ", ".join(f"{last(p.name)} {p.scheme or 'dense'}" for p in parts)
    problem = f"one fused layer of different schemes ({kinds}): "
    dense = any(part.scheme is None for part in parts)
    effect: Effect = subject.unplaced if dense else "refused"
    outcome = "one part stays without values" if effect == "wrong" else "an error"
    return [
        ("fused-parts", effect, unlike and not shaped, problem + outcome, _ALIKE),
        ("fused-parts", "wrong", unlike,
         f"{problem}the scheme of the first is taken for all", _ALIKE),
    ]  # fmt: skip


def _matched(subject: Subject, name: str, parts: Sequence[Layer]) -> list[Rule]:
    """The rule that the engine's lookup in the config must yield the stored scheme."""
    names, stored, config = [layer.name for layer in parts], parts[0].scheme, subject.config
    if stored is None and (is_head(name) or is_router(name)):
        return []  # built dense by the engines, whatever matches
    if subject.engine == "sglang" and subject.model_type in _OWN_NAME_ALONE:
        names = [name]
    ignored = {is_ignored(config, part, subject.engine) for part in names}
    match = find_match(config, name, names if len(names) > 1 else (), subject.engine)
    out, scheme = match.ignored or ignored == {True}, match.scheme
    problem = f"target {match.pattern!r} gives it {scheme}, and {stored} is stored"
    remedy = "write regular expressions that end in $ and match the fused name, not class names"
    return [
        ("ignored-parts", "refused", ignored == {True, False} and not match.ignored,
         "parts of one fused layer are ignored, others not",
         "name all of them in ignore, or none"),
        ("ignored", subject.unplaced, stored and out,
         "it is packed, and ignore names it", "take it out of ignore"),
        ("no-target", subject.unplaced if is_head(name) or not subject.serves else "refused",
         stored and not out and not scheme,
         "it is packed, and no target matches it",
         "add a regular expression that also matches the fused name"),
        ("unlisted", "refused", subject.engine == "sglang" and not (stored or out or scheme),
         "it is dense, and neither a target nor ignore names it", "name it in ignore"),
        ("not-ignored", subject.unplaced, scheme and not (stored or out),
         f"it is dense, and target {match.pattern!r} matches it", "name it in ignore"),
        ("class-target" if is_class(match.pattern or "") else "other-target",
         misread(subject, parts[0], scheme),
         scheme and stored and not out and scheme != stored, problem, remedy),
    ]  # fmt: skip


def misread(subject: Subject, layer: Layer, taken: Scheme | None) -> Effect:
    """The effect of taking another scheme: engines compare the shapes of tensors alone.

    SGLang 0.5.23 pads or cuts what is split along K (load_row_parallel_weight in
    srt/layers/parameter.py), and loads it in any shape.
    """
    shaped = layer.scheme is not None and layer.scheme.is_shaped_as(taken, layer.k)
    cut = subject.engine == "sglang" and is_split_along_k(layer.name) and not stack_of(layer.name)
    return "wrong" if shaped or cut else "refused"


def cpu_rules(subject: Subject) -> Iterator[Finding]:
    """All findings for serving on a CPU."""
    if subject.engine != "vllm" or subject.device != "cpu":
        return
    for parts in _engine_layers(subject).values():
        if parts[0].scheme is not None:
            names = [layer.name for layer in parts]
            yield from subject.broken(names, _linear_on_cpu(subject, parts))
    stacks: dict[str, Layer] = {}
    for layer in subject.packed:
        stack = stack_of(layer.name)
        if stack is not None:
            stacks.setdefault(stack, layer)
    for stack, layer in stacks.items():
        yield from subject.first_broken([stack], _experts_on_cpu(layer))


def _linear_on_cpu(subject: Subject, parts: Sequence[Layer]) -> list[Rule]:
    scheme = parts[0].scheme
    assert scheme is not None
    size, fits = scheme.group_size, scheme.bits == _CPU_BITS
    n = sum(served_rows(layer.name, layer.n) for layer in parts)
    k, n = _on_each_device(subject, parts[0].name, parts[0].k, n)
    return [
        ("cpu-bits", "refused", not fits,
         f"{scheme} has no kernel on a CPU, which takes 4 bits",
         f"quantize to 4 bits, or {_ON_GPU}"),
        ("cpu-group-size", "refused", fits and size and size % 2,
         f"group {size} is odd", "repeat the scales to an even group size"),
        ("cpu-shape", "refused", fits and (k % _CPU_MULTIPLE or n % _CPU_MULTIPLE),
         f"{n} x {k} on each device are not multiples of {_CPU_MULTIPLE}, as a CPU's kernel needs",
         f"leave the layer dense, or {_ON_GPU}"),
    ]  # fmt: skip


def _experts_on_cpu(layer: Layer) -> list[Rule]:
    scheme, remedy = layer.scheme, f"{_ON_GPU}, or leave experts dense (--exclude experts)"
    assert scheme is not None
    fits = scheme.bits == _CPU_BITS and scheme.symmetric and scheme.group_size is not None
    return [
        ("cpu-experts", "refused", fits,
         "experts of 4 bits run on x86 CPUs with AMX, or with zentorch, alone", remedy),
        ("cpu-experts", "refused", True, f"experts of {scheme} have no kernel on a CPU", remedy),
    ]  # fmt: skip
