"""Do everything that needs a GPU, in one command of under 8 minutes: `make gpu`, or `python3 tests/gpu.py --out DIR`.

Runs from a plain checkout and installs nothing. What this Python lacks is taken from wheels in `build/gpu` (see `make
gpu-wheels`). Stages, each with a time limit; one that fails does not stop the others, and results.json is written again
after every one:

  kernels   compile what the others launch, on several cores at once; CuPy keeps it on disk
  check     plans on 1, 2 and 4 ranks that share the GPU, compared with one rank on the host
  profile   executor profile --device cuda
  measured  one-rank plans, predicted from that profile and measured
  torch     a step beside PyTorch's, eager and compiled
  staged    plans of several ranks through host memory, predicted and measured

Exit status: 0 if every stage ran and every goal was met, 1 otherwise, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from gpu_processes import ROOT, StageError, Stepper, mpirun, prepare, run
from gpu_rows import Row, at_most, missed, torch_rows

TOTAL_SECONDS = 470.0
LIMITS = {"kernels": 60.0, "check": 130.0, "profile": 100.0, "measured": 70.0, "torch": 160.0, "staged": 60.0}
MOST_COMPILERS = 16
WORKER = [sys.executable, str(ROOT / "tests/gpu_worker.py")]
EXECUTOR = [sys.executable, "-m", "executor.cli"]
TORCH = [sys.executable, str(ROOT / "tests/torch_step.py")]
DEVICE_PROBE = """
from executor.device import open_device
from planner.errors import MeshwrightError
import json
try:
    print(json.dumps(open_device("cuda").note()._asdict()))
except MeshwrightError as error:
    raise SystemExit(str(error))
"""


@dataclass
class Job:
    """This run: where it writes (results to `out`, everything else to `work`), what it runs, how long it may take."""

    out: Path
    work: Path
    environment: dict[str, str]
    scale: Any
    began: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def left(self, stage_deadline: float = float("inf")) -> float:
        """Seconds that a stage still has."""
        return min(stage_deadline, self.began + TOTAL_SECONDS) - time.monotonic()

    def log(self, name: str) -> Path:
        """A stage's log."""
        return self.out / f"{name}.txt"

    def add(self, *rows: Row) -> None:
        """Show rows and keep them."""
        for row in rows:
            print(row.as_text(), flush=True)
            self.rows.append(row)

    def fail(self, what: str) -> None:
        """Show what went wrong and keep it."""
        print(f"failed: {what}", flush=True)
        self.failures.append(what)

    def save(self) -> None:
        """Write the results so far."""
        rows = [row._asdict() for row in self.rows]
        content = self.results | {"rows": rows, "failures": self.failures}
        (self.out / "results.json").write_text(json.dumps(content, indent=1))

    def cases(self, name: str, cases: list[tuple[Any, str]]) -> Path:
        """Write the plans of cases and the list of them for the worker."""
        return self.plans(name, [(f"{case.name} {dtype}".strip(), case.plan(), dtype) for case, dtype in cases])

    def plans(self, name: str, plans: list[tuple[str, Any, str]]) -> Path:
        """Write named plans and the list of them for the worker."""
        from planner.plan import dump_plan

        listed = []
        for number, (title, plan, dtype) in enumerate(plans):
            path = self.work / f"{name}-{number}.json"
            dump_plan(plan, path)
            listed.append({"name": title, "plan": str(path), "dtype": dtype})
        file = self.work / f"{name}.cases"
        file.write_text(json.dumps(listed))
        return file


