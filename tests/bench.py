"""Print how fast the executor is beside its machine: `make bench`, or `python tests/bench.py [--quick] [--hidden 768]`.

Everything that is compared runs in turn, a few steps of each at a time, and is divided pair by pair, so that a change
of the machine's clock or of its other load falls on both sides; a row gives the median of the ratios and the range of
their middle half. A rate is a share of the sgemm rate of the same process (2048 x 2048 x 2048), because the same NumPy
runs twice as fast or as slow depending on the kernels of its BLAS. The PyTorch rows need an interpreter that has torch:
name it in TORCH_PYTHON. Plans of several ranks are what the planner makes of the mesh on this machine, profiled first:
it chooses the algorithms of the collectives, and whether reductions start early.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import msgspec
import numpy as np
from torch_process import Torch

from executor import kernels
from executor.comm.loopback import run_loopback
from executor.data import Batches
from executor.environment import describe_environment
from executor.runtime import Runtime
from planner.cost.algorithms import fix_collectives
from planner.machine import Machine, load_machine
from planner.mesh import Mesh
from planner.model import ModelSpec, base_spec, model_flops, with_sizes
from planner.plan import Plan, ScheduleRecipe, Training, dump_plan, make_plan
from planner.predict import predict


class Sizes(NamedTuple):
    """A configuration: hidden, feed-forward, heads, batch, sequence, layers."""

    hidden: int
    ffn: int
    heads: int
    batch: int
    seq: int
    layers: int

    def model(self) -> ModelSpec:
        """The whole model: byte vocabulary, embedding and head."""
        return with_sizes(
            base_spec(), hidden=self.hidden, ffn_hidden=self.ffn, heads=self.heads, seq_len=self.seq, layers=self.layers
        )

    def plan(self, *, weak: int = 1, micro_batches: int = 1, **mesh: int) -> Plan:
        """A plan for this configuration; `weak` multiplies the global batch."""
        shape, total = Mesh(**mesh), self.batch * weak
        return make_plan(
            self.model(), shape, global_batch_size=total, micro_batch_size=total // shape.dp // micro_batches,
            schedule=ScheduleRecipe(name="1f1b"),
            training=Training(dropout=0.0, optimizer="sgd", clip_norm=None, learning_rate=0.01),
        )  # fmt: skip


CONFIGURATIONS = (Sizes(512, 2048, 8, 16, 128, 4), Sizes(768, 3072, 12, 16, 128, 4))


class Row(NamedTuple):
    """One line of the table; `values` are the ratios of the pairs."""

    what: str
    values: list[float]
    goal: str
    met: bool | None
    note: str = ""

    def as_text(self) -> str:
        """The row for the table."""
        verdict = {True: "yes", False: "NO", None: ""}[self.met]
        if not self.values:
            return f"{self.what:64s} {'-':>20s}  {self.goal:>8s} {verdict:4s} {self.note}"
        low, _, high = quantiles(self.values, n=4) if len(self.values) > 1 else (self.values[0],) * 3
        figure = f"{median(self.values):.3f} [{low:.3f}-{high:.3f}]"
        return f"{self.what:64s} {figure:>20s}  {self.goal:>8s} {verdict:4s} {self.note}"


def at_least(what: str, values: list[float], goal: float, note: str = "") -> Row:
    """A row whose median should reach the goal."""
    return Row(what, values, f">= {goal:g}", median(values) >= goal, note)


def at_most(what: str, values: list[float], goal: float, note: str = "") -> Row:
    """A row whose median should not exceed the goal."""
    return Row(what, values, f"<= {goal:g}", median(values) <= goal, note)


def seconds_of(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


# ---- one rank --------------------------------------------------------------------------------------------------------


class OneRank:
    """A one-rank runtime in this process and the sgemm that its steps are measured against."""

    def __init__(self, sizes: Sizes) -> None:
        plan = sizes.plan()
        self.flops = model_flops(plan.model) * plan.global_batch_size
        data = Batches("synthetic", plan.model, plan.global_batch_size, plan.training.seed)
        self.runtime: Runtime = run_loopback(1, lambda comm: Runtime(plan, comm, data))[0]
        self.square = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
        self.product = np.empty_like(self.square)
        self.count = 0
        for _ in range(2):
            self.step()

    def step(self) -> float:
        """Seconds of one step."""
        self.count += 1
        return self.runtime.run_step(self.count).seconds

    def sgemm_flops_per_second(self) -> float:
        """The machine's rate right now."""
        return 2 * 2048**3 / seconds_of(lambda: np.matmul(self.square, self.square, out=self.product))

    def step_beside_sgemm(self) -> tuple[float, float]:
        """Seconds of one step, and the rate of sgemm in FLOP/s, just before and after it."""
        before, seconds = self.sgemm_flops_per_second(), self.step()
        return seconds, (before + self.sgemm_flops_per_second()) / 2

    def share_of_sgemm(self) -> float:
        """One pair: the rate of a step over the rate of sgemm."""
        seconds, sgemm = self.step_beside_sgemm()
        return self.flops / seconds / sgemm


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Replace every kernel by nothing: what remains of a step is the interpreter, bindings and records included."""
    saved = {name: getattr(kernels, name) for name in kernels.__all__ if callable(getattr(kernels, name))}
    try:
        for name in saved:
            setattr(kernels, name, lambda *_args, **_more: 0.0)
        yield
    finally:
        for name, function in saved.items():
            setattr(kernels, name, function)


def overheads(rank: OneRank, pairs: int) -> list[Row]:
    """What the interpreter and the recording of spans cost, as shares of a step."""
    step = median(rank.step() for _ in range(3))
    bare, recorded = [], []
    with without_kernels():
        for _ in range(10 * pairs):
            recorded.append(rank.step())
            rank.runtime.record = False
            bare.append(rank.step())
            rank.runtime.record = True
    spans = median(recorded) - median(bare)
    return [
        at_most("interpreter, share of the step", [x / step for x in recorded], 0.02),
        at_most("recording spans, share of the step", [max(0.0, spans) / step], 0.005),
    ]


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def torch_rows(python: str | None, rank: OneRank, sizes: Sizes, pairs: int) -> list[Row]:
    """One rank over PyTorch as installed and over the fastest that it can be made."""
    name = _name(sizes)
    if python is None:
        note = "torch is missing: set TORCH_PYTHON"
        goals = (("as installed", 0.48), ("at its fastest", 0.97))
        return [Row(f"{name} step over PyTorch {what}", [], f"<= {goal}", None, note) for what, goal in goals]
    sides = {
        "as installed": Torch(python, sizes),
        "compiled": Torch(python, sizes, compiled=True),
        "AVX-512": Torch(python, sizes, MKL_ENABLE_INSTRUCTIONS="AVX512"),
        "compiled, AVX-512": Torch(python, sizes, compiled=True, MKL_ENABLE_INSTRUCTIONS="AVX512"),
        "AVX2": Torch(python, sizes, MKL_ENABLE_INSTRUCTIONS="AVX2", ATEN_CPU_CAPABILITY="avx2"),
    }
    theirs: dict[str, list[float]] = {side: [] for side in sides}
    ratios: dict[str, list[float]] = {side: [] for side in sides}
    floor = []
    for _ in range(pairs):
        for side, process in sides.items():
            ours, sgemm = rank.step_beside_sgemm()
            other = process.step()
            theirs[side].append(other)
            ratios[side].append(ours / other)
            if side == "as installed":
                floor.append(rank.flops / sgemm / other)
    # The fastest by its median: the least of each turn's times would be the side that the machine's other load spared.
    fastest = min((side for side in sides if side != "AVX2"), key=lambda side: median(theirs[side]))
    facts = sides["as installed"].facts
    for process in sides.values():
        process.close()
    note = f"{facts['torch']}, its sgemm {facts['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s"
    return [
        at_most(f"{name} step over PyTorch as installed", ratios["as installed"], 0.48, note),
        at_most(f"{name} step over PyTorch at its fastest", ratios[fastest], 0.97, fastest),
        Row(f"{name} step over PyTorch on AVX2, MKL's choice on AMD", ratios["AVX2"], "", None),
        Row(f"{name} the step's FLOPs at the sgemm rate, over PyTorch as installed", floor, "", None, "a floor"),
    ]


# ---- several ranks ---------------------------------------------------------------------------------------------------


class PlanRun(NamedTuple):
    """What `mpirun executor run` measured, and when its first step had ended, in seconds after mpirun started."""

    steps: list[float]
    first_step_ended: float


def run_plan(plan: Plan, folder: Path, steps: int, *, warmup: int = 2) -> PlanRun:
    """Run a plan on its ranks."""
    file, output = folder / "plan.json", folder / "measured.json"
    dump_plan(plan, file)
    program = Path(sys.executable).parent
    command = [str(program / "mpirun"), "-n", str(plan.mesh.world_size), str(program / "executor"), "run", str(file)]
    command += ["--steps", str(steps), "--warmup", str(warmup), "--data", "synthetic", "-o", str(output)]
    begun, ended, said = time.perf_counter(), 0.0, []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:  # the executor prints a line when a step has ended
        ended = ended or time.perf_counter() - begun
        said.append(line)
    if process.wait():
        raise RuntimeError("".join(said))
    return PlanRun(json.loads(output.read_text())["steps"], ended)


def typical(plan: Plan, folder: Path, steps: int) -> float:
    """Seconds of a step in the middle of a run."""
    return median(run_plan(plan, folder, steps).steps)


def profile(quick: bool) -> Machine:
    """This machine as `planner profile` measures it now."""
    program = str(Path(sys.executable).parent / "planner")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "machine.toml")
        command = [program, "profile", *["--quick"] * quick, "-o", file]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return load_machine(file)


def planned(plan: Plan, machine: Machine) -> Plan:
    """The plan with what the planner chooses for its mesh: algorithms, and when gradients are reduced."""
    early = [msgspec.structs.replace(plan, overlap_gradients=True)] if plan.mesh.dp > 1 else []
    fixed = [fix_collectives(each, machine) for each in (plan, *early)]
    return min(fixed, key=lambda each: predict(each, machine).step_seconds)


def choices(plan: Plan) -> str:
    """What the planner chose, in words."""
    found = [f"{name} {algorithm}" for name, algorithm in sorted(plan.collectives.items())]
    return ", ".join([*found, *["reduced early"] * plan.overlap_gradients])


def two_ranks(sizes: Sizes, machine: Machine, python: str | None, rounds: int, steps: int) -> list[Row]:
    """Speed-up of two ranks over one; each round runs every plan once, and one rank just before it."""
    name = _name(sizes)
    cases = {
        "dp=2, weak scaling": (sizes.plan(dp=2, weak=2), 2.0, 1.90),
        "dp=2, strong scaling": (sizes.plan(dp=2), 1.0, 1.80),
        "tp=2, strong scaling": (sizes.plan(tp=2), 1.0, 1.70),
        "pp=2, 8 micro-batches, strong scaling": (sizes.plan(pp=2, micro_batches=8), 1.0, 1.60),
    }
    cases = {case: (planned(plan, machine), work, goal) for case, (plan, work, goal) in cases.items()}
    found: dict[str, list[float]] = {case: [] for case in cases}
    over_ddp: list[float] = []
    ddp = Torch(python, sizes._replace(batch=sizes.batch // 2), ranks=2) if python else None
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for case, (plan, work, _) in cases.items():
                one, seconds = (typical(each, Path(folder), steps) for each in (sizes.plan(), plan))
                found[case].append(work * one / seconds)
                if ddp is not None and case.startswith("dp=2, strong"):
                    over_ddp.append(seconds / median(ddp.step() for _ in range(steps)))
    rows = [
        at_least(f"{name} {case}: speed-up", found[case], goal, choices(plan))
        for case, (plan, _, goal) in cases.items()
    ]
    if ddp is None:
        note = "torch is missing: set TORCH_PYTHON"
        return [*rows, Row(f"{name} dp=2 step over PyTorch DDP (gloo)", [], "<= 0.5", None, note)]
    ddp.close()
    return [*rows, at_most(f"{name} dp=2 step over PyTorch DDP (gloo)", over_ddp, 0.50)]


def overlap(sizes: Sizes, machine: Machine, rounds: int, steps: int) -> list[Row]:
    """Whether reducing gradients during the backward pass pays: dp=2 with it over dp=2 without."""
    blocking = fix_collectives(sizes.plan(dp=2), machine)
    early = msgspec.structs.replace(blocking, overlap_gradients=True)
    expected = predict(early, machine).step_seconds / predict(blocking, machine).step_seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ratios = [typical(early, folder, steps) / typical(blocking, folder, steps) for _ in range(rounds)]
    return [
        Row(f"{_name(sizes)} dp=2, gradients overlapped over blocking", ratios, "", None, f"predicted {expected:.3f}")
    ]


SGEMM_LOOP = """
import sys, time
import numpy as np
a = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
out = np.matmul(a, a)
end, count, begun = time.perf_counter() + float(sys.argv[1]), 0, time.perf_counter()
while time.perf_counter() < end:
    np.matmul(a, a, out=out)
    count += 1
