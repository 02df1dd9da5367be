"""Writes the README's tables of results from `results/*/*.json`, between their markers.

    python -m bench readme [--check]

    <!-- bench:kernels -->
    ... is replaced ...
    <!-- /bench:kernels -->

Results that are not there leave everything as it is. With --check nothing is written, and it fails
where the README and the results differ.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.kernel_table import by_layer, our_best, timed_names
from bench.model_table import tokens_per_second
from bench.results import RESULTS, Row, stored

README = Path(__file__).parent.parent / "README.md"


def kernel_section(results: Mapping[str, Any]) -> str:
    """Microseconds of each contender; ours is the fastest of our ways. Losses are shown."""
    rows: list[Row] = results["rows"]
    others = [name for name in timed_names(rows) if not name.startswith("fqcompile")]
    headers = ["layer", "M", "fqcompile", "of ideal", *others, "over cuBLAS"]
    lines = []
    for (n, k, m), ways in by_layer(rows).items():
        best = our_best(ways)
        if best is None:
            continue
        over = best["over_cublas"]
        times = [_microseconds(ways.get(name, {})) for name in others]
        ratio = "" if over is None else f"{over:.2f}x"
        lines.append(
            [f"{n} x {k}", m, _microseconds(best), f"{best['of_ideal']:.0%}", *times, ratio]
        )
    s = results["settings"]
    what = f"int{s['bits']}, group {s['group']}, {s['dtype']}; µs, medians [20th, 80th percentile]"
    return _section(results, what, lines, headers)


def model_section(results: Mapping[str, Any]) -> str:
    """Whole models only, measured or extrapolated, which is said."""
    lines = []
    for row in results["rows"]:
        if "ms" not in row or row["layers"] != row["of_layers"]:
            continue
        found = row.get("extrapolated_from")
        note = "" if found is None else f"extrapolated from {found[0]} and {found[1]} layers"
        over = row["over_inductor"]
        ratio = "" if over is None else f"{over:.2f}x"
        work = f"{row['phase']} {row['tokens']}"
        ms, rate = f"{row['ms']:.2f}", f"{tokens_per_second(row):.0f}"
        lines.append([row["model"], work, row["batch"], row["way"], ms, rate, ratio, note])
    headers = ["model", "work", "batch", "way", "ms", "tokens/s", "over inductor", ""]
    return _section(results, f"{results['settings']['dtype']}, medians", lines, headers)


def tune_section(results: Mapping[str, Any]) -> str:
    """The best of each case and what the choice without measuring loses to it."""
    lines = []
    for case in results["rows"]:
        measured = {t["config"]: t for t in case["trials"] if "refusal" not in t}
        for name, timing in case["final"].items():
            of_ideal = case["ideal_us"] / timing["microseconds"]
            measured[name] = timing | {"of_ideal": of_ideal}
        best = measured.get(case["best"])
        if best is None:
            continue
        times = "{microseconds:.1f} [{low:.1f}, {high:.1f}]".format(**best)
        over = case["choice_over_best"]
        ratio = "" if over is None else f"{over:.2f}x, {case['verdict']}"
        stack = f"{case['experts']} x " if case["experts"] else ""
        layer = f"{stack}{case['n']} x {case['k']}"
        tried = len(case["trials"])
        found = [case["best"], times, f"{best['of_ideal']:.0%}", case["choice"], ratio, tried]
        lines.append([layer, case["rows"], *found])
    headers = ["layer", "M", "best", "µs", "of ideal", "chosen unmeasured", "takes", "tried"]
    s = results["settings"]
    what = f"int{s['bits']}, group {s['group']}, {s['dtype']}; medians [20th, 80th percentile]"
    return _section(results, what, lines, headers)


SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "kernels": kernel_section,
    "models": model_section,
    "tune": tune_section,
}


def _section(
    results: Mapping[str, Any], what: str, lines: Sequence[Sequence[Any]], headers: Sequence[str]
) -> str:
    about = results["identity"]
    versions = [f"{key} {about[key]}" for key in ("torch", "triton", "driver") if key in about]
    place = (
        f"{about['device']}, {', '.join(versions)}, commit {about['commit']}: `{about['command']}`"
    )
    table = tabulate(lines, headers, tablefmt="github", disable_numparse=True)
    left = results["left_out"]
    rest = f"\n\nLeft out: {', '.join(left)}." if left else ""
    return f"{place}. {what}.\n\n{table}{rest}"


def _microseconds(row: Row) -> str:
    return f"{row['us']:.1f} [{row['low']:.1f}, {row['high']:.1f}]" if "us" in row else ""


def with_results(text: str, root: Path) -> str:
    """The README `text` with every section for which there are results.

    Raises:
        ValueError: it has no markers for one of them.
    """
    for name, section in SECTIONS.items():
        found = [section(results) for results in stored(name, root)]
        if not found:
            continue
        start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if start not in text or end not in text.partition(start)[2]:
            raise ValueError(f"there are results of {name}, and no place for them: {start} {end}")
        before, _, rest = text.partition(start)
        after = rest.partition(end)[2]
        body = "\n\n".join(found)
        text = f"{before}{start}\n\n{body}\n\n{end}{after}"
    return text


def main(argv: Sequence[str] | None = None, readme: Path = README, root: Path = RESULTS) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail where they differ")
    arguments = parser.parse_args(argv)
    text = readme.read_text(encoding="utf-8")
    try:
        wanted = with_results(text, root)
    except ValueError as error:
        raise SystemExit(f"{readme.name}: {error}") from error
    if wanted == text:
        print(f"{readme.name} is as the results have it")
    elif arguments.check:
        raise SystemExit(f"{readme.name} differs from the results: python -m bench readme")
    else:
        readme.write_text(wanted, encoding="utf-8")
        print(f"{readme.name} has new results")


if __name__ == "__main__":
    main()
