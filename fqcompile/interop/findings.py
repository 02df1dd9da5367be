"""Findings: problems that an engine would have with some layers, and their remedies."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from tabulate import tabulate

from fqcompile.interop.layers import Layer
from fqcompile.interop.quantization_config import QuantizationConfig

# The engine refuses to load; or loads and computes wrong results; or does not use its fastest
# kernels; or needs versions that are not installed here.
Effect = Literal["refused", "wrong", "slow", "needs"]
# A rule: its name, the effect of breaking it, whether it is broken, the problem and the remedy.
Rule = tuple[str, Effect, object, str, str]


@dataclass(frozen=True)
class Finding:
    """One rule that some layers break, with the effect and the remedy.

    Attributes:
        rule: its name.
        engine: "vllm", "sglang" or "transformers".
        effect: "refused": it does not load; "wrong": it loads and computes something else; "slow":
            not by the engine's fastest kernels; "needs": versions that are not installed here.
        layers: the names of those that break it.
        problem, remedy: what is wrong, and what to do.
    """

    rule: str
    engine: str
    effect: Effect
    layers: tuple[str, ...]
    problem: str
    remedy: str

    @property
    def where(self) -> str:
        """The first layers by name."""
        more = f" and {len(self.layers) - 2} more" if len(self.layers) > 3 else ""
        return ", ".join(self.layers[: 2 if more else 3]) + more

    @property
    def loads(self) -> bool:
        """Whether the engine still computes correct results."""
        return self.effect in ("slow", "needs")

    def __str__(self) -> str:
        return f"{self.engine} {self.effect}: {self.where}: {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class Subject:
    """The input of the rules; `tied`: the config ties the head to the embedding;
    `model_type`: the model family that the config names.

    `device` is "cuda" or "cpu": what the engine runs on.
    """

    engine: str
    config: QuantizationConfig
    layers: Sequence[Layer]
    tied: bool = False
    tp: int = 1
    ep: int = 1
    device: str = "cuda"
    model_type: str = ""

    @property
    def serves(self) -> bool:
        """Whether it fuses layers, splits them and has kernels for packed ones."""
        return self.engine != "transformers"

    @property
    def unplaced(self) -> Effect:
        """The effect of a tensor that the engine has no parameter for: vLLM raises, SGLang 0.5.23
        skips it (load_weights in srt/models: some classes warn, some raise KeyError), transformers
        reports it, and gives the parameter that it was for random values."""
        return "refused" if self.engine == "vllm" else "wrong"

    @property
    def has_gpu_kernels(self) -> bool:
        return self.serves and self.device != "cpu"

    @property
    def packed(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.scheme is not None]

    def broken(self, layers: Sequence[str], rules: Iterable[Rule]) -> Iterator[Finding]:
        """The findings for some layers."""
        for name, effect, is_broken, problem, remedy in rules:
            if is_broken:
                yield Finding(name, self.engine, effect, tuple(layers), problem, remedy)

    def first_broken(self, layers: Sequence[str], rules: Iterable[Rule]) -> Iterator[Finding]:
        """The finding for the first broken rule only, as the others follow from it."""
        return islice(self.broken(layers, rules), 1)


def findings_table(findings: Sequence[Finding]) -> str:
    """The findings as text for a terminal."""
    rows = [(f.engine, f.effect, f.where, f.problem, f.remedy) for f in findings]
    widths = [None, None, 36, 40, 40]
    headers = ("engine", "effect", "layers", "problem", "remedy")
    return tabulate(rows, headers, maxcolwidths=widths, disable_numparse=True)


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """Merge findings of layers that break the same rule in the same way."""
    found: dict[Finding, list[str]] = {}
    for finding in findings:
        found.setdefault(replace(finding, layers=()), []).extend(finding.layers)
    return [replace(f, layers=tuple(dict.fromkeys(names))) for f, names in found.items()]
