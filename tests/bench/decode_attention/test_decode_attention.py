"""The benchmark of attention: a tiny case runs, and its section counts what the rows say."""

import argparse
from typing import Any

import pytest
import torch

from bench.core.results import Row
from bench.decode_attention import run
from bench.decode_attention.section import decode_attention, decode_attention_short
from tests.bench.made_up_results import cells, content


def row(way: str, us: float, **more: Any) -> Row:
    about = {"shape": "tiny", "context": 512, "dtype": "bfloat16", "threads": 1, "bytes": 100}
    return {**about, "way": way, "us": us, "low": us - 1, "high": us + 1, **more}


def test_the_section_counts_what_is_within_the_target() -> None:
    rows = [row("fqcompile", 30.0), row("inductor", 90.0), row("read", 20.0)]
    rows += [row("fqcompile", 31.0, threads=2), row("read", 20.0, threads=2)]
    failed = row("inductor", 0.0, threads=2, failure="wrong")
    del failed["us"]
    rows.append(failed)
    text = decode_attention(content(rows))
    expected = ["30 [29, 31]", "90 [89, 91]", "20 [19, 21]", "1.50", "3.00"]
    assert cells(text, "tiny") == ["tiny", "512", "bfloat16", "1", *expected]
    assert "In 1 of 2 cases" in text and "Left out: x: no time." in text
    assert "In 1 of 1 cases" in decode_attention_short(content(rows))


def test_a_tiny_case_is_right_and_has_all_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.SHAPES, "tiny", (1, 2, 16))
    monkeypatch.setattr(run, "LAYERS", 2)
    monkeypatch.setattr(run, "CACHES", 1 << 14)
    arguments = argparse.Namespace(
        shapes=["tiny"], contexts=[32], dtypes=["float32"], threads=[torch.get_num_threads()]
    )
    with torch.no_grad():
        ((_, rows),) = run.steps(arguments)
        found = {r["way"]: r for r in rows()}
    assert set(found) == {"fqcompile", "inductor", "read"}
    assert all(r["us"] > 0 and r["bytes"] == 2 * 32 * 16 * 4 for r in found.values()), found


@pytest.mark.parametrize(
    "given", ["--dtypes float64", "--dtypes foo", "--contexts 0", "--contexts x", "--threads 0"]
)
def test_what_it_cannot_time_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(given.split())
    option, value = given.split()
    assert f"argument {option}: {value!r} is not a list of" in capsys.readouterr().err
