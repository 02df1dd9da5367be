"""Ways to run one layer on a CPU, on the same codes and scales: ours and other libraries'.

fqcompile            our kernel, by activation type
aten int4pack        PyTorch's own packed kernels
F.linear             on the dequantized weight, compiled by Inductor
onnxruntime          MatMulNBits; level 0 computes in fp32, level 4 quantizes activations to int8
openvino             its plugin for CPUs on compressed weights; "int8" quantizes activations

torchao's int4 for CPUs calls the kernel of `aten int4pack`, so it has no column of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.shapes import OURS
from fqcompile.kernels.cpu.aten_packed import INT4PACK, INT8PACK
from fqcompile.kernels.cpu.stream import X86_STREAM
from fqcompile.kernels.op import matmul_inference
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.template import Template
from fqcompile.native import library as native_library
from fqcompile.tensor.codes import unpack
from fqcompile.tensor.format import INT4, UNIFORM, Format
from fqcompile.tensor.quantized import QuantizedTensor

# Calls on one copy of a weight lie so many bytes of other copies apart: three times this L3.
APART = 96 << 20
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Way:
    """`run(x, weights[i])` is the layer, for x of `dtype`.

    Attributes:
        loose: it quantizes x, so its result may be off by that.
        compiles: in its first call for each number of rows.
    """

    name: str
    detail: str
    dtype: torch.dtype
    run: Callable[[Tensor, Any], Tensor]
    weights: Sequence[Any]
    loose: bool = False
    compiles: bool = False


def copies_of(nbytes: int) -> int:
    return max(2, -(-APART // nbytes) + 1)


def ways(weight: QuantizedTensor) -> Iterator[Way]:
    """All that take this weight and are installed. They compile and pack when asked for."""
    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        yield _template(
            weight, X86_STREAM, f"{OURS} {name}", dtype, native_library.native_library().isa
        )
    aten = INT4PACK if weight.bits == 4 else INT8PACK
    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        if aten.refuse(_spec(weight, BF16)) is None and (dtype == BF16 or weight.bits == 4):
            yield _template(
                weight, aten, f"aten int{weight.bits}pack {name}", dtype, torch.__version__
            )
    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        yield _dense(weight, f"F.linear {name}", dtype)
    if find_spec("onnxruntime") and find_spec("onnx") and weight.bits == 4:
        for level in (0, 4):
            yield _onnxruntime(weight, level)
    if find_spec("openvino") and weight.bits == 4 and weight.shape[1] % weight.group_size == 0:
        for quantized in (False, True):
            yield _openvino(weight, quantized)


def _spec(weight: QuantizedTensor, dtype: torch.dtype) -> GemmSpec:
    n, k = weight.shape
    return GemmSpec(1, n, k, weight.bits, weight.group_size, dtype, weight.scale.dtype, "cpu")


def _template(
    weight: QuantizedTensor, template: Template, name: str, dtype: torch.dtype, detail: str
) -> Way:
    # aten's kernels want scales of x's type.
    scale = weight.scale if template is X86_STREAM else weight.scale.to(dtype)
    own = QuantizedTensor(
        weight.qweight, scale, Format(weight.bits, weight.group_size, *weight.shape)
    )
    # Each is packed, as those of a model are: a copy would lie in other memory.
    packed = [template.layout.pack(own) for _ in range(copies_of(own.nbytes))]
    n, k = weight.shape
    form = (weight.bits, UNIFORM, weight.group_size, n, k, "none", False, template.name)

    def run(x: Tensor, one: QuantizedTensor) -> Tensor:
        y: Tensor = matmul_inference(x, *one.tensors, None, None, *form, None, None, False)
        return y

    return Way(name, detail, dtype, run, packed)


def _dense(weight: QuantizedTensor, name: str, dtype: torch.dtype) -> Way:
    w_hat = weight.dequantize(dtype)
    run = torch.compile(lambda x, w: F.linear(x, w), dynamic=False)
    copies = [w_hat, *(w_hat.clone() for _ in range(copies_of(w_hat.nbytes) - 1))]
    return Way(name, torch.__version__, dtype, run, copies, compiles=True)


def _onnxruntime(weight: QuantizedTensor, level: int) -> Way:
    runtime = import_module("onnxruntime")
    model = _matmul_nbits(weight, level)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would spin on the cores where the others are measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    count = copies_of(weight.nbytes)
    sessions = [
        runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(count)
    ]

    def run(x: Tensor, session: Any) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    name = f"onnxruntime level {level}"
    return Way(name, version("onnxruntime"), FP32, run, sessions, loose=level == 4)


def _matmul_nbits(weight: QuantizedTensor, level: int) -> bytes:
    """A model of one MatMulNBits: codes plus 8, the even column in the low half, as ours."""
    onnx = import_module("onnx")
    helper, kinds, n, k = onnx.helper, onnx.TensorProto, *weight.shape
    group = weight.group_size
    blocks = unpack(weight.qweight, INT4, k).view(n, k // group, group).to(torch.int16) + 8
    halves = (blocks[..., ::2] | blocks[..., 1::2] << 4).to(torch.uint8).contiguous()
    codes = onnx.numpy_helper.from_array(halves.numpy(), "codes")
    scale = onnx.numpy_helper.from_array(weight.scale.float().flatten().numpy(), "scale")
    form = {"K": k, "N": n, "bits": 4, "block_size": group, "accuracy_level": level}
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft", **form
    )
    x = helper.make_tensor_value_info("x", kinds.FLOAT, ["m", k])
    y = helper.make_tensor_value_info("y", kinds.FLOAT, ["m", n])
    graph = helper.make_graph([node], "layer", [x], [y], [codes, scale])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return model


def _openvino(weight: QuantizedTensor, quantized: bool) -> Way:
    """bf16 inside; `quantized`: activations become int8 in groups of 128, its default."""
    ov = import_module("openvino")
    model = _compressed_matmul(weight)
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128" if quantized else "0",
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = ov.Core()
    requests = [
        core.compile_model(model, "CPU", settings).create_infer_request()
        for _ in range(copies_of(weight.nbytes))
    ]

    def run(x: Tensor, request: Any) -> Tensor:
        return torch.from_numpy(request.infer([x.numpy()])[0])

    name = "openvino int8" if quantized else "openvino bf16"
    return Way(name, version("openvino"), FP32, run, requests, loose=quantized)


def _compressed_matmul(weight: QuantizedTensor) -> Any:
    """(codes - 8) * scale as its plugin recognizes compressed weights; codes as ours, unsigned."""
    ov, ops = import_module("openvino"), import_module("openvino.opset13")
    (n, k), group = weight.shape, weight.group_size
    shape = ov.Shape([n, k // group, group])
    packed = weight.qweight.view(n, k // group, group // 2).numpy()
    codes = ops.convert(ov.op.Constant(ov.Tensor(packed, shape, ov.Type.u4)), "f32")
    eight = torch.full((1, 1, 1), 8, dtype=torch.uint8).numpy()
    offset = ops.convert(ov.op.Constant(ov.Tensor(eight)), "f32")
    scale = ops.constant(weight.scale.float()[:, :, None].numpy())
    scaled = ops.multiply(ops.subtract(codes, offset), scale)
    dense = ops.reshape(scaled, ops.constant(torch.tensor([n, k]).numpy()), False)
    x = ops.parameter([-1, k], ov.Type.f32)
    return ov.Model([ops.matmul(x, dense, False, True)], [x])
