"""llm-compressor itself reads exports: every parameter has the values that the export's codes mean.

`make test-engines` installs it in .venv-llmcompressor; where that is not, these tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("compressed_tensors", reason="the dev extra is not installed")

from tests.interop.models import assert_same_tensors, library_dense
from tests.interop.test_engines import EXPORTS, ROOT, exports  # noqa: F401  (the fixture)
from tests.interop.writers import write_dense

PYTHON = Path(os.environ.get("FQTEST_LLMCOMPRESSOR", ROOT / ".venv-llmcompressor"), "bin", "python")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make test-engines` installs llm-compressor"),
]


@pytest.fixture(scope="module")
def read(
    exports: dict[str, Path],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Tensor]]:
    """The parameters of each export as llm-compressor has them."""
    folder = tmp_path_factory.mktemp("read")
    outs = {name: folder / f"{i}.safetensors" for i, name in enumerate(exports)}
    tasks = [{"directory": str(at), "out": str(outs[name])} for name, at in exports.items()]
    (folder / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    script = ROOT / "tests" / "interop" / "llmcompressor_reader.py"
    done = subprocess.run(
        [PYTHON, "-W", "ignore", script, folder / "tasks.json"],
        cwd=folder, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: load_file(out) for name, out in outs.items()}


@pytest.mark.parametrize("name", EXPORTS)
def test_parameters_are_those_of_the_dequantized_model(
    name: str,
    exports: dict[str, Path],  # noqa: F811
    read: dict[str, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    plain = exports[name].with_name(f"{exports[name].name}-dense")
    dense = write_dense(plain, tmp_path / "dense", library_dense(exports[name]))
    left = ("weight_scale", "weight_shape")  # they stay beside what they were read with
    weights = {n: tensor for n, tensor in read[name].items() if not n.endswith(left)}
    assert_same_tensors(weights, hf.AutoModelForCausalLM.from_pretrained(dense).state_dict())
