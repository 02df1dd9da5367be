"""Selection: the first template that does not refuse, as text, and every reason where all do."""

from dataclasses import replace

import pytest
import torch

from fqcompile.errors import NoKernelError
from fqcompile.kernels import registry
from fqcompile.kernels.epilogue import HAS_TRITON
from fqcompile.kernels.registry import TEMPLATES, KernelChoice, parse_kernel, select_kernel
from fqcompile.kernels.spec import A100, DENSE, H200, GemmSpec, LaunchTable, TileConfig
from fqcompile.native import library as native_library

BF16 = torch.bfloat16
SPEC = GemmSpec(4, 64, 128, 4, 64, BF16, BF16, "cpu")
ON_H200 = replace(SPEC, device_type="cuda", gpu=H200)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "aten_int4pack"),
        ({"m": 65}, "dequantize"),
        ({"bits": 8, "group_size": 128}, "aten_int8pack"),
        ({"bits": 8}, "dequantize"),
        ({"bits": 8, "k": 100, "group_size": 100}, "dequantize"),
        ({"dtype": torch.float32}, "dequantize"),
        ({"needs_backward": True}, "dequantize"),
        ({"group_size": 128, "n": 63}, "dequantize"),
    ],
    ids=str,
)
def test_first_template_that_takes_it_is_chosen_where_ours_is_not_built(
    changes: dict[str, object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_library, "refusal", lambda: "no C++ compiler")
    assert str(select_kernel(replace(SPEC, **changes))) == expected


@pytest.mark.skipif(native_library.refusal() is not None, reason=str(native_library.refusal()))
@pytest.mark.parametrize("changes", [{}, {"m": 65, "bits": 8}, {"group_size": 5, "n": 63}], ids=str)
def test_our_own_kernel_is_preferred_on_a_cpu(changes: dict[str, object]) -> None:
    assert str(select_kernel(replace(SPEC, needs_backward=True, **changes))) == "x86_stream"


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_cuda_goes_to_triton_with_a_configuration_for_its_rows() -> None:
    spec = replace(SPEC, device_type="cuda", gpu=H200)
    choice = select_kernel(spec)
    assert choice.template.name == "triton_gemm"
    assert choice.launches is not None
    assert [bound for bound, _ in choice.launches.steps] == [None]
    opened = select_kernel(replace(spec, n=4096, k=4096, m_range=(1, None))).launches
    assert opened is not None
    assert opened.steps[-1] == (None, DENSE)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_cuda_without_a_gpu_dequantizes() -> None:
    assert str(select_kernel(replace(SPEC, device_type="cuda"))) == "dequantize"


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"gpu": A100}, None),
        ({"device_type": "cpu", "dtype": torch.float32, "gpu": None}, None),
        ({"dtype": torch.float32}, "takes fp16 or bf16 activations, not torch.float32"),
        ({"group_size": 24}, "takes groups of a multiple of 16, not 24"),
        ({"gpu": replace(H200, name="Tesla T4", arch="sm_75")}, "8.0 or later; Tesla T4 has sm_75"),
        (
            {"gpu": replace(H200, shared_bytes=16 << 10)},
            "needs 20992 bytes of shared memory for each program; NVIDIA H200 has 16384",
        ),
    ],
)
def test_what_each_call_on_a_gpu_would_dequantize_is_told(
    changes: dict[str, object], why: str | None
) -> None:
    spec = replace(ON_H200, **changes)
    found = registry.dequantized_because(spec)
    assert found is None if why is None else why in str(found)
    assert (select_kernel(spec).template.name == "dequantize") is (why is not None)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_without_triton_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TRITON", ())
    assert registry.dequantized_because(ON_H200) == "Triton is not installed"


def test_no_kernel_lists_every_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = {
        name: replace(template, refuse=lambda spec, name=name: f"{name} has a reason")
        for name, template in TEMPLATES.items()
    }
    monkeypatch.setattr(registry, "TEMPLATES", refusing)
    with pytest.raises(NoKernelError) as caught:
        select_kernel(SPEC)
    text = str(caught.value)
    assert text.startswith("no kernel for GemmSpec(m=4, n=64, k=128, bits=4")
    assert text.splitlines()[1:] == [f"  {name}: {name} has a reason" for name in TEMPLATES]


def test_preference_is_the_order_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TEMPLATES", dict(reversed(TEMPLATES.items())))
    assert str(select_kernel(SPEC)) == "dequantize"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "launches",
    [
        None,
        LaunchTable.of(DENSE),
        LaunchTable(((16, TileConfig(16, 64, 128, num_stages=2)), (None, DENSE))),
    ],
    ids=str,
)
def test_parse_kernel_reads_what_str_wrote(name: str, launches: LaunchTable | None) -> None:
    choice = KernelChoice(TEMPLATES[name], launches)
    assert parse_kernel(str(choice)) == choice


def test_parse_kernel_names_what_is_installed() -> None:
    with pytest.raises(
        NoKernelError, match=r"kernel 'marlin' is not installed; there are .*aten_int4pack"
    ):
        parse_kernel("marlin:16x16x16x1w4s3")


def test_dequantize_refuses_nothing() -> None:
    assert list(TEMPLATES)[-1] == "dequantize"
    assert TEMPLATES["dequantize"].refuse(replace(SPEC, device_type="xpu")) is None


def test_spec_of_a_gated_matmul_has_twice_the_rows() -> None:
    assert (SPEC.weight_rows, replace(SPEC, gated=True).weight_rows) == (64, 128)
