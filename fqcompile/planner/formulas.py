"""The plan's formulas with symbols in place of numbers: the same functions, called with symbols."""

from sympy import Expr, Symbol

from fqcompile.kernels.roofline import M, dense, ideal, weight_bytes
from fqcompile.planner.communication import exchange_seconds, ring_seconds
from fqcompile.planner.decoder import Decoder
from fqcompile.planner.devices import Device
from fqcompile.planner.estimate import token_cost
from fqcompile.planner.memory import kv_bytes
from fqcompile.planner.sharding import Sharing, matrices
from fqcompile.planner.speed import attention_flops, experts_read
from fqcompile.planner.weight_format import PLAIN_BITS, WeightFormat, spec_of


def _symbols(names: str) -> list[Symbol]:
    return [Symbol(name, positive=True) for name in names.split()]


def general_formulas() -> dict[str, Expr]:
    """Those that hold for every model."""
    layers, heads, kv_heads, head_dim, tokens, keys = _symbols("layers heads KV width tokens keys")
    experts, per_token, size, p, machines = _symbols("E k bytes p machines")
    rate, hop, far_hop, price, per_second = _symbols("rate hop far_hop price tokens_per_second")
    return {
        "bytes of keys and values": kv_bytes(layers, kv_heads, head_dim, tokens),
        "flops of attention in a layer": attention_flops(tokens, keys, heads, head_dim),
        "experts that tokens meet": experts_read(experts, per_token, tokens),
        "seconds of an all-reduce": ring_seconds(size, p, machines, rate, hop, far_hop),
        "seconds of an all-to-all": exchange_seconds(size, p, rate, hop),
        "cost of a million tokens": token_cost(price, p, per_second),
    }


def matmul_formulas(decoder: Decoder, form: WeightFormat, device: Device) -> dict[str, Expr]:
    """The roofline of each matrix on one device, in seconds for M rows; of experts, routed ones."""
    found = {}
    for matrix in matrices(decoder, Sharing()):
        spec = spec_of(matrix, 1, form, device)
        name = f"{matrix.name} of {weight_bytes(spec) * max(1, matrix.experts)} bytes"
        hit = None
        if matrix.experts and decoder.experts is not None:
            per_token = decoder.experts.per_token
            hit = experts_read(matrix.experts, per_token, M / per_token)
        found[name] = ideal(spec, device, hit)
        if spec.gpu is not None and spec.bits != PLAIN_BITS:
            found[f"{matrix.name} dequantised, then multiplied"] = dense(spec, spec.gpu)
    return found


def formulas_text(decoder: Decoder, form: WeightFormat, device: Device) -> str:
    """The matmuls' formulas, a line each."""
    title = f"{decoder.name} in {form.name} on one {device.name}, seconds for {M} rows:"
    return "\n".join([title, *_lines(matmul_formulas(decoder, form, device))])


def general_text() -> str:
    """The formulas of every model, a line each."""
    return "\n".join(["Formulas:", *_lines(general_formulas())])


def _lines(formulas: dict[str, Expr]) -> list[str]:
    return [f"  {name} = {formula}" for name, formula in formulas.items()]
