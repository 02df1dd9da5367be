"""Rules on stacks of experts, which engines hold as two tensors for all experts of a layer."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from fqcompile.interop.findings import Finding, Subject
from fqcompile.interop.layer_rules import tp_finding
from fqcompile.interop.layers import Layer, Scheme, is_split_along_k, stack_of
from fqcompile.interop.quantization_config import Group, find_match

# transformers 5.23 loaded 12 of 12 exports beside compressed-tensors 0.20, and 8 beside 0.17, which
# vLLM 0.33 pins: the experts of Qwen3-MoE are not known there.
EXPERTS_NEED = (0, 20)
_TILE = 128
# The names that vLLM and SGLang look up, whatever those in the checkpoint.
_LOOKED_UP = ("gate_proj", "up_proj", "down_proj")


def expert_rules(subject: Subject) -> Iterator[Finding]:
    """All findings about experts."""
    stacks: dict[str, list[Layer]] = {}
    for layer in subject.layers:
        stack = stack_of(layer.name)
        if stack is not None:
            stacks.setdefault(stack, []).append(layer)
    if subject.engine == "transformers":
        yield from _transformers(subject, stacks)
        return
    for stack, layers in stacks.items():
        found = _one_scheme(subject, stack, layers)
        if found is not None:
            yield found
        else:
            yield from _matched(subject, stack, layers)
            yield from _split(subject, stack, layers)


def _schemes(layers: Sequence[Layer]) -> set[Scheme | None]:
    return {layer.scheme for layer in layers}


def _one_scheme(subject: Subject, stack: str, layers: Sequence[Layer]) -> Finding | None:
    schemes = _schemes(layers)
    if len(schemes) == 1:
        return None
    kinds = ", ".join(sorted(str(s or "dense") for s in schemes))
    seen = None in schemes or len(_schemes(_first_expert(stack, layers))) > 1
    return subject.finding(
        "experts-differ", "refused" if seen else "wrong", [stack],
        f"its experts and projections have different schemes ({kinds}), and the first expert's "
        f"{'must be one' if seen else 'is taken for all'}",
        "give all of a layer one scheme: scales can be repeated without loss",
    )  # fmt: skip


def _first_expert(stack: str, layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.name.startswith(f"{stack}.0.")]


def _matched(subject: Subject, stack: str, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Looked up by the projections of the first expert."""
    stored = layers[0].scheme
    for projection in _LOOKED_UP:
        match = find_match(subject.config, f"{stack}.0.{projection}", (), subject.engine)
        if match.ignored or match.group is None:
            if stored is not None:
                what = "ignore names it" if match.ignored else "no target matches it"
                yield subject.finding(
                    "experts-target", "refused", [stack],
                    f"it is packed, and {what} as experts.0.{projection}",
                    "add the target re:.*experts\\..* of this stack",
                )  # fmt: skip
                return
        elif match.group.scheme != stored:
            yield subject.finding(
                "experts-target", "wrong" if stored else "refused", [stack],
                f"target {match.pattern!r} gives it {match.group.scheme}, and {stored or 'dense'} "
                "is stored", "give the experts a group of their own, or name them in ignore",
            )  # fmt: skip
            return


def _split(subject: Subject, stack: str, layers: Sequence[Layer]) -> Iterator[Finding]:
    scheme = layers[0].scheme
    if scheme is None:
        return
    experts = len({layer.name.removeprefix(stack).split(".")[1] for layer in layers})
    if experts % subject.ep:
        yield subject.finding(
            "ep-splits-experts", "refused", [stack],
            f"{experts} experts are no multiple of --ep {subject.ep}",
            "take a degree of expert parallelism that divides them",
        )  # fmt: skip
    tp = subject.tp if subject.ep == 1 else 1  # experts are then whole
    down = [layer for layer in layers if is_split_along_k(layer.name)]
    across = [layer for layer in layers if not is_split_along_k(layer.name)]
    for layer in down[:1]:
        k, rest = divmod(layer.k, tp)
        if rest or k % (scheme.group_size or scheme.codes_per_word):
            yield tp_finding(subject, stack, layer.k, scheme.group_size, experts=True)
        elif subject.has_gpu_kernels and scheme.group_size is None and tp == 1 and layer.k % 64:
            yield subject.finding(
                "experts-channel", "refused", [stack],
                f"one scale per channel runs on one kernel alone, which needs K = {layer.k} to be "
                "a multiple of 64", "repeat the scales to group 32",
            )  # fmt: skip
    if subject.has_gpu_kernels and any(layer.k % _TILE for layer in across[:1]):
        yield subject.finding(
            "experts-tile", "slow", [stack],
            f"a hidden size of {across[0].k} is no multiple of {_TILE}: the fastest kernel for "
            "experts does not take it", "none: it is the model's shape",
        )  # fmt: skip


def _transformers(subject: Subject, stacks: Mapping[str, Sequence[Layer]]) -> Iterator[Finding]:
    """They are made dense while loading, all by one scheme."""
    if not stacks:
        return
    dense = [stack for stack, layers in stacks.items() if None in _schemes(layers)]
    if dense:
        yield subject.finding(
            "dense-experts", "refused", dense,
            "experts are dense in a checkpoint with quantised layers: loading looks for packed "
            "ones", "quantise the experts of every layer, or export to --profile serve",
        )  # fmt: skip
        return
    installed = _installed()
    if installed is None or installed < EXPERTS_NEED:
        floor, here = (".".join(map(str, v)) if v else "none" for v in (EXPERTS_NEED, installed))
        yield subject.finding(
            "experts-version", "needs", list(stacks),
            f"packed experts load with compressed-tensors {floor} or later; {here} is installed "
            "here (vLLM pins 0.17)", f"pip install 'compressed-tensors>={floor}'",
        )  # fmt: skip
    taken = _experts_group(subject.config.groups).scheme
    for stack, layers in stacks.items():
        other = next((s for s in _schemes(layers) if s is not None and s != taken), None)
        asymmetric = any(s is not None and not s.symmetric for s in _schemes(layers))
        if asymmetric:
            yield subject.finding(
                "experts-asymmetric", "wrong", [stack], "zero points of experts are not read",
                "quantise them symmetrically",
            )  # fmt: skip
        elif other is not None:
            yield subject.finding(
                "experts-of-one-scheme", "wrong" if other.bits != taken.bits else "refused",
                [stack], f"it is stored as {other}, and all experts are read as {taken}",
                "give the experts of all layers one scheme, in a group of their own whose target "
                "is a regular expression with 'experts' (--profile portable)",
            )  # fmt: skip


def _installed() -> tuple[int, ...] | None:
    """Of compressed-tensors, on this machine, which need not be the one that serves."""
    try:
        return tuple(map(int, re.findall(r"\d+", version("compressed-tensors"))[:2]))
    except PackageNotFoundError:
        return None


def _experts_group(groups: Sequence[Group]) -> Group:
    """The one that transformers takes for all experts."""
    named = (g for g in groups if any(t.startswith("re:") and "experts" in t for t in g.targets))
    by_class = (g for g in groups if any(not t.startswith("re:") for t in g.targets))
    return next(named, None) or next(by_class, groups[0])
