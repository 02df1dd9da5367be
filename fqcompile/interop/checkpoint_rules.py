"""Rules on a checkpoint as a whole."""

from collections.abc import Iterator

from fqcompile.interop.findings import Finding, Subject
from fqcompile.interop.layers import last
from fqcompile.interop.quantization_config import FORMAT

# Whose `_init_weights` in transformers 5.23 (models/<family>/modeling_<family>.py) reads the weight
# of a linear by the name of its child; from_pretrained calls it also for what is packed, and a
# packed linear has no attribute "weight". T5 and Mamba2 were seen to fail there.
_T5 = frozenset({"q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"})
_MAMBA = frozenset({"out_proj"})
_INITIALIZED_BY_NAME = {
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "udop", "pop2piano"), _T5),
    "switch_transformers": _T5,
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), _MAMBA),
}


def checkpoint_rules(subject: Subject) -> Iterator[Finding]:
    """All findings that are about no layer alone."""
    formats = {subject.config.format, *(group.format for group in subject.config.groups)}
    names = [layer.name for layer in subject.packed]
    if not names:
        yield subject.finding(
            "nothing-packed", "refused", ["config.json"], "no layer has a weight_packed",
            "remove quantization_config from it",
        )  # fmt: skip
    elif formats != {FORMAT}:
        yield subject.finding(
            "format", "refused", names,
            f"the format is {', '.join(sorted(formats))}, and packed weights load as {FORMAT}",
            f"write the one format {FORMAT} for all groups",
        )  # fmt: skip
    if subject.engine == "transformers":
        yield from _initialized(subject)


def _initialized(subject: Subject) -> Iterator[Finding]:
    read = _INITIALIZED_BY_NAME.get(subject.model_type, frozenset())
    names = [layer.name for layer in subject.packed if last(layer.name) in read]
    if names:
        yield subject.finding(
            "initialized-by-name", "refused", names,
            f"_init_weights of {subject.model_type} reads {last(names[0])}.weight, which a packed "
            "layer does not have: from_pretrained raises AttributeError",
            "leave these layers dense (exclude), or use fqcompile.load",
        )  # fmt: skip