def done_lines(file: Path) -> list[dict[str, Any]]:
    """What a worker finished."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [line for line in lines if line["state"] == "done"]


# ---- stages ----------------------------------------------------------------------------------------------------------


def kernels(job: Job, deadline: float) -> None:
    """One small step of every plan of the other stages: nothing is compiled while it is timed, or four times at once.

    A worker takes the plans of one precision and head size, which share their sources.
    """
    groups = job.scale.plans_by_source()
    workers = max(1, min(MOST_COMPILERS, os.cpu_count() or 1, len(groups)))
    begun = time.monotonic()

    def compile_group(number: int, members: list[Any]) -> str:
        listed = job.plans(f"kernels{number}", [("", plan, "") for plan in members])
        try:
            run([*WORKER, "compile", str(listed)], job.environment, job.left(deadline), job.log("check"))
        except StageError as error:
            return f"kernels: {error}"
        return ""

    with ThreadPoolExecutor(workers) as pool:
        for trouble in pool.map(compile_group, range(len(groups)), groups.values()):
            if trouble:
                job.fail(trouble)
    seconds = time.monotonic() - begun
    note = f"{sum(map(len, groups.values()))} plans, {workers} at once"
    job.add(Row("kernels: seconds until all are compiled", seconds, "", None, note))


def check(job: Job, deadline: float) -> None:
    """Plans on 1, 2 and 4 ranks; a job that a case ends is started again without it, twice at most."""
    checks = list(job.scale.checks())
    found: list[dict[str, Any]] = []
    for ranks in sorted({case.ranks for case, _ in checks}):
        mine = [(case, dtype) for case, dtype in checks if case.ranks == ranks]
        listed, out = job.cases(f"check{ranks}", mine), job.work / f"check{ranks}.jsonl"
        command = [*mpirun(job.environment, ranks), *WORKER, "check", str(listed), str(out)]
        for _ in range(3):
            try:
                run(command, job.environment, job.left(deadline), job.log("check"))
                break
            except StageError as error:
                job.fail(f"check on {ranks} ranks: {error}")
                if job.left(deadline) < 15:
                    break
        found += done_lines(out)
    job.results["check"] = found
    failed = [one["name"] for one in found if not one["passed"]]
    for dtype, goal in (("float32", 1e-5), ("bfloat16", 2e-2)):
        wanted = [case for case, precision in checks if precision == dtype]
        mine = [one for one in found if one["dtype"] == dtype]
        what = f"check {dtype}: largest gradient difference"
        if not wanted:
            continue
        if len(mine) < len(wanted):
            job.add(missed(what, f"<= {goal:g}", f"{len(mine)} of {len(wanted)} plans ran"))
        else:
            note = f"{len(mine)} plans on 1, 2, 4 ranks"
            job.add(at_most(what, max(one["gradient"] for one in mine), goal, note))
    job.add(Row("check: plans that failed in any precision", len(failed), "0", not failed, ", ".join(failed)))


def profile(job: Job, deadline: float) -> None:
    """The survey; the quick one where little time is left."""
    ranks = max(case.ranks for case in job.scale.staged)
    quick = job.scale.name == "tiny" or job.left(deadline) < 95
    command = [*mpirun(job.environment, ranks), *EXECUTOR, "profile", "--device", "cuda", "-o", _profile_path(job)]
    begun = time.monotonic()
    try:
        run([*command, *(["--quick"] if quick else [])], job.environment, job.left(deadline), job.log("profile"))
    except StageError as error:
        if quick:
            raise
        job.fail(f"profile: {error}; the quick one took its place")
        quick, begun = True, time.monotonic()
        run([*command, "--quick"], job.environment, min(60.0, job.left()), job.log("profile"))
    seconds = time.monotonic() - begun
    from planner.machine import load_machine

    machine = load_machine(_profile_path(job))
    device = machine.device
    job.results["profile"] = {
        "seconds": seconds, "quick": quick, "peak_flops_per_second": device.peak_flops_per_second,
        "memory_bandwidth_bytes_per_second": device.memory_bandwidth_bytes_per_second,
        "overheads": {"dispatch_seconds": machine.overheads.dispatch_seconds},
    }  # fmt: skip
    job.add(at_most("profile: seconds", seconds, 30 if quick else 90, "--quick" if quick else ""))
    for name, rate in device.peak_flops_per_second.items():
        job.add(Row(f"profile: {name} products, TFLOP/s", rate / 1e12, "", None))


def _profile_path(job: Job) -> str:
    return str(job.out / "profile.toml")


def measured(job: Job, deadline: float) -> None:
    """One-rank plans: step time and memory, predicted over measured."""
    listed, out = job.cases("measured", [(case, "") for case in job.scale.measured]), job.work / "measured.jsonl"
    for _ in range(3):
        try:
            run([*WORKER, "measure", str(listed), str(out)], job.environment, job.left(deadline), job.log("measured"))
            break
        except StageError as error:
            job.fail(f"measured: {error}")
            if job.left(deadline) < 15:
                break
    found = {one["name"]: one for one in done_lines(out)}
    job.results["measured"] = list(found.values())
    job.save()  # whatever the profile is worth
    from planner.cost.footprint import attention_scratch_bytes, footprint_bytes, split_parts
    from planner.machine import load_machine
    from planner.predict import predict

    machine = load_machine(_profile_path(job))
    errors, memory = [], []
    for case in job.scale.measured:
        one = found.get(case.name)
        if one is None:
            continue
        prediction = predict(case.plan(), machine)
        parts = {part: values[0] for part, values in prediction.peak_parts.items()}
        held = float(footprint_bytes(machine, *split_parts(parts), 0, "reserved"))
        held += attention_scratch_bytes(machine, case.plan())
        one |= {
            "predicted_seconds": prediction.step_seconds, "predicted_arena_bytes": prediction.peak_bytes[0],
            "predicted_pool_bytes": held,
        }  # fmt: skip
        errors.append(abs(prediction.step_seconds / one["step_seconds"] - 1))
        memory.append(abs(held / one["pool_bytes"] - 1))
        note = f"{prediction.step_seconds * 1e3:.2f} ms predicted, {one['step_seconds'] * 1e3:.2f} measured"
        job.add(Row(f"  {case.name}: predicted over measured", prediction.step_seconds / one["step_seconds"], "", None,
                    f"{note}; pool {one['pool_bytes'] / 2**30:.2f} GiB, {memory[-1]:.1%} off"))  # fmt: skip
    wanted = len(job.scale.measured)
    for what, values, goal, reduce in (
        ("measured: MAPE of the step time", errors, 0.08, mean),
        ("measured: largest error of the pool's bytes", memory, 0.03, max),
    ):
        if len(values) < wanted:
            job.add(missed(what, f"<= {goal:g}", f"{len(values)} of {wanted} plans ran"))
        else:
            job.add(at_most(what, reduce(values), goal, f"{wanted} plans"))


def staged(job: Job, deadline: float) -> None:
    """Plans of several ranks that share the GPU; predictions divide its time between them."""
    from planner.machine import load_machine
    from planner.predict import predict

    machine = load_machine(_profile_path(job)) if Path(_profile_path(job)).is_file() else None
    kept = job.results["staged"] = []
    for number, case in enumerate(job.scale.staged):
        out = job.work / f"staged-{number}-measured.json"
        listed = json.loads(job.cases(f"staged-{number}", [(case, "")]).read_text())
        command = [*mpirun(job.environment, case.ranks), *EXECUTOR, "run", listed[0]["plan"], "--device", "cuda"]
        command += ["--steps", "5", "--data", "synthetic", "-o", str(out)]
        try:
            run(command, job.environment, job.left(deadline), job.log("staged"))
        except StageError as error:
            job.fail(f"staged {case.name}: {error}")
            continue
        seconds = json.loads(out.read_text())["step_seconds"]
        predicted = None if machine is None else predict(case.plan(), machine).step_seconds
        kept.append({"name": case.name, "step_seconds": seconds, "predicted_seconds": predicted})
        what, note = f"staged {case.name}: predicted over measured", f"{seconds * 1e3:.1f} ms measured"
        if predicted is None:
            job.add(Row(what, None, "", None, f"{note}, no profile to predict from"))
        else:
            job.add(Row(what, predicted / seconds, "", None, f"{predicted * 1e3:.1f} ms predicted, {note}"))


def torch(job: Job, deadline: float) -> None:
    """Steps in turn: ours, PyTorch eager, PyTorch compiled; ratios of medians of pairs."""
    have = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, check=False).returncode == 0
    sizes = [str(each) for each in job.scale.benchmark]
    compiled: dict[str, Stepper] = {}
    kept = job.results["torch"] = {}
    try:
        for precision in (
            job.scale.benchmark_precisions if have else ()
        ):  # compile side by side, before anything is timed
            command = [*TORCH, *sizes, "--device", "cuda", "--precision", precision, "--compile"]
            compiled[precision] = Stepper(command, job.environment, job.log("torch"))
        facts = {}
        for precision, stepper in list(compiled.items()):
            try:
                facts[precision] = stepper.ready(deadline - 40)
            except StageError as error:
                job.fail(f"compiled PyTorch, {precision}: {error}")
                compiled.pop(precision).close()
        for precision in reversed(job.scale.benchmark_precisions):
            try:
                kept[precision] = _pairs(job, precision, compiled.get(precision), deadline, have=have)
            except (StageError, ValueError) as error:
                job.fail(f"beside PyTorch, {precision}: {error}")
            job.save()
    finally:
        for stepper in compiled.values():
            stepper.close()
    for precision in reversed(job.scale.benchmark_precisions):
        job.add(*torch_rows(precision, kept.get(precision), has_goal=precision == "bfloat16"))


def _pairs(job: Job, precision: str, compiled: Stepper | None, deadline: float, *, have: bool) -> dict[str, Any]:
    """Seconds of steps of each side, taken in turn."""
    plan, attention = _best_attention(job, precision)
    path = job.cases(f"torch-{precision}", [(plan, "")])
    sides = {"ours": Stepper([*WORKER, "step", json.loads(path.read_text())[0]["plan"]], job.environment,
                             job.log("torch"))}  # fmt: skip
    try:
        if have:
            command = [*TORCH, *map(str, job.scale.benchmark), "--device", "cuda", "--precision", precision]
            sides["eager"] = Stepper(command, job.environment, job.log("torch"))
        facts = {name: stepper.ready(deadline) for name, stepper in sides.items()}
        everyone = sides | ({} if compiled is None else {"compiled": compiled})
        seconds: dict[str, list[float]] = {name: [] for name in everyone}
        for turn in range(job.scale.rounds + 1):
            for name, stepper in everyone.items():
                taken = stepper.step(deadline)
                if turn:  # the first wakes the clocks
                    seconds[name].append(taken)
        return {"seconds": seconds, "facts": facts, "attention": attention}
    finally:
        for stepper in sides.values():
            stepper.close()


def _best_attention(job: Job, precision: str) -> tuple[Any, str]:
    """The benchmark's plan with the attention that the profile predicts to be faster; blocked without a profile."""
    from gpu_plans import BLOCKED, Case

    from planner.machine import load_machine
    from planner.predict import predict

    cases = {"blocked": Case("blocked", job.scale.benchmark, precision, choices=BLOCKED)}
    cases["plain"] = Case("plain", job.scale.benchmark, precision)
    name = "blocked"
    if Path(_profile_path(job)).is_file():
        machine = load_machine(_profile_path(job))
        name = min(cases, key=lambda each: predict(cases[each].plan(), machine).step_seconds)
    return cases[name], name


