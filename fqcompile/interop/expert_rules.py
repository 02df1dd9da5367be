"""Rules for stacks of experts, which engines store as two tensors for all experts of a layer."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from fqcompile.interop.findings import Finding, Rule, Subject
from fqcompile.interop.layer_rules import misread, tp_rule
from fqcompile.interop.layers import Layer, Scheme, is_split_along_k, last, stack_of
from fqcompile.interop.quantization_config import Group, find_match

# transformers 5.23 loaded 12 of 12 exports with compressed-tensors 0.20, and 8 with 0.17, which
# vLLM 0.33 pins: 0.17 does not support the experts of Qwen3-MoE.
EXPERTS_NEED = (0, 20)
_TILE = 128
# What SGLang 0.5.23 looks up in the config, whatever the checkpoint's names (get_moe_scheme).
# vLLM 0.32 and 0.33 look up the names that the model's class gives (ckpt_names of FusedMoE), which
# are the checkpoint's; Mixtral's class takes those of SGLang too, and renames them to its own.
_LOOKED_UP = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")
# What the classes of SGLang (make_expert_params_mapping in srt/models) and transformers 5.23
# (conversion_mapping.py) load; experts by other names are skipped.
_LOADED = {
    **dict.fromkeys(("mixtral", "phimoe", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe"), _LOOKED_UP
    ),
}


def expert_rules(subject: Subject) -> Iterator[Finding]:
    """All findings about experts."""
    stacks: dict[str, list[Layer]] = {}
    for layer in subject.layers:
        stack = stack_of(layer.name)
        if stack is not None:
            stacks.setdefault(stack, []).append(layer)
    if not subject.serves:
        yield from _transformers(subject, stacks)
        return
    for stack, layers in stacks.items():
        unlike = list(subject.first_broken([stack], _alike(stack, layers)))
        yield from unlike or subject.first_broken([stack], _matched(subject, stack, layers))
        if not unlike and layers[0].scheme is not None:
            yield from subject.broken([stack], _split(subject, stack, layers))


def _schemes(layers: Sequence[Layer]) -> set[Scheme | None]:
    return {layer.scheme for layer in layers}


def _alike(stack: str, layers: Sequence[Layer]) -> list[Rule]:
    """Engines take the first expert's scheme for all, and look only at its projections."""
    schemes = _schemes(layers)
    first = _schemes([layer for layer in layers if layer.name.startswith(f"{stack}.0.")])
    kinds = ", ".join(sorted(str(s or "dense") for s in schemes))
    problem = (
        f"its experts and projections have different schemes ({kinds}), and the first expert's"
    )
    remedy = "give all of a layer one scheme: scales can be repeated without loss"
    taken, unlike, seen = layers[0].scheme, len(schemes) > 1, len(first) > 1
    shaped = all(x.scheme and x.scheme.is_shaped_as(taken, x.k) for x in layers)
    return [
        ("experts-differ", "refused", unlike and (seen or not shaped),
         f"{problem} must be one", remedy),
        ("experts-differ", "wrong", unlike, f"{problem} is taken for all", remedy),
    ]  # fmt: skip


def _matched(subject: Subject, stack: str, layers: Sequence[Layer]) -> Iterator[Rule]:
    """Rules for the target that engines look up by the projections of the first expert."""
    stored = layers[0].scheme
    for projection in _looked_up(subject, stack, layers):
        match = find_match(subject.config, f"{stack}.0.{projection}", (), subject.engine)
        what = "ignore names it" if match.ignored else "no target matches it"
        scheme = match.scheme
        yield (
            "experts-target", subject.unplaced if match.ignored else "refused",
            stored and not scheme,
            f"it is packed, and {what} as experts.0.{projection}",
            "add the target re:.*experts\\..* of this stack",
        )  # fmt: skip
        yield (
            "experts-target", misread(subject, layers[0], scheme), scheme and scheme != stored,
            f"target {match.pattern!r} gives it {scheme}, and {stored or 'dense'} is stored",
            "give the experts a group of their own, or name them in ignore",
        )  # fmt: skip
    yield _named(subject, stack, layers)


def _named(subject: Subject, stack: str, layers: Sequence[Layer]) -> Rule:
    """The rule that experts have the names that the engine's class for the model loads."""
    names = tuple(last(x.name) for x in layers if x.name.startswith(f"{stack}.0."))
    known = _LOADED.get(subject.model_type, names)
    return (
        "experts-names", subject.unplaced, {*names} != {*known},
        f"its projections are {', '.join(names)}, and the class for {subject.model_type} loads "
        f"{', '.join(known)}", "rename them, or export the model that they are of",
    )  # fmt: skip


