"""The plans that `gpu.py` runs, at two scales: `full` for a large GPU, `tiny` for tests of the script itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from executor.calibrate.device_probes import probe_plan
from executor.calibrate.device_survey import Effort
from planner.mesh import Mesh
from planner.model import base_spec, with_sizes
from planner.plan import Plan, ScheduleRecipe, Training, make_plan

LLAMA = {"gated_ffn": True, "norm": "rms", "norm_position": "pre", "positions": "rotary", "causal": True}
BLOCKED = {"attention": "blocked"}


@dataclass(frozen=True)
class Case:
    """A plan by its sizes.

    Attributes:
        name: in tables.
        sizes: hidden, feed-forward, heads, batch, sequence, layers.
        precision: of its kernels.
        mesh: sizes of the axes.
        micro: sequences per forward pass, all of the rank's when 0.
        model: other fields of the model.
        choices: other fields of the plan.
        schedule: name, and chunks per rank.
        training: other fields of the training.
    """

    name: str
    sizes: tuple[int, int, int, int, int, int]
    precision: str = "float32"
    mesh: dict[str, int] = field(default_factory=dict)
    micro: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    schedule: tuple[str, int] = ("1f1b", 1)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Ranks of the mesh."""
        return Mesh(**self.mesh).world_size

    def plan(self) -> Plan:
        """The plan, over the transport that ranks sharing a GPU can use."""
        hidden, ffn, heads, batch, seq, layers = self.sizes
        mesh = Mesh(**self.mesh)
        spec = with_sizes(
            base_spec(), hidden=hidden, ffn_hidden=ffn, heads=heads, seq_len=seq, layers=layers, **self.model
        )
        usual: dict[str, Any] = {"dropout": 0.0, "optimizer": "sgd", "clip_norm": None, "learning_rate": 0.01}
        return make_plan(
            spec, mesh, global_batch_size=batch, micro_batch_size=self.micro or batch // mesh.dp,
            schedule=ScheduleRecipe(name=self.schedule[0], num_model_chunks=self.schedule[1]),
            training=Training(**(usual | self.training | {"precision": self.precision})), transport="staged",
            **self.choices,
        )  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """Sizes of the stages.

    Attributes:
        name: "full" or "tiny".
        checked: sizes of the plans that are compared with one rank.
        stride: through the list of those plans.
        check_precisions: each plan is checked in these.
        measured: one-rank plans, predicted and measured.
        staged: plans of several ranks, predicted and measured.
        benchmark: sizes of the comparison with PyTorch.
        benchmark_precisions: in which it runs.
        rounds: pairs of steps of it.
    """

    name: str
    checked: tuple[int, int, int, int, int, int]
    stride: int
    check_precisions: tuple[str, ...]
    measured: tuple[Case, ...]
    staged: tuple[Case, ...]
    benchmark: tuple[int, int, int, int, int, int]
    benchmark_precisions: tuple[str, ...]
    rounds: int

    def checks(self) -> Iterator[tuple[Case, str]]:
        """Every plan to check, with each precision; one also in the precisions that no goal is set for."""
        for case in islice(_spread(self.checked), 0, None, self.stride):
            for precision in self.check_precisions:
                yield case, precision
        first = next(_spread(self.checked))
        for precision in ("tf32", "float16"):
            yield first, precision

    def plans_by_source(self) -> dict[tuple[str, int], list[Plan]]:
        """Every plan that any stage runs, by what its kernels are compiled for: precision and head size."""
        cases = [*(replace(case, precision=dtype) for case, dtype in self.checks()), *self.measured, *self.staged]
        for precision in self.benchmark_precisions:
            cases += [Case("benchmark", self.benchmark, precision, choices=choices) for choices in (BLOCKED, {})]
        plans = [case.plan() for case in cases]
        if self.name == "full":
            effort = Effort()
            plans += [probe_plan(probe, precision) for precision, _ in effort.shares for probe in effort.probes]
        groups: dict[tuple[str, int], list[Plan]] = defaultdict(list)
        for plan in plans:
            groups[plan.training.precision, plan.model.head_dim].append(plan)
        return dict(groups)


