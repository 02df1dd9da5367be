"""Estimates: for each model, device, way to share out, workload and format, what is to be expected.

`estimates` goes through all combinations; one that cannot be has its reason instead of figures.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from fqcompile.errors import EstimateError
from fqcompile.estimator.decoder import Decoder
from fqcompile.estimator.devices import Cluster, Device
from fqcompile.estimator.matmuls import WeightFormat
from fqcompile.estimator.memory import Memory, memory_of
from fqcompile.estimator.sharding import Sharing, Workload, check
from fqcompile.estimator.speed import Speed, decode_speed, prefill_speed


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
