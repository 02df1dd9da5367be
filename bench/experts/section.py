"""The section of `bench expert_decode`: a layer of experts on a CPU."""

from bench.core.results import Row
from bench.core.section import Content, paragraphs, spread, table


def expert_decode_short(content: Content) -> str:
    """The rows in bf16."""
    return expert_decode({**content, "rows": [r for r in content["rows"] if r["dtype"] == "bf16"]})


def expert_decode(content: Content) -> str:
    """Milliseconds, ours against Inductor on the same layer in the same form."""
    rows: list[Row] = content["rows"]
    plain = {_key(row): row for row in rows if not row["ours"]}
    lines = []
    for row in rows:
        if row["ours"]:
            other = plain[_key(row)]
            ratio = f"{other['ms'] / row['ms']:.1f}x"
            lines.append([*_key(row), spread(other, "ms", 2), spread(row, "ms", 2), ratio])
    headers = ("tokens", "type", "experts as", "Inductor", "int4", "ratio")
    s = content["settings"]
    what = (
        f"A layer of {s['num_experts']} experts of {s['hidden_size']} x "
        f"{s['moe_intermediate_size']}, {s['top_k']} for each token, {s['threads']} threads; ms, "
        "medians [20th, 80th percentile]."
    )
    return paragraphs(what, table(lines, headers), _memory(rows))


def _key(row: Row) -> tuple[int, str, str]:
    return row["tokens"], row["dtype"], f"`{row['form']}`"


def _memory(rows: list[Row]) -> str:
    most = max((row for row in rows if row["ours"]), key=lambda row: float(row["memory"]))
    return (
        f"Decoding needs at most {most['memory']:.2f} times the packed size "
        f"({most['packed_mib']:.0f} MiB) beside the original weights."
    )
