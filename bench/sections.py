"""Every kind of result that is shown: where, from which files, and how."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.accuracy.draws_section import draws
from bench.accuracy.section import accuracy, accuracy_short
from bench.core.section import Content
from bench.decode_attention.section import decode_attention, decode_attention_short
from bench.experts.section import expert_decode, expert_decode_short
from bench.export.section import export
from bench.kernels.section import cpu_kernels, cpu_kernels_short, gpu_kernels
from bench.launch_overhead.section import launch_overhead, launch_overhead_short
from bench.models.section import models, models_short
from bench.start.section import memory, startup
from bench.static.section import predictions, static, static_short

Render = Callable[[Content], str]


@dataclass(frozen=True)
class Section:
    """One kind.

    Attributes:
        name: between <!-- bench:name --> and <!-- /bench:name --> its place is in docs/results.md.
        files: of the results, without a device and ".json"; a "*" stands for anything.
        full: every row of one file of them.
        short: the telling rows of the file called `name`; None where that is the same.
    """

    name: str
    title: str
    files: str
    full: Render
    short: Render | None = None


SECTIONS = (
    Section("accuracy-draws", "Quality of real models", "accuracy-draws", draws),
    Section("accuracy", "Quality of small models", "accuracy", accuracy, accuracy_short),
    Section("models", "Whole models on a GPU", "models", models, models_short),
    Section("models-cpu", "Whole models on a CPU", "models-cpu*", models, models_short),
    Section("kernels", "Layers on a GPU", "kernels", gpu_kernels),
    Section("kernels-cpu", "Layers on a CPU", "kernels-cpu*", cpu_kernels, cpu_kernels_short),
    Section(
        "expert-decode",
        "A layer of experts on a CPU",
        "expert-decode",
        expert_decode,
        expert_decode_short,
    ),
    Section(
        "decode-attention",
        "Attention of one query on a CPU",
        "decode-attention",
        decode_attention,
        decode_attention_short,
    ),
    Section("memory", "Memory", "memory", memory),
    Section("static", "Machine code of the GPU kernels", "static*", static, static_short),
    Section("predicted", "Times of GPU kernels, predicted", "predicted", predictions),
    Section(
        "launch-overhead",
        "A call on the host",
        "launch-overhead",
        launch_overhead,
        launch_overhead_short,
    ),
    Section("export", "Export to serving engines", "export", export),
    Section("startup", "First and second start", "startup", startup),
)
