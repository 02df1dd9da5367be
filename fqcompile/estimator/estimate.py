"""Estimates for each combination of model, device, parallel layout, workload and weight format.

`estimates` yields all combinations; an impossible one has a reason instead of figures. The results
are shown as text and as JSON.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from tabulate import tabulate

from fqcompile.errors import EstimateError
from fqcompile.estimator.costs import Memory, Speed, decode_speed, memory_of, prefill_speed
from fqcompile.estimator.decoder import Decoder
from fqcompile.estimator.devices import Cluster, Device
from fqcompile.estimator.matmuls import PLAIN_BITS, Sharing, WeightFormat, Workload, check

_GB = 1e9
# As rows of the body: tabulate widens every column that has a header by two.
_HEADERS = (
    ("", "", "", "", "", "weights", "weights", "KV", "other", "", "most", "decode", "over", "ms",
     "comm", "prefill", "over", "µs", "comm"),
    ("GPUs", "tp", "ep", "batch", "context", "in", "GB", "GB", "GB", "fits", "seqs", "tok/s",
     "bf16", "/token", "share", "tok/s", "bf16", "/token", "share"),
)  # fmt: skip
_COSTS = (("1M decoded", "1M read"), ("cost", "cost"))


@dataclass(frozen=True)
class Question:
    """Everything to combine.

    Attributes:
        devices: by short name.
        total_gpus: how many GPUs there are, for replicas side by side; None: those of one replica.
        prices: of an hour of one GPU, by the device's short name.
    """

    models: Sequence[Decoder]
    devices: Mapping[str, Device]
    sharings: Sequence[Sharing]
    workloads: Sequence[Workload]
    formats: Sequence[WeightFormat]
    cluster: Cluster = field(default_factory=Cluster)
    total_gpus: Sequence[int | None] = (None,)
    prices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """One combination. `memory` is None where `refusal` says why the model cannot be shared out so;
    the speeds are None where it does not fit.

    Attributes:
        replicas: how many the GPUs make; GPUs left over do nothing, and cost nothing here.
    """

    model: Decoder
    device_name: str
    device: Device
    sharing: Sharing
    load: Workload
    form: WeightFormat
    replicas: int
    price: float | None = None
    refusal: str | None = None
    memory: Memory | None = None
    decode: Speed | None = None
    prefill: Speed | None = None

    @property
    def gpus(self) -> int:
        """That work: of all replicas."""
        return self.replicas * self.sharing.gpus

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.fits

    def tokens_per_second(self, speed: Speed) -> float:
        """Of all replicas."""
        return self.replicas * speed.tokens_per_second

    def cost_of_a_million(self, speed: Speed) -> float | None:
        """Of a million tokens, in the currency of the price; None where there is no price."""
        if self.price is None:
            return None
        return float(token_cost(self.price, self.sharing.gpus, speed.tokens_per_second))


def token_cost(price: float, gpus: float, tokens_per_second: float) -> float:
    """Of a million tokens; takes symbols as well."""
    return 1_000_000 * price * gpus / (3600 * tokens_per_second)


def count_of(question: Question) -> int:
    """How many combinations there are."""
    parts = (
        question.models, question.devices, question.total_gpus, question.sharings,
        question.workloads, question.formats,
    )  # fmt: skip
    total = 1
    for part in parts:
        total *= len(part)
    return total


def estimates(question: Question) -> Iterator[Estimate]:
    """All combinations, of one model after another; the formats stand beside each other."""
    for model, (name, device), total, sharing, load, form in product(
        question.models, question.devices.items(), question.total_gpus, question.sharings,
        question.workloads, question.formats,
    ):  # fmt: skip
        replicas = 1 if total is None else total // sharing.gpus
        price = question.prices.get(name)
        bare = Estimate(model, name, device, sharing, load, form, replicas, price)
        yield _filled(bare, question.cluster, total)


def _filled(bare: Estimate, cluster: Cluster, total: int | None) -> Estimate:
    about = (bare.model, bare.sharing, bare.form, bare.load, bare.device)
    try:
        check(bare.model, bare.sharing)
        bare.load.check(bare.model)
        if not bare.replicas:
            raise EstimateError(f"{total} GPUs are fewer than the {bare.sharing.gpus} of a replica")
    except EstimateError as refusal:
        return replace(bare, refusal=str(refusal))
    memory = memory_of(*about)
    if not memory.fits:
        return replace(bare, memory=memory)
    decode, prefill = decode_speed(*about, cluster), prefill_speed(*about, cluster)
    return replace(bare, memory=memory, decode=decode, prefill=prefill)


def estimates_text(estimates: Sequence[Estimate]) -> str:
    """A table for each model and device; below it why other ways are not possible.

    Speeds are of all replicas, bytes those on each GPU; tokens in ms are a sequence's.
    """
    parts: dict[tuple[str, str], list[Estimate]] = {}
    for estimate in estimates:
        parts.setdefault((estimate.model.name, estimate.device.name), []).append(estimate)
    return "\n\n".join(_part(*names, found) for names, found in parts.items())


def _part(model: str, device: str, found: Sequence[Estimate]) -> str:
    sizes = found[0].model
    total, active = sizes.parameters / _GB, sizes.active_parameters / _GB
    of_a_token = "" if active == total else f", {active:.1f} B of them for a token"
    lines = [f"{model} ({total:.1f} B parameters{of_a_token}) on {device}", ""]
    possible = [estimate for estimate in found if estimate.refusal is None]
    if possible:
        priced = any(estimate.price is not None for estimate in possible)
        heads = [
            (*head, *cost) if priced else head for head, cost in zip(_HEADERS, _COSTS, strict=True)
        ]
        plain = {_way(e): e for e in possible if e.form.bits == PLAIN_BITS}
        rows = [_row(estimate, plain.get(_way(estimate)), priced) for estimate in possible]
        rule = ["-" * max(map(len, column)) for column in zip(*heads, *rows, strict=True)]
        body = [*heads, rule, *rows]
        lines.append(tabulate(body, tablefmt="plain", disable_numparse=True, stralign="right"))
        lines.append(_fewest(possible))
    refused = dict.fromkeys(estimate.refusal for estimate in found if estimate.refusal)
    return "\n".join([*lines, *(f"not possible: {reason}" for reason in refused)])


def _way(estimate: Estimate) -> tuple[object, ...]:
    """All but the format."""
    return estimate.replicas, estimate.sharing, estimate.load


def _fewest(possible: Sequence[Estimate]) -> str:
    """On how few of the GPUs that were asked about each format fits, with any of the workloads."""
    words = []
    for name in dict.fromkeys(estimate.form.name for estimate in possible):
        fit = [e.sharing.gpus for e in possible if e.form.name == name and e.fits]
        words.append(f"{name} {min(fit)}" if fit else f"{name} none")
    return f"fewest GPUs of those asked about: {', '.join(words)}"


def _row(estimate: Estimate, plain: Estimate | None, priced: bool) -> list[str]:
    memory, sharing, load = estimate.memory, estimate.sharing, estimate.load
    assert memory is not None, "what is possible has its bytes"
    decode, prefill = (None, None) if plain is None else (plain.decode, plain.prefill)
    return [
        str(estimate.gpus),
        str(sharing.tp),
        str(sharing.ep),
        str(load.batch),
        str(load.context),
        estimate.form.name,
        f"{memory.weights / _GB:.1f}",
        f"{memory.kv / _GB:.1f}",
        f"{memory.activations / _GB:.1f}",
        "yes" if memory.fits else "no",
        str(memory.most_sequences * sharing.attention_groups),
        *_speed(estimate, estimate.decode, decode, 1e3),
        *_speed(estimate, estimate.prefill, prefill, 1e6),
        *((_cost(estimate, estimate.decode), _cost(estimate, estimate.prefill)) if priced else ()),
    ]


def _speed(
    estimate: Estimate, speed: Speed | None, plain: Speed | None, units: float
) -> tuple[str, str, str, str]:
    """Tokens a second of all; over those of bf16; a token's time, of decoding a sequence's."""
    if speed is None:
        return "", "", "", ""
    rate, wait = estimate.tokens_per_second(speed), seconds_of_a_token(estimate, speed)
    over = "" if plain is None else f"{speed.tokens_per_second / plain.tokens_per_second:.2f}x"
    return f"{rate:,.0f}", over, _digits(units * wait), f"{speed.communication_share:.0%}"


def seconds_of_a_token(estimate: Estimate, speed: Speed) -> float:
    """What a sequence waits for its next token; of a prefill the mean over the tokens of a pass."""
    return speed.seconds if speed is estimate.decode else speed.seconds / speed.tokens


def _digits(number: float) -> str:
    """Three digits that mean something."""
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}"


def _cost(estimate: Estimate, speed: Speed | None) -> str:
    cost = None if speed is None else estimate.cost_of_a_million(speed)
    return "" if cost is None else _digits(cost)


def estimates_as_dict(estimates: Iterable[Estimate], assumed: Sequence[str]) -> dict[str, Any]:
    """Everything, as JSON holds it: bytes on each GPU, seconds, tokens a second of all replicas."""
    return {"assumptions": list(assumed), "estimates": [_as_dict(e) for e in estimates]}


def _as_dict(estimate: Estimate) -> dict[str, Any]:
    sharing, load, memory = estimate.sharing, estimate.load, estimate.memory
    return {
        "model": estimate.model.name,
        "parameters": estimate.model.parameters,
        "active_parameters": estimate.model.active_parameters,
        "gpu": estimate.device_name,
        "gpus": estimate.gpus,
        "replicas": estimate.replicas,
        "tp": sharing.tp,
        "ep": sharing.ep,
        "batch": load.batch,
        "context": load.context,
        "format": estimate.form.name,
        "refusal": estimate.refusal,
        "fits": estimate.fits,
        "memory": None
        if memory is None
        else {
            "weights": memory.weights,
            "kv": memory.kv,
            "activations": memory.activations,
            "usable": memory.usable,
            "most_sequences": memory.most_sequences * sharing.attention_groups,
        },
        "decode": _speed_as_dict(estimate, estimate.decode),
        "prefill": _speed_as_dict(estimate, estimate.prefill),
    }


def _speed_as_dict(estimate: Estimate, speed: Speed | None) -> dict[str, Any] | None:
    if speed is None:
        return None
    return {
        "tokens_per_second": estimate.tokens_per_second(speed),
        "ms_per_token": 1e3 * seconds_of_a_token(estimate, speed),
        "seconds": speed.seconds,
        "matmuls": speed.matmuls,
        "attention": speed.attention,
        "others": speed.others,
        "communication": speed.communication,
        "communication_share": speed.communication_share,
        "cost_of_a_million_tokens": estimate.cost_of_a_million(speed),
    }
