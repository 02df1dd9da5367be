"""The section of `bench export`: what writing and reading other formats takes."""

from bench.core.section import Content, left_out, paragraphs, table

_MIB = 2**20


def export(content: Content) -> str:
    """A line for each way; the layers whose codes and scales were compared."""
    lines = []
    for row in content["rows"]:
        if "failure" in row:
            lines.append([row["way"], row["failure"]])
            continue
        sizes = [f"{row[key] / _MIB:.0f}" for key in ("read", "written", "peak")]
        compared = f"{row['equal']} of {row['equal'] + row['different']}" if "equal" in row else ""
        lines.append([row["way"], f"{row['seconds']:.1f}", *sizes, compared])
    headers = ("way", "seconds", "MiB read", "MiB written", "peak MiB", "layers equal")
    what = (
        "A checkpoint in bf16 in the shape of Llama 3 8B with fewer layers; peak: the most that "
        "was resident, mapped files included, beyond what imports take."
    )
    return paragraphs(what, table(lines, headers), left_out(content))