def _spread(sizes: tuple[int, int, int, int, int, int]) -> Iterator[Case]:
    """Every axis, sharding, kind of context parallelism and family of schedules, on 1, 2 and 4 ranks."""

    def case(name: str, **more: Any) -> Case:
        mesh = {axis: more.pop(axis) for axis in ("pp", "dp", "cp", "tp") if axis in more}
        return Case(name, sizes, mesh=mesh, **more)

    adamw = {"optimizer": "adamw", "clip_norm": 0.5, "dropout": 0.1}
    yield case("one rank", training=adamw)
    yield case("one rank, blocked, llama, full recompute", model=LLAMA, choices=BLOCKED | {"recompute": "full"})
    yield case("dp=2", dp=2, micro=2, training=adamw)
    yield case("dp=2 zero 3", dp=2, choices={"zero_stage": 3}, training=adamw)
    yield case("tp=2", tp=2, training={"dropout": 0.1})
    yield case(
        "tp=2 sequence parallel, blocked, llama", tp=2, model=LLAMA, choices=BLOCKED | {"sequence_parallel": True}
    )
    yield case("pp=2 1f1b", pp=2, micro=2)
    yield case("cp=2 all-gather", cp=2, training={"dropout": 0.1})
    yield case("cp=2 ring, causal", cp=2, model=LLAMA, choices={"cp_kind": "ring"})
    yield case("cp=2 ulysses", cp=2, choices={"cp_kind": "ulysses"})
    yield case("dp=2 tp=2 zero 1, overlapped", dp=2, tp=2, choices={"zero_stage": 1, "overlap_gradients": True})
    yield case("pp=2 tp=2 interleaved", pp=2, tp=2, micro=2, schedule=("interleaved", 2))
    yield case("pp=4 zb-1p", pp=4, micro=2, schedule=("zb-1p", 1))
    yield case("cp=2 dp=2 zero 2", cp=2, dp=2, choices={"zero_stage": 2}, training=adamw)


FULL = Scale(
    name="full",
    checked=(256, 1024, 8, 8, 128, 4),
    stride=1,
    check_precisions=("float32", "bfloat16"),
    measured=(
        Case("H=1024 f32 plain", (1024, 4096, 16, 8, 512, 4)),
        Case("H=1024 bf16 plain", (1024, 4096, 16, 8, 512, 4), "bfloat16"),
        Case("H=1024 S=1024 bf16 blocked", (1024, 4096, 16, 4, 1024, 8), "bfloat16", choices=BLOCKED),
        Case("H=2048 bf16 blocked", (2048, 8192, 16, 4, 1024, 4), "bfloat16", choices=BLOCKED),
        Case("H=2048 tf32 plain", (2048, 8192, 16, 2, 2048, 2), "tf32"),
        Case("H=4096 bf16 blocked", (4096, 16384, 32, 4, 2048, 4), "bfloat16", choices=BLOCKED),
        Case("H=4096 f32 blocked", (4096, 16384, 32, 2, 2048, 2), choices=BLOCKED),
        Case("H=768 bf16, 4 micro-batches", (768, 3072, 12, 16, 512, 12), "bfloat16", micro=4),
        Case("H=512 S=128 f32", (512, 2048, 8, 32, 128, 6)),
        Case("H=256 S=128 bf16", (256, 1024, 4, 8, 128, 12), "bfloat16"),
        Case("H=1536 f16 plain, AdamW", (1536, 6144, 24, 8, 768, 4), "float16", training={"optimizer": "adamw"}),
        Case(
            "H=2048 llama bf16, full recompute", (2048, 5632, 16, 4, 1024, 4), "bfloat16", micro=2, model=LLAMA,
            choices=BLOCKED | {"recompute": "full"},
        ),
    ),
    staged=(
        Case("dp=2", (1024, 4096, 16, 8, 512, 4), "bfloat16", {"dp": 2}),
        Case("tp=2", (1024, 4096, 16, 8, 512, 4), "bfloat16", {"tp": 2}),
        Case("pp=2", (1024, 4096, 16, 8, 512, 4), "bfloat16", {"pp": 2}, 2),
        Case("cp=2", (1024, 4096, 16, 8, 512, 4), "bfloat16", {"cp": 2}),
        Case("dp=2 tp=2", (1024, 4096, 16, 8, 512, 4), "bfloat16", {"dp": 2, "tp": 2}),
    ),
    benchmark=(4096, 16384, 32, 4, 2048, 4),
    benchmark_precisions=("float32", "tf32", "bfloat16"),
    rounds=8,
)  # fmt: skip

TINY = Scale(
    name="tiny",
    checked=(32, 64, 4, 8, 16, 4),
    stride=4,
    check_precisions=("float32",),
    measured=(
        Case("H=64 f32 plain", (64, 128, 4, 2, 16, 2)),
        Case("H=64 bf16 blocked", (64, 128, 4, 2, 16, 1), "bfloat16", choices=BLOCKED),
    ),
    staged=(Case("tp=2", (64, 128, 4, 2, 16, 2), "bfloat16", {"tp": 2}),),
    benchmark=(64, 128, 4, 2, 16, 1),
    benchmark_precisions=("bfloat16",),
    rounds=2,
)
SCALES = {scale.name: scale for scale in (FULL, TINY)}