def _looked_up(subject: Subject, stack: str, layers: Sequence[Layer]) -> Sequence[str]:
    if subject.engine == "sglang":
        return _LOOKED_UP
    if subject.model_type == "mixtral":
        return _MIXTRAL
    return [last(layer.name) for layer in layers if layer.name.startswith(f"{stack}.0.")]


def _split(subject: Subject, stack: str, layers: Sequence[Layer]) -> Iterator[Rule]:
    experts = len({layer.name.removeprefix(stack).split(".")[1] for layer in layers})
    yield (
        "ep-splits-experts", "refused", experts % subject.ep,
        f"{experts} experts are not a multiple of --ep {subject.ep}",
        "take a degree of expert parallelism that divides them",
    )  # fmt: skip
    yield (
        "experts-asymmetric", "refused",
        subject.engine == "sglang" and not all(x.scheme and x.scheme.symmetric for x in layers),
        "zero points of experts are not transposed as their weights are, and do not fit",
        "quantize them symmetrically",
    )  # fmt: skip
    tp = subject.tp if subject.ep == 1 else 1  # experts are then whole
    down = next((layer for layer in layers if is_split_along_k(layer.name)), None)
    if down is not None:
        rule = tp_rule(subject, down, tp, "a smaller --tp or expert parallelism")
        by_channel = down.scheme is not None and down.scheme.group_size is None
        yield rule
        yield (
            "experts-channel", "refused",
            subject.has_gpu_kernels and by_channel and tp == 1 and down.k % 64 and not rule[2],
            f"one scale per channel runs on one kernel alone, which needs K = {down.k} to be a "
            "multiple of 64", "repeat the scales to group 32",
        )  # fmt: skip
    hidden = next((layer.k for layer in layers if not is_split_along_k(layer.name)), 0)
    yield (
        "experts-tile", "slow", subject.has_gpu_kernels and hidden % _TILE,
        f"a hidden size of {hidden} is not a multiple of {_TILE}: the fastest kernel for experts "
        "does not take it", "none: it is the model's shape",
    )  # fmt: skip


def _transformers(subject: Subject, stacks: Mapping[str, Sequence[Layer]]) -> Iterator[Finding]:
    """Rules of transformers, which dequantizes experts while loading, all with one scheme."""
    if not stacks:
        return
    dense = [stack for stack, layers in stacks.items() if None in _schemes(layers)]
    if dense:
        yield from subject.broken(dense, [(
            "dense-experts", "refused", True, "experts are dense in a checkpoint with quantized "
            "layers: loading looks for packed ones",
            "quantize the experts of every layer, or export to --profile serve",
        )])  # fmt: skip
        return
    installed = _installed()
    floor, here = (".".join(map(str, v)) if v else "none" for v in (EXPERTS_NEED, installed))
    yield from subject.broken(list(stacks), [(
        "experts-version", "needs", installed is None or installed < EXPERTS_NEED,
        f"packed experts load with compressed-tensors {floor} or later; {here} is installed here "
        "(vLLM pins 0.17)", f"pip install 'compressed-tensors>={floor}'",
    )])  # fmt: skip
    taken = _experts_group(subject.config.groups).scheme
    for stack, layers in stacks.items():
        rules = [*_loaded(layers, taken), _named(subject, stack, layers)]
        yield from subject.first_broken([stack], rules)


def _loaded(layers: Sequence[Layer], taken: Scheme) -> list[Rule]:
    schemes = [layer.scheme for layer in layers if layer.scheme is not None]
    other = next((scheme for scheme in schemes if scheme != taken), None)
    return [
        ("experts-asymmetric", "refused", any(not scheme.symmetric for scheme in schemes),
         "zero points of experts are not read", "quantize them symmetrically"),
        ("experts-of-one-scheme", "refused", other,
         f"it is stored as {other}, and all experts are read as {taken}",
         "give the experts of all layers one scheme, in a group of their own whose target is a "
         "regular expression with 'experts' (--profile portable)"),
    ]  # fmt: skip


def _installed() -> tuple[int, ...] | None:
    """The compressed-tensors version installed here, which may differ from the server's."""
    try:
        return tuple(map(int, re.findall(r"\d+", version("compressed-tensors"))[:2]))
    except PackageNotFoundError:
        return None


def _experts_group(groups: Sequence[Group]) -> Group:
    """The scheme that transformers uses for all experts."""
    named = (g for g in groups if any(t.startswith("re:") and "experts" in t for t in g.targets))
    by_class = (g for g in groups if any(not t.startswith("re:") for t in g.targets))
    return next(named, None) or next(by_class, groups[0])
