"""A browser; a plan of four sites (per column, grouped, kept, hostile text) and a report of it."""

from collections.abc import Iterator

import pytest

from fqcompile.report import CompileReport, PassRecord, Plan, Site
from tests.browser import Browser

COLUMN = Site(
    name="layers.10.attn.q_proj.weight",
    kind="linear",
    shape=(1024, 2048),
    status="quantized",
    bits=8,
    group_size=2048,
    bytes_before=4 << 20,
    bytes_after=(2 << 20) + 2048,
    relative_error=0.01,
    kernel="x86_int8",
)
GROUPED = Site(
    name="layers.2.mlp.experts.down_proj",
    kind="experts",
    shape=(8, 1024, 2048),
    status="quantized",
    bits=4,
    group_size=64,
    bytes_before=32 << 20,
    bytes_after=9 << 20,
    relative_error=0.09,
    kernel="dequant_gemm 16x64x64x1w4s3",
    recipe=object(),
)
ROUTER = Site(
    name="layers.2.mlp.router.weight",
    kind="linear",
    shape=(8, 2048),
    status="kept",
    reason="feeds a top-k: routers are kept",
    bytes_before=32768,
    bytes_after=32768,
)
HOSTILE = Site(
    name='<script>alert("x")</script>',
    kind="linear",
    shape=(3, 5),
    status="kept",
    reason="a < b & c > d 'quoted' $title",
    bytes_before=60,
    bytes_after=60,
)
BEFORE = "def forward(x, w):\n    y = linear(x, w)\n    return y\n"
AFTER = "def forward(x, w):\n    y = fqcompile_linear(x, w)\n    return y\n"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def plan() -> Plan:
    return Plan((COLUMN, GROUPED, ROUTER, HOSTILE), {"bits": 4, "include": []})


@pytest.fixture
def report(plan: Plan) -> CompileReport:
    return CompileReport(
        graph="forward/0",
        plan=plan,
        passes=(
            PassRecord("capture", 0.25, 0),
            PassRecord("rewrite", 0.125, 1, ("linear<0>",), BEFORE, AFTER),
        ),
        warnings=("weight & buffer share storage",),
        versions={"torch": "2.13.0", "fqcompile": "0.1"},
        total_seconds=1.5,
    )