print(count / (time.perf_counter() - begun))
"""


def two_cores(rounds: int, seconds: float = 4.0) -> list[Row]:
    """What two processes that share nothing gain on this machine: no plan of two ranks can be expected to gain more."""

    def products_per_second(processes: int) -> float:
        command = [sys.executable, "-c", SGEMM_LOOP, str(seconds)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
        return sum(float(process.communicate()[0]) for process in running)

    ratios = [products_per_second(2) / products_per_second(1) for _ in range(rounds)]
    return [Row("sgemm in two processes over one: what two cores can gain", ratios, "", None)]


def start_up(sizes: Sizes, rounds: int) -> list[Row]:
    """Seconds from mpirun to the first step, kernels cached: the end of that step less the fastest of three."""
    values = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + rounds):
            run = run_plan(sizes.plan(dp=2), Path(folder), 3, warmup=0)
            values.append(run.first_step_ended - min(run.steps))
    return [at_most("mpirun -n 2 executor run: seconds to the first step", values[1:], 2.0, "first touches included")]


# ---- attention -------------------------------------------------------------------------------------------------------


class Heads:
    """Tensors of an attention over one sequence, 8 heads of 64, forward and backward."""

    def __init__(self, seq: int, *, plain: bool) -> None:
        generator = np.random.default_rng(0)
        shape = (seq, 1, 8, 64)
        self.q, self.k, self.v, self.dout = (generator.standard_normal(shape, np.float32) for _ in range(4))
        self.out, self.dq, self.dk, self.dv = (np.empty(shape, np.float32) for _ in range(4))
        index = np.arange(8)
        places = np.arange(seq)
        self.masking = kernels.Masking(0.125, index, False, None, places, places, 0.0, 1, np.arange(1), index)
        self.saved = np.empty((1, 8, seq, seq) if plain else (1, 8, seq), np.float32)
        self.plain = plain

    def run(self) -> None:
        """Forward and backward."""
        q, k, v, masking = self.q, self.k, self.v, self.masking
        if self.plain:
            kernels.attention_forward(q, k, v, masking, self.saved, self.out)
            kernels.attention_backward(self.dout, q, k, v, masking, self.saved, self.dq, self.dk, self.dv)
            return
        kernels.blocked_attention_forward(q, k, v, masking, self.out, self.saved)
        kernels.blocked_attention_backward(self.dout, q, k, v, masking, self.out, self.saved, self.dq, self.dk, self.dv)


def attention(pairs: int) -> list[Row]:
    """Memory of blocked attention at two lengths, and its speed beside the plain kernel at 512."""
    peaks = []
    for seq in (2048, 4096):
        tracemalloc.start()
        Heads(seq, plain=False).run()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    plain, blocked = Heads(512, plain=True), Heads(512, plain=False)
    plain.run()
    ratios = [seconds_of(blocked.run) / seconds_of(plain.run) for _ in range(10 * pairs)]
    note = f"peak {peaks[1] / 1e6:.0f} MB at S=4096; one S x S matrix of 8 heads is {8 * 4096**2 * 4 / 1e6:.0f} MB"
    return [
        at_most("blocked attention: memory at S=4096 over S=2048", [peaks[1] / peaks[0]], 2.05, note),
        at_most("blocked attention: time over the plain kernel at S=512", ratios, 1.0),
    ]


def _name(sizes: Sizes) -> str:
    return f"H={sizes.hidden}:"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    note = describe_environment()
    return {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), **note}


def use_one_thread() -> None:
    """Start again with one BLAS thread and what the libraries themselves choose, unless this is that start already."""
    wanted = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL", "NUMBA")}
    forced = {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE"} & os.environ.keys()
    if forced or wanted.items() - os.environ.items():
        kept = {name: value for name, value in os.environ.items() if name not in forced}
        os.execve(sys.executable, [sys.executable, *sys.argv], kept | wanted)


def main() -> int:
    """Run the bench; exit code 0 whatever the figures say."""
    use_one_thread()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few pairs, by default the smaller configuration only")
    parser.add_argument("--json", type=Path, help="also write machine and rows to this file")
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON"), help="an interpreter with torch")
    parser.add_argument("--only", default="rank,torch,ranks,attention,start,overlap", help="parts to run")
    parser.add_argument("--hidden", type=int, choices=[sizes.hidden for sizes in CONFIGURATIONS], help="only this one")
    chosen = parser.parse_args()
    parts, pairs = set(chosen.only.split(",")), 4 if chosen.quick else 12
    rounds, steps = (2, 5) if chosen.quick else (4, 8)
    rows: list[Row] = []

    def show(found: list[Row]) -> None:
        rows.extend(found)
        for row in found:
            print(row.as_text(), flush=True)

    about = machine()
    blas = ", ".join(f"{x['name']} {x['version']} {x['architecture']}" for x in about["blas"] if x["architecture"])
    print(f"{about['date']}  {about['processor']}, {about['cores']} cores  {blas}\n")
    print(f"{'':64s} {'median [middle half]':>20s}  {'goal':>8s} met")
    if parts & {"ranks", "overlap"}:
        profiled = profile(chosen.quick)
    if "ranks" in parts:
        show(two_cores(2 * rounds))
    hidden = chosen.hidden or (CONFIGURATIONS[0].hidden if chosen.quick else None)
    for sizes in (each for each in CONFIGURATIONS if hidden in (None, each.hidden)):
        if parts & {"rank", "torch"}:
            rank = OneRank(sizes)
        if "rank" in parts:
            share = [rank.share_of_sgemm() for _ in range(pairs)]
            show([at_least(f"{_name(sizes)} one rank, one thread: share of sgemm", share, 0.88)])
            show(overheads(rank, pairs))
        if "torch" in parts:
            show(torch_rows(chosen.torch_python, rank, sizes, pairs))
        if "ranks" in parts:
            show(two_ranks(sizes, profiled, chosen.torch_python, rounds, steps))
        if "overlap" in parts:
            show(overlap(sizes, profiled, rounds, steps))
    if "attention" in parts:
        show(attention(pairs))
    if "start" in parts:
        show(start_up(CONFIGURATIONS[0], rounds))
    if chosen.json:
        content = {"machine": about, "rows": [row._asdict() for row in rows]}
        chosen.json.write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
