"""Float16 beyond its range: every rank skips the same steps at the same scales, and gives up with one message."""

import json

import numpy as np
import pytest
from equivalence_plans import describe, model, plan, set_parameters

from executor.collect import collect
from executor.comm.loopback import run_loopback
from executor.data import Batches
from executor.runtime import Runtime
from executor.scaling import LossScaler
from planner.errors import DataError
from planner.plan import dump_plan
from planner.trace import load_measurement

PROGRAM = "mpi_program_cli.py"


def half(kind="gpt", training=None, **choices):
    return plan(model(kind), training={"precision": "float16"} | (training or {}), **choices)


def ranks_of(candidate, job, scale=2.0**16):
    """job(runtime) on every rank, in process."""

    def main(comm):
        batches = Batches("synthetic", candidate.model, candidate.global_batch_size, candidate.training.seed)
        runtime = Runtime(candidate, comm, batches)
        runtime.scaler = LossScaler(scale)
        return job(runtime)

    return run_loopback(candidate.mesh.world_size, main)


LAYOUTS = [
    half(), half(dp=2), half(tp=2, sequence_parallel=True), half(pp=2), half("llama", dp=2, zero_stage=2, batch=7),
    half("bert", dp=2, tp=2, pp=2, zero_stage=1), half("llama", cp=2, dp=2, zero_stage=3, recompute="full"),
    half(dp=2, pp=2, overlap_gradients=True, training={"clip_norm": None}),
]  # fmt: skip


@pytest.mark.parametrize("candidate", LAYOUTS, ids=describe)
def test_all_ranks_skip_together_and_change_nothing(candidate):
    """From a scale of 2^40 the first steps overflow: state stays the same bits; then training begins."""

    def job(runtime):
        before = [(unit.shard.copy(), *(moment.copy() for moment in unit.moments)) for unit in runtime.units.values()]
        history, untouched = [], True
        for step in range(40):
            result = runtime.run_step(step)
            history.append((result.loss_scale, result.skipped, result.loss))
            if result.skipped:
                after = [(unit.shard, *unit.moments) for unit in runtime.units.values()]
                untouched &= all(
                    np.array_equal(x, y) for a, b in zip(before, after, strict=True) for x, y in zip(a, b, strict=True)
                )
            elif not any(skipped for _, skipped, _ in history[-2:]):
                break
        moved = any(
            not np.array_equal(a[0], unit.shard) for a, unit in zip(before, runtime.units.values(), strict=True)
        )
        return history, untouched, moved, runtime.scaler

    found = ranks_of(candidate, job, 2.0**40)
    history, untouched, _, scaler = found[0]
    assert all(rank[0] == history and rank[3] == scaler for rank in found), "every rank comes to the same verdicts"
    assert all(rank[1] and rank[2] for rank in found) and untouched
    skips = [skipped for _, skipped, _ in history]
    assert 5 < sum(skips) < 38 and skips == sorted(skips, reverse=True), "scales too large, then none"
    assert [scale for scale, _, _ in history[: sum(skips) + 1]] == [2.0 ** (40 - i) for i in range(sum(skips) + 1)]
    assert all(np.isfinite(loss) for _, _, loss in history), "the forward pass is not scaled"


