"""`bench startup`: who shares which caches, what is concluded, and that parts add up."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the bench extra is not installed")

from bench.core.processes import ChildFailed, in_fresh_process
from bench.core.results import Results, Row
from bench.start import startup
from bench.start.section import medians
from bench.start.section import startup as section
from tests.bench.made_up_results import cells, content

SPENT = ("dynamo", *dict.fromkeys(startup.TIMED.values()), "run")  # of the first call
PARTS = ("total", "import", "first call", *SPENT)


def row(caches: str, total: float, backend: str = "finequant") -> Row:
    seconds = dict.fromkeys(PARTS, total / 10) | {"total": total, "first call": total / 2}
    return {"backend": backend, "caches": caches, "seconds": seconds}


def test_figures_are_medians_beside_the_cold_start() -> None:
    rows = [row("cold", t) for t in (30.0, 20.0, 90.0)] + [row("warm", t) for t in (6.0, 60.0, 5.0)]
    rows.append({"backend": "inductor", "caches": "cold", "failure": "ChildFailed: no compiler"})
    found = medians(rows)
    assert {name: start["total"] for name, start in found.items()} == {
        "finequant, cold": 30.0,
        "finequant, warm": 6.0,
    }
    text = section(content(rows, rounds=3))
    assert cells(text, "finequant, warm")[1:4] == ["6.0", "0.6", "3.0"]
    assert "No figure: inductor, cold: ChildFailed: no compiler." in text


def test_starts_run_in_turn_and_share_the_caches_of_their_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, str, str | None]] = []

    def run(module: str, flags: list[str], environment: dict[str, str]) -> Row:
        assert module == "bench.start.startup"
        folder = Path(environment["TORCHINDUCTOR_CACHE_DIR"]).parent
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        size = environment.get("FQCOMPILE_CACHE_SIZE")
        seen.append((flags[flags.index("--here") + 1], "new" if new else "old", size))
        if size == "0":
            raise ChildFailed("it ended")
        return {"seconds": {}, "graphs": 1, "logits": [1.0]}

    monkeypatch.setattr(startup, "in_fresh_process", run)
    results = Results({}, {})
    for number in range(2):
        startup.one_round(startup.parse(["--size", "tiny"]), results, number)
    one_round = [
        ("inductor", "new", None),
        ("inductor", "old", None),
        ("finequant", "new", None),
        ("finequant", "old", None),
        ("finequant", "old", "0"),
    ]
    assert seen == one_round * 2
    failed = [r for r in results.rows if "failure" in r]
    assert [r["failure"] for r in failed] == ["ChildFailed: it ended"] * 2
    assert [r["round"] for r in failed] == [0, 1]


def test_a_start_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(module: str, flags: list[str], environment: dict[str, str]) -> Row:
        wrong = environment.get("FQCOMPILE_CACHE_SIZE") == "0"
        logits = [1.0, 1.5 if wrong else 1.0]  # within 4 bits of Inductor's, not of ours
        return {"seconds": dict.fromkeys(PARTS, 1.0), "graphs": 1, "logits": logits}

    monkeypatch.setattr(startup, "in_fresh_process", run)
    results = Results({}, {})
    startup.one_round(startup.parse(["--size", "tiny"]), results, 0)
    failed = [row for row in results.rows if "failure" in row]
    assert [row["caches"] for row in failed] == ["warm, no weights"]
    assert failed[0]["failure"].startswith("wrong result: 0.35 from finequant, cold")
    assert len(medians(results.rows)) == 4
    assert not any("logits" in row for row in results.rows)


@pytest.fixture
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in startup.TIMED:
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.usefixtures("as_it_was")
def test_the_parts_of_a_start_add_up() -> None:
    seconds, logits = startup.start("eager", "tiny", 2.0)
    assert len(logits) == 256
    assert set(seconds) == set(PARTS)
    assert seconds["total"] == pytest.approx(2.0 + seconds["first call"])
    parts = [seconds[part] for part in SPENT]
    assert sum(parts) == pytest.approx(seconds["first call"])
    assert all(part >= 0 for part in parts)
    assert seconds["run"] > 0


def test_a_function_that_calls_itself_is_timed_once() -> None:
    seconds = {"part": 0.0}

    def down(depth: int) -> int:
        return depth and run(depth - 1)

    run: Any = startup.timed(down, "part", seconds, [])
    ticks = iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup.time, "perf_counter", lambda: next(ticks))
        assert run(3) == 0
        assert run(0) == 0
    assert seconds["part"] == 2  # a tick for each of the two outer calls


def test_a_part_within_another_is_taken_off_that_one() -> None:
    seconds, active = {"inner": 0.0, "outer": 0.0}, list[str]()
    inner = startup.timed(lambda: None, "inner", seconds, active)
    outer = startup.timed(lambda: [inner(), inner()], "outer", seconds, active)
    ticks = iter([10, 11, 14, 20, 22, 100])  # the outer one's begin, two inner ones, its end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup.time, "perf_counter", lambda: next(ticks))
        outer()
    assert seconds == {"inner": 3 + 2, "outer": 90 - 5}


def test_a_process_is_as_old_as_it_is() -> None:
    age = startup.since_creation()
    assert 0 < age < 10_000
    assert age < startup.since_creation() + 1


def test_a_fresh_process_gives_its_last_line_or_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "child_of_a_test.py").write_text(
        "import json, os, sys\n"
        "if sys.argv[1] == 'bad': raise SystemExit('no such way')\n"
        "if sys.argv[1] == 'worse': sys.exit('OptionError: that one\\n\\nSet THIS=1 for more')\n"
        "print('more'); print(json.dumps({'way': sys.argv[1], 'set': os.environ['SET']}))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = in_fresh_process("child_of_a_test", ["good"], {"SET": "1"})
    assert found == {"way": "good", "set": "1"}
    with pytest.raises(ChildFailed, match=r"^no such way$"):
        in_fresh_process("child_of_a_test", ["bad"])
    with pytest.raises(ChildFailed, match=r"^OptionError: that one$"):
        in_fresh_process("child_of_a_test", ["worse"])
    with pytest.raises(ChildFailed, match="No module named no_such_module"):
        in_fresh_process("no_such_module", [])
