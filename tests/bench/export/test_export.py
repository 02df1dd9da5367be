"""`bench export` on a tiny model: ways have their rows, and a changed code is seen."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the bench extra is not installed")

from safetensors.torch import load_file, save_file

from bench.export.run import WAYS, compared, main, make
from fqcompile.interop.export import export


@pytest.mark.slow
def test_ways_have_rows_and_equal_codes(tmp_path: Path) -> None:
    target, ways = tmp_path / "export.json", ["export, serve", "load"]
    assert set(ways) < set(WAYS)
    flags = ["--size", "tiny", "--layers", "1", "--threads", "1", "--json", str(target)]
    main([*flags, "--way", *ways])
    rows = {row["way"]: row for row in json.loads(target.read_text())["rows"]}
    assert list(rows) == ways
    assert not [row["failure"] for row in rows.values() if "failure" in row]
    assert {row["equal"] for row in rows.values() if row["written"]} == {7}
    assert all(row["peak"] > 0 < row["seconds"] for row in rows.values())


def test_a_changed_code_is_seen(tmp_path: Path) -> None:
    make(tmp_path, "tiny", 2)
    export(tmp_path / "saved", tmp_path / "way")
    assert compared("way", tmp_path) == {"equal": 14, "different": 0}
    path = tmp_path / "way" / "model.safetensors"
    tensors = load_file(path)
    next(t for n, t in tensors.items() if n.endswith("v_proj.weight_packed"))[3, 0] ^= 1 << 20
    next(t for n, t in tensors.items() if n.endswith("o_proj.weight_scale"))[3, 0] *= 2
    save_file(tensors, path)
    assert compared("way", tmp_path) == {"equal": 12, "different": 2}
