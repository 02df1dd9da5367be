"""Seconds of the exchanges between GPUs: rings as NCCL runs them, over one or several machines.

Functions of plain numbers take symbols as well: `formulas` prints them.
"""

from dataclasses import dataclass
from typing import Any

from fqcompile.planner.devices import LINK_SHARE, NETWORK_HOP, RING_SECONDS, Device, Link


@dataclass(frozen=True)
class Cluster:
    """Machines of `gpus` each; `network` is bytes/s of one GPU to others, in one direction."""

    gpus: int = 8
    network: float = 50e9

    @property
    def link(self) -> Link:
        rate = LINK_SHARE * self.network
        return Link(f"network {self.network / 1e9:g} GB/s", rate, NETWORK_HOP)


def ring_seconds(size: Any, p: Any, machines: Any, rate: Any, hop: Any, far_hop: Any) -> Any:
    """An all-reduce of `size` bytes by p GPUs: 2(p-1) steps of size/p, of which 2(machines-1) leave
    a machine."""
    steps, far = 2 * (p - 1), 2 * (machines - 1)
    moved = steps * size / (p * rate)
    return moved + RING_SECONDS + (steps - far) * hop + far * far_hop


def all_reduce_seconds(size: float, p: int, device: Device, cluster: Cluster) -> float:
    """Of `size` bytes on each of p GPUs. A ring leaves each machine through all of its ports."""
    if p == 1:
        return 0.0
    machines, far = -(-p // cluster.gpus), cluster.link
    rate = device.link.bandwidth
    if machines > 1:
        rate = min(rate, cluster.gpus * far.bandwidth)
    near_hop = device.link.hop_seconds
    return float(ring_seconds(size, p, machines, rate, near_hop, far.hop_seconds))


def all_gather_seconds(size: float, p: int, device: Device, cluster: Cluster) -> float:
    """Of p parts of `size` bytes in all: the second half of an all-reduce."""
    return all_reduce_seconds(size, p, device, cluster) / 2


def exchange_seconds(size: Any, p: Any, rate: Any, hop: Any) -> Any:
    """An all-to-all in which each of p GPUs sends `size` bytes: all but its own share."""
    return size * (p - 1) / (p * rate) + RING_SECONDS + hop


def all_to_all_seconds(size: float, p: int, device: Device, cluster: Cluster) -> float:
    """`size` bytes of each of p GPUs, an equal part to each; beyond a machine at the network's rate
    if that takes longer."""
    if p == 1:
        return 0.0
    inside = min(p, cluster.gpus)
    link, far = device.link, cluster.link
    near = exchange_seconds(size * inside / p, inside, link.bandwidth, link.hop_seconds)
    leaves = size * (p - inside) / (p * far.bandwidth) + RING_SECONDS + far.hop_seconds
    return float(near if p == inside else max(near, leaves))
