"""The sections of `bench quantize` and `launch_overhead`: what it costs."""

from bench.core.results import Row
from bench.core.section import Content, paragraphs, table


def quantize(content: Content) -> str:
    """Speed and memory of each setting, and how fast weights come back."""
    s = content["settings"]
    rows: list[Row] = content["rows"]
    lines = [
        [r["setting"], f"{r['weights_per_s'] / 1e6:.0f}", f"{r['peak']:.2f}", f"{r['error']:.4f}"]
        for r in rows
        if "setting" in r
    ]
    back = [
        f"{row['dequantize']} {row[dtype] / 1e9:.1f} (to {dtype})"
        for row in rows
        if "dequantize" in row
        for dtype in ("bfloat16", "float32")
    ]
    size = f"{s['n']} x {s['k']} {s['dtype']}"
    what = f"Quantising {size}, {s['threads']} threads, the best of {s['repeat']}."
    headers = ("setting", "million weights/s", "extra memory over the weight's", "relative error")
    return paragraphs(
        what, table(lines, headers), f"Dequantised, thousand million weights/s: {', '.join(back)}."
    )


def quantize_short(content: Content) -> str:
    """The default, and a fixed group."""
    found = {row["setting"]: row for row in content["rows"] if "setting" in row}
    fixed, adaptive = found["int4 mse g128"], found["int4 mse adaptive"]
    s = content["settings"]
    return (
        f"Quantisation, {s['n']} x {s['k']} {s['dtype']}, {s['threads']} threads: int4 with scale "
        f"search {fixed['weights_per_s'] / 1e6:.0f} million weights a second at a fixed group and "
        f"{adaptive['weights_per_s'] / 1e6:.0f} with the adaptive rule; extra memory "
        f"{adaptive['peak']:.2f} of the weight's."
    )


def launch_overhead(content: Content) -> str:
    """Every way to launch."""
    lines = [[row["way"], f"{row['us']:.1f}", f"{row['best']:.1f}"] for row in content["rows"]]
    headers = ("way", "us, median", "fastest")
    return paragraphs(launch_overhead_short(content), table(lines, headers))


def launch_overhead_short(content: Content) -> str:
    """The operator against Triton's launcher."""
    s = content["settings"]
    best = {row["way"]: float(row["best"]) for row in content["rows"]}
    over = best[s["operator"]] - best[s["launcher"]]
    stub = " (a stub stands for the GPU)" if s["stub"] else ""
    return (
        f"Without CUDA graphs a call costs the host {over:.1f} us more than Triton's own "
        f"launcher{stub}."
    )
