"""What a legal graph is after each pass; checked where FQCOMPILE_VERIFY=1, as in the tests."""

from fqcompile.errors import GraphInvariantError
from fqcompile.passes.base import GraphState, example, placeholders
from fqcompile.passes.op_nodes import argument, is_linear, is_quantized
from fqcompile.torch_compat import is_erased


def verify(state: GraphState, after: str) -> None:
    """Raise GraphInvariantError, naming the pass and the node, where a rule is broken."""

    def check(condition: bool, node: object, rule: str) -> None:
        if not condition:
            raise GraphInvariantError(f"after {after}: {node}: {rule}")

    state.graph.lint()
    inputs = placeholders(state.graph)
    first_call = next(
        (n for n in state.graph.nodes if n.op not in ("placeholder", "get_attr")), None
    )
    for node in inputs:
        check(first_call is None or node < first_call, node, "inputs come before all calls")
    calls = [node for node in state.graph.nodes if is_quantized(node)]
    check(set(calls) == set(state.packed), calls, "each op has exactly one packed weight")
    for op, pair in state.packed.items():
        given = (argument(op, "qweight"), argument(op, "scale"))
        check(given == (pair.qweight, pair.scale), op, "reads the inputs that its spec fills")
        rows = argument(op, "n") * (2 if argument(op, "gated") else 1)
        check(rows == pair.spec.rows, op, f"n and gated say {rows} rows, its spec {pair.spec.rows}")
        check(is_linear(op) == (pair.spec.experts == 0), op, "one matrix or experts, as its spec")
        check(argument(op, "group_size") == pair.spec.group_size, op, "group size as in its spec")
        out = example(op)
        check(out is not None and out.shape[-1] == argument(op, "n"), op, "result has N columns")
    for site in state.sites:
        done = site.op is not None and not is_erased(site.op)
        check(site.op is None or done, site.name, "a rewritten site names a live op")
        check(site.plan is None or site.reason is None, site.name, "a plan or a reason, not both")
