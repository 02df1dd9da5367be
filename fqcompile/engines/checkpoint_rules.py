"""Rules on a checkpoint as a whole."""

from collections.abc import Iterator

from fqcompile.engines.findings import Finding, Subject
from fqcompile.engines.quantization_config import FORMAT


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