@pytest.mark.parametrize("where", [{"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2, "zero_stage": 1}])
def test_an_overflow_on_one_rank_skips_all(where):
    """The last rank alone finds an infinity in its gradients, which the loss scale did not put there."""
    candidate = half(**where)

    def job(runtime):
        if runtime.comm.rank == runtime.comm.size - 1:
            right = runtime._run_on_unit

            def spoiled(task):
                if task.kind == "gradient_unscale":
                    next(iter(runtime.units.values())).reduced()[0] = np.inf
                right(task)

            runtime._run_on_unit = spoiled
        result = runtime.run_step(0)
        return result.skipped, runtime.scaler.scale

    assert ranks_of(candidate, job) == [(True, 2.0**15)] * candidate.mesh.world_size


@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_skipped_steps_leave_no_trace(clip_norm):
    """A step that is run again until it fits is bit for bit the step at that scale, and AdamW's first update still."""
    candidate = half("bert", dp=2, zero_stage=1, training={"clip_norm": clip_norm})

    def job(runtime):
        skips = 0
        while runtime.run_step(0).skipped:
            skips += 1
        return skips, runtime.scaler.scale, collect(runtime)

    (skips, scale, late), *_ = ranks_of(candidate, job, 2.0**30)
    (none, same, early), *_ = ranks_of(candidate, job, 2.0 ** (30 - skips))
    assert skips > 5 and none == 0 and same == scale
    for ours, theirs in zip(late, early, strict=True):
        for name, tensor in ours.tensors.items():
            assert np.array_equal(tensor, theirs.tensors[name]) and np.isfinite(tensor).all(), name


def test_without_scaling_small_gradients_vanish():
    """Why the loss is scaled: at scale 1 gradients below 2^-24 become 0, at 2^16 they do not."""
    candidate = half(training={"clip_norm": None, "dropout": 0.0}, batch=5)

    def job(runtime):
        runtime.context.loss_scale = 1.0
        right = runtime.batches.loss_scale
        runtime.batches.loss_scale = lambda step: right(step) * 2.0**-14  # as if of 16384 times as many tokens
        runtime.run_step(0)
        return collect(runtime).gradients.tensors

    (lost,), (kept,) = ranks_of(candidate, job, 1.0), ranks_of(candidate, job, 2.0**16)
    zeros = [name for name, tensor in lost.items() if not tensor.any() and kept[name].any()]
    assert len(zeros) > len(lost) / 4, zeros


def test_overflow_at_the_smallest_scale_ends_the_run_on_every_rank():
    """Parameters of 300 overflow in the forward pass, which no loss scale can help."""

    def job(runtime):
        for unit in runtime.units.values():
            unit.set_parameters(np.full(unit.unit.size, 300.0, np.float32))
        scales = []
        with pytest.raises(DataError, match=r"float16 overflows in step 6 at loss scale 1, .*--precision bfloat16"):
            scales.extend(runtime.run_step(step).loss_scale for step in range(10))
        return scales

    assert ranks_of(half(dp=2, tp=2), job, 2.0**5) == [[32.0, 16.0, 8.0, 4.0, 2.0]] * 4


@pytest.mark.parametrize("kind", ["ring", "allgather"])
def test_attention_sums_beyond_the_range_of_float16(kind):
    """Values of 30000 under uniform attention: their mean is in range, their sum over 12 keys is not."""
    attention = "plain" if kind == "ring" else "blocked"  # a ring is blocked by itself
    candidate = half(cp=2, cp_kind=kind, attention=attention, training={"dropout": 0.0})
    width = candidate.model.hidden

    def value(name, at):
        if name.endswith("split_heads.bias"):
            return np.where(at[0] >= 2 * width, 30000.0, 0.0)
        return 1.0 if name.endswith("gain") else 0.0

    def job(runtime):
        set_parameters(runtime, value)
        result = runtime.run_step(0)
        return result.loss, result.skipped

    (loss, skipped), *_ = ranks_of(candidate, job)
    assert loss == pytest.approx(np.log(candidate.model.vocab), rel=1e-3) and not skipped


# ---- the command line, under real MPI --------------------------------------------------------------------------------

BYTES = {"vocab": 260, "layers": 2}


def planned(path, precision, training=None, **choices):
    dump_plan(plan(model("gpt", **BYTES), training={"precision": precision} | (training or {}), **choices), path)
    return path


@pytest.mark.mpi
def test_a_float16_run_records_scales_and_skipped_steps(launch, tmp_path):
    """Huge gradients are left to the scaler: the measurement tells which steps it skipped."""
    file = planned(tmp_path / "plan.json", "float16", {"clip_norm": 1.0}, tp=2, batch=4)
    output = tmp_path / "measured.json"
    done = launch(2, PROGRAM, "run", file, "--steps", 4, "--warmup", 1, "-o", output, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: CPUs do not compute in float16") == 1
    measured = load_measurement(output)
    assert len(measured.loss_scales) == len(measured.losses) == len(measured.gradient_norms) == 5
    halvings = [later / earlier for earlier, later in zip(measured.loss_scales, measured.loss_scales[1:], strict=False)]
    assert halvings == [0.5 if step in measured.skipped_steps else 1.0 for step in range(4)]
    assert [norm is None for norm in measured.gradient_norms] == [step in measured.skipped_steps for step in range(5)]
    assert measured.loss_scales[0] == 2.0**16
    assert measured.environment["emulated"] and measured.environment["precision"] == "float16"
    assert measured.machine.precision == "float32" and "float32 GEMM" in measured.machine.provenance
    assert measured.operators["world.all_reduce.overflow.update"].bytes == 8
    assert json.loads(done.stdout)["loss_scales"] == measured.loss_scales


@pytest.mark.mpi
def test_a_bfloat16_run(launch, tmp_path):
    file = planned(tmp_path / "plan.json", "bfloat16", dp=2, zero_stage=1, batch=4)
    output = tmp_path / "measured.json"
    done = launch(2, PROGRAM, "run", file, "--steps", 2, "--warmup", 1, "-o", output, "--paranoid")
    assert done.returncode == 0, done.stderr
    measured = load_measurement(output)
    assert measured.loss_scales == [] and measured.skipped_steps == []
    assert measured.losses[0] == pytest.approx(5.56, abs=0.1)


@pytest.mark.mpi
@pytest.mark.parametrize("launch", ["installed"], indirect=True)
def test_check_in_bfloat16_and_in_float32(launch, tmp_path):
    file = planned(tmp_path / "plan.json", "bfloat16", dp=2, zero_stage=1, batch=4)
    checked = launch(2, PROGRAM, "check", file)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.startswith("passed:") and "limit 0.02 in bfloat16" in checked.stdout
    exact = launch(2, PROGRAM, "check", file, "--dtype", "float32")
    assert exact.returncode == 0 and "limit 1e-05 in float32" in exact.stdout


@pytest.mark.mpi
@pytest.mark.parametrize("launch", ["installed"], indirect=True)
def test_overflow_beyond_the_scaler_is_one_message_and_exit_2(launch, tmp_path):
    """A learning rate of a million makes parameters that overflow in every later forward pass."""
    file = planned(tmp_path / "plan.json", "float16", {"learning_rate": 1e6, "clip_norm": None}, dp=2, batch=4)
    done = launch(2, PROGRAM, "run", file, "--steps", 60, "-o", tmp_path / "measured.json")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("at loss scale 1, the smallest") == 1
    assert done.stderr.count("--precision bfloat16") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "measured.json").exists()