# ---- the whole -------------------------------------------------------------------------------------------------------

STAGES: tuple[Callable[[Job, float], None], ...] = (kernels, check, profile, measured, torch, staged)


def find_device(environment: dict[str, str]) -> dict[str, Any]:
    """The GPU; ends the program with status 2 and one line where there is none."""
    asked = subprocess.run(
        [sys.executable, "-c", DEVICE_PROBE], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if asked.returncode:
        print(f"make gpu: {(asked.stderr.strip() or 'no GPU').splitlines()[-1]}", file=sys.stderr)
        raise SystemExit(2)
    note: dict[str, Any] = json.loads(asked.stdout.strip().splitlines()[-1])
    return note


def main() -> int:
    """Run the stages; see the module's docstring for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-results", help="folder of results and logs")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / "build/gpu", help="folder of wheels that this Python lacks"
    )
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny tests the script itself")
    parser.add_argument("--only", default=",".join(stage.__name__ for stage in STAGES), help="stages to run")
    chosen = parser.parse_args()
    chosen.out = chosen.out.resolve()  # processes run elsewhere
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        return run_stages(chosen, Path(folder))


def run_stages(chosen: argparse.Namespace, work: Path) -> int:
    """Prepare, find the GPU, run what was asked for."""
    environment = prepare(chosen.wheels, work)
    device = find_device(environment)
    from gpu_plans import SCALES

    from executor.environment import describe_environment

    job = Job(chosen.out, work, environment, SCALES[chosen.scale])
    about = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"), "device": device}
    job.results |= about | {"scale": chosen.scale, "environment": describe_environment()}
    print(f"{about['date']}  {device['name']}, CUDA {device['runtime']}\n")
    print(f"{'':58s} {'value':>10s}  {'goal':>9s} met")
    for stage in STAGES:
        if stage.__name__ not in chosen.only.split(","):
            continue
        begun = time.monotonic()
        limit = LIMITS[stage.__name__]
        print(f"-- {begun - job.began:.0f} s: {stage.__name__}, at most {limit:.0f} s", flush=True)
        try:
            stage(job, begun + limit)
        except Exception as error:  # whatever it is, the other stages have their own worth
            job.fail(f"{stage.__name__}: {error}")
            with job.log(stage.__name__).open("a") as log:
                log.write(traceback.format_exc())
        job.results.setdefault("stage_seconds", {})[stage.__name__] = time.monotonic() - begun
        job.save()
    print("\n" + "\n".join(row.as_text() for row in job.rows if row.goal))
    for failure in job.failures:
        print(f"failed: {failure}")
    print(f"{time.monotonic() - job.began:.0f} s; results in {chosen.out / 'results.json'}")
    return 1 if job.failures or any(row.met is False for row in job.rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
