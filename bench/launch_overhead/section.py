"""The section of `bench launch_overhead`."""

from bench.core.section import Content, paragraphs, table


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
