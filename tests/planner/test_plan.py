"""Plans: what comes back from JSON, what is refused and how, and a hash of the content alone."""

import json
import os
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from small_plans import GPT, LLAMA, plan, plans

from planner.errors import DataError, MeshwrightError, PlanError
from planner.plan import Plan, dump_plan, load_plan


def content(candidate):
    return json.loads(msgspec.json.encode(candidate))


def written(tmp_path, tree):
    path = tmp_path / "plan.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


# ---- JSON ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(plans())
def test_a_plan_survives_json(candidate):
    again = msgspec.json.decode(msgspec.json.encode(candidate), type=Plan)
    assert again == candidate
    assert again.hash == candidate.hash
    assert msgspec.json.encode(again) == msgspec.json.encode(candidate)


def test_a_plan_survives_its_file(tmp_path):
    candidate = plan(pp=2, tp=3, dp=2, zero_stage=2, batch=9, sequence_parallel=True, training={"clip_norm": 0.5})
    dump_plan(candidate, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == candidate
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"], "no half-written file is left"


def test_the_hash_is_of_the_content(tmp_path):
    candidate = plan(tp=2)
    assert candidate.hash == plan(tp=2).hash
    assert re.fullmatch(r"[0-9a-f]{16}", candidate.hash)
    assert msgspec.structs.replace(candidate, version="99.0").hash == candidate.hash
    tree = content(candidate)
    shuffled = dict(reversed(tree.items())) | {"layouts": dict(reversed(tree["layouts"].items()))}
    assert load_plan(written(tmp_path, shuffled)).hash == candidate.hash, "the order of keys is no content"


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"seed": 1}}, {"training": {"dropout": 0.2}}, {"micro": 2}, {"batch": 9}, {"schedule": "gpipe"},
        {"recompute": "full"}, {"attention": "blocked"}, {"stage_layers": (1, 3)}, {"spec": GPT},
    ],
    ids=str,
)  # fmt: skip
def test_the_hash_changes_with_every_choice(change):
    assert plan(pp=2, **change).hash != plan(pp=2).hash


# ---- files that are no plans -----------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read plan file .*no\.json: No such file.*; name an existing file"):
        load_plan(tmp_path / "no.json")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000], ids=["arrays", "objects"])
def test_a_file_nested_without_end_is_refused(tmp_path, text):
    with pytest.raises(DataError, match=r"is not a whole JSON plan: .*; write it again with the planner"):
        load_plan(written(tmp_path, text))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    text = json.dumps(content(plan()))
    with pytest.raises(DataError, match=r"is not a whole JSON plan: .*; write it again with the planner"):
        load_plan(written(tmp_path, text[: int(len(text) * share)]))


BROKEN = [
    ("extra field", lambda t: t | {"turbo": True}, r"is not a valid plan: .*`turbo`"),
    ("extra nested field", lambda t: t | {"mesh": t["mesh"] | {"ep": 2}}, r"`ep`.*\$\.mesh"),
    ("wrong type", lambda t: t | {"micro_batch_size": "two"}, r"Expected `int`, got `str`.*\$\.micro_batch_size"),
    ("wrong choice", lambda t: t | {"recompute": "sometimes"}, r"'sometimes'.*\$\.recompute"),
    ("missing field", lambda t: {k: v for k, v in t.items() if k != "parts"}, r"missing required field `parts`"),
    ("not an object", lambda _: [1, 2], r"Expected `object`, got `array`"),
    ("future schema", lambda t: t | {"schema": 2}, r"has schema 2, newer than 1; install a newer meshwright"),
    ("another kind", lambda t: t | {"kind": "prediction"}, r"is a prediction, not a plan; name a plan file"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_malformed_file_is_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as caught:
        load_plan(written(tmp_path, change(content(plan()))))
    assert "plan.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot write .*; choose a writable folder"):
        dump_plan(plan(), tmp_path / "nowhere" / "plan.json")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*: Not a directory; choose a writable folder"):
        dump_plan(plan(), tmp_path / "file" / "plan.json")
    for folder in (tmp_path, Path(), Path("/")):
        with pytest.raises(DataError, match=r"cannot write .*: it is a folder; name a file with -o"):
            dump_plan(plan(), folder)


def test_a_link_keeps_pointing_and_a_pipe_stays_a_pipe(tmp_path):
    """Renaming over `-o /dev/null` would replace the device for everybody, where the user may."""
    link, pipe = tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(tmp_path / "real.json")
    dump_plan(plan(), link)
    assert link.is_symlink() and load_plan(tmp_path / "real.json") == plan()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        dump_plan(plan(), pipe)
        assert pipe.is_fifo() and json.loads(os.read(reader, 1 << 16)) == content(plan())
    finally:
        os.close(reader)


# ---- choices that cannot be carried out ------------------------------------------------------------------------------

REFUSED = [
    ("tp above heads", {"tp": 7}, "tp=7 exceeds the 6 attention heads; use tp<=6 or put the factor on dp, cp or pp"),
    ("dp above batch", {"dp": 9}, "dp=9 exceeds the 8 sequences of the global batch; use"),
    ("pp above layers", {"pp": 5}, "stages=5 exceeds the 4 layers; use a smaller pp or fewer model chunks"),
    ("chunks above layers", {"pp": 2, "schedule": "interleaved", "chunks": 3}, "stages=6 exceeds the 4 layers"),
    ("cp above positions", {"cp": 17}, "cp=17 exceeds the 16 positions; use a smaller cp"),
    ("empty batch", {"micro": 0}, "batch sizes 8 and 0 must be positive; use at least 1"),
    ("empty axis", {"tp": 0}, "tp=0 is not an axis size; use tp>=1"),
    ("stage layers", {"pp": 2, "stage_layers": (1, 2)}, r"stage layers \(1, 2\) add up to 3, the model has 4; correct"),
    ("stage count", {"pp": 2, "stage_layers": (1, 1, 2)}, "do not give each of the 2 stages at least one layer; name"),
    ("empty stage", {"pp": 3, "stage_layers": (2, 0, 2)}, "do not give each of the 3 stages at least one layer"),
    ("sp without tp", {"sequence_parallel": True}, "sequence_parallel splits over the tensor axis and tp=1; use tp>=2"),
    ("zero without data", {"zero_stage": 1, "tp": 2}, r"zero=1 shards over data parallel ranks and dp·cp=1; use dp>=2"),
    ("ulysses heads", {"cp": 4, "tp": 2, "cp_kind": "ulysses"}, "cp=4 exceeds the 3 heads that tp=2 leaves a rank"),
    ("ring blocked", {"cp": 2, "cp_kind": "ring", "attention": "blocked"}, "ring attention is already blocked; use"),
    ("forward-only zero", {"dp": 2, "zero_stage": 1, "forward_only": True}, "forward-only plan has no gradients"),
    ("parts", {"tp": 2, "parts": {"heads": (5, 2)}}, r"parts.heads=\[5, 2\] do not split 6 into 2 positive parts"),
    ("empty part", {"tp": 2, "parts": {"ffn": (36, 0)}}, r"parts.ffn=\[36, 0\] do not split 36 into 2 positive parts"),
    ("dropout", {"training": {"dropout": 1.0}}, "dropout=1.0 is not a probability below 1; use 0 <= dropout < 1"),
    ("learning rate", {"training": {"learning_rate": -1.0}}, "lr=-1.0 is negative; use lr>=0"),
    ("clip", {"training": {"clip_norm": 0.0}}, "clip-norm=0.0 is not positive; leave it out for no clipping"),
    ("threads", {"training": {"threads_per_rank": 0}}, "threads-per-rank=0; use at least 1"),
    ("many threads", {"training": {"threads_per_rank": 2**63}}, "use at least 1 and at most 4096"),
    ("beta", {"training": {"beta1": 1.0}}, "beta1=1.0 forgets nothing or never settles; use 0 <= beta1 < 1"),
    ("second beta", {"training": {"beta2": 2.0}}, "use 0 <= beta2 < 1"),
    ("epsilon", {"training": {"epsilon": 0.0}}, "epsilon=0.0, weight_decay=0.01; use epsilon > 0 and weight_decay"),
    ("ranks", {"dp": 2**21, "batch": 2**21}, "2097152 ranks exceed the 1048576 that can be planned for; use fewer"),
    ("micro-batches", {"batch": 2**17}, "micro-batches=131072 exceeds the 65536 of a replica.*; use a larger"),
    ("tensor", {"batch": 2**60, "micro": 2**60}, "elements of a tensor=.* that can be counted; use a"),
    ("algorithm", {"collectives": {"dp.all_reduce": "x"}}, "collectives.dp.all_reduce='x' is not known; use native or"),
    ("its algorithm", {"collectives": {"all_to_all": "ring"}}, "all_to_all='ring' is not known; use native or"),
    ("collective", {"collectives": {"bogus.key": "ring"}}, "collectives name 'bogus.key', which is no collective; use"),
    ("collective axis", {"collectives": {"ep.all_reduce": "ring"}}, "'ep.all_reduce', which is no collective; use"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("choices", "message"), [row[1:] for row in REFUSED if row[2]], ids=[r[0] for r in REFUSED if r[2]]
)
def test_an_impossible_choice_is_refused_with_value_limit_and_remedy(choices, message):
    with pytest.raises(PlanError, match=message) as caught:
        plan(**choices)
    assert "\n" not in str(caught.value)


def test_kv_heads_that_ulysses_cannot_split():
    with pytest.raises(PlanError, match=r"ulysses cannot split 2 key-value heads over tp·cp=3 ranks; use cp_kind allg"):
        plan(LLAMA, cp=3, cp_kind="ulysses")


EDITED = [
    (
        "signature",
        ("layouts", "layer.qkv", "tp"),
        "sideways",
        r"layouts\.layer\.qkv\.tp='sideways' is not possible; use replicate or seq or column",
    ),
    ("axis", ("layouts", "layer.qkv", "ep"), "row", r"layouts\.layer\.qkv names the axis 'ep'; use dp, cp, tp"),
    (
        "dp",
        ("layouts", "layer.qkv", "dp"),
        "replicate",
        r"layouts\.layer\.qkv\.dp='replicate' is not possible; use batch",
    ),
    (
        "operator",
        ("layouts", "layer.router"),
        {"dp": "batch"},
        "layouts name the operator 'layer.router'; the model has",
    ),
    (
        "ids over tp",
        ("layouts", "embedding.tokens", "tp"),
        "seq",
        r"embedding\.tokens\.tp='seq' is not possible; use replicate or vocab",
    ),
    (
        "batch on tp",
        ("layouts", "layer.qkv", "tp"),
        "batch",
        r"layer\.qkv\.tp='batch' is not possible; use replicate or seq",
    ),
    ("row of hidden", ("layouts", "layer.qkv", "tp"), "row", r"layer\.qkv\.tp='row' is not possible"),
    (
        "ring on tp",
        ("layouts", "layer.attention", "tp"),
        "ring",
        r"attention\.tp='ring' is not possible; use replicate or h",
    ),
    ("cp kind", ("layouts", "layer.attention", "cp"), "ring", r"attention\.cp='ring' is not possible; use allgather"),
    ("cp whole", ("layouts", "layer.ffn_in", "cp"), "replicate", r"ffn_in\.cp='replicate' is not possible; use seq"),
    (
        "packed",
        ("layouts", "layer.split_heads", "tp"),
        "replicate",
        "do not go together: the packed columns of qkv have no",
    ),
    (
        "strided slice",
        ("layouts", "layer.attention", "tp"),
        "replicate",
        "do not go together: a slice along heads, which is",
    ),
    (
        "missing axis",
        ("layouts", "layer.qkv"),
        {"dp": "batch", "tp": "column"},
        r"layouts\.layer\.qkv lacks a signature on cp",
    ),
    (
        "tied weight",
        ("layouts", "head.vocab", "tp"),
        "replicate",
        "keep their shared weight differently; use vocab with",
    ),
    (
        "heads",
        ("parts", "heads"),
        [6, 0],
        r"parts\.heads=\[6, 0\] do not split 6 into 2 positive parts; for example \[3, 3\]",
    ),
    ("mesh", ("mesh", "tp"), 7, "tp=7 exceeds the 6 attention heads; use tp<=6"),
    ("replicas", ("mesh", "dp"), 3, r"parts\.batch=\[4, 4\] do not split 8 into 3 positive parts"),
    ("stages", ("stage_layers",), [4, 1], "do not give each of the 1 stages"),
    ("schema 0", ("schema",), 0, "plan schema 0 is not 1, the one this version reads; write the plan again"),
    ("lone part", ("parts", "seq"), [17], r"parts\.seq=\[17\] do not split 16 into 1 positive parts"),
]


@pytest.mark.parametrize(("where", "value", "message"), [row[1:] for row in EDITED], ids=[row[0] for row in EDITED])
def test_a_plan_edited_by_hand_is_checked_on_load(tmp_path, where, value, message):
    tree = content(plan(tp=2, dp=2))
    target = tree
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    with pytest.raises(PlanError, match=message):
        load_plan(written(tmp_path, tree))


def test_a_sequence_part_smaller_than_the_tensor_axis_is_refused():
    with pytest.raises(PlanError, match=r"parts\.seq=\[15, 1\] leave a rank fewer positions than tp=2.*use"):
        plan(cp=2, tp=2, sequence_parallel=True, parts={"seq": (15, 1)})


def test_shared_key_value_heads_cannot_be_gathered():
    """With 2 key-value heads on 4 ranks each is held twice: concatenating would count it twice."""
    attention = {"layer.attention": {"tp": "replicate"}}
    with pytest.raises(PlanError, match=r"key-value heads may be shared|a slice along heads"):
        plan(LLAMA, tp=4, layouts=attention)


def test_layouts_may_be_anything_on_an_axis_of_one_rank():
    assert plan(layouts={"layer.qkv": {"tp": "replicate"}}).layouts["layer.qkv"]["tp"] == "replicate"


def test_missing_layouts_are_named(tmp_path):
    tree = content(plan())
    del tree["layouts"]["head.vocab"]
    with pytest.raises(PlanError, match=r"layouts lack the operators head\.vocab; write the plan again"):
        load_plan(written(tmp_path, tree))


def test_an_unknown_schedule_is_refused(tmp_path):
    tree = content(plan(pp=2))
    tree["schedule"]["name"] = "1f2b"
    with pytest.raises(MeshwrightError, match="'1f2b' is not a schedule that can be generated; choose one of"):
        load_plan(written(tmp_path, tree))


def test_chunks_that_a_schedule_does_not_know_are_refused(tmp_path):
    tree = content(plan(pp=2))
    tree["schedule"]["num_model_chunks"] = 2
    tree["stage_layers"] = [1, 1, 1, 1]
    with pytest.raises(MeshwrightError, match="1f1b has 1 model chunk"):
        load_plan(written(tmp_path, tree))


# ---- micro-batches ---------------------------------------------------------------------------------------------------


def test_replicas_may_have_different_numbers_of_micro_batches():
    candidate = plan(dp=3, batch=10, micro=2)
    assert candidate.parts.batch == (4, 3, 3)
    assert [candidate.micro_batches(r) for r in range(3)] == [(2, 2), (2, 1), (2, 1)]
    uneven = plan(dp=2, batch=9, micro=1)
    assert [len(uneven.micro_batches(r)) for r in range(2)] == [5, 4]


def test_replicas_that_share_collectives_in_every_micro_batch_have_as_many():
    """ZeRO 2 and 3 reduce after every micro-batch: replicas with fewer take part with empty ones."""
    for stage in (2, 3):
        assert plan(dp=2, batch=9, micro=1, zero_stage=stage).micro_batches(1) == (1, 1, 1, 1, 0)
    assert plan(dp=2, batch=9, micro=1, zero_stage=1).micro_batches(1) == (1, 1, 1, 1)


PROGRAMS = ["0F0,0F1,0B0,0B1", "1F0,1B0,1F1,1B1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch_size": 1}, "are of 2 micro-batches, and replicas have 4; write the plan again with the sch"),
        ({"micro_batch_size": 4}, "are of 2 micro-batches, and replicas have 1; write the plan again with the sch"),
        ({"forward_only": True}, "0B0 is a backward in a forward-only schedule; remove it"),
        ({"schedule": {"programs": ["0F0,0F1,0B1", PROGRAMS[1]]}}, r"stage 0 never runs B \(or I and W\) of"),
        ({"schedule": {"programs": ["0B0,0F0,0F1,0B1", PROGRAMS[1]]}}, "waits forever at 0B0 for 0F0, which it runs"),
        ({"schedule": {"programs": ["0F0,0F1,0B0,0B0,0B1", PROGRAMS[1]]}}, "0B0 does again what was done before"),
        ({"schedule": {"programs": ['"' + "0F0," * 40_000, PROGRAMS[1]]}}, "is not CSV: field larger than field limit"),
    ],
    ids=["more micro-batches", "fewer", "forward only", "cut short", "reordered", "duplicated", "no CSV"],
)  # fmt: skip
def test_explicit_programs_must_be_of_this_step_and_able_to_run(tmp_path, change, message):
    """A program that leaves a backward out would train on part of the batch and say nothing."""
    tree = content(plan(pp=2, batch=4, micro=2))
    tree["schedule"] |= {"name": "custom", "programs": PROGRAMS}
    assert load_plan(written(tmp_path, tree)).schedule.programs == tuple(PROGRAMS)
    tree["schedule"] |= change.pop("schedule", {})
    with pytest.raises(MeshwrightError, match=message):
        load_plan(written(tmp_path, tree | change))


def test_explicit_programs_must_be_of_this_mesh(tmp_path):
    tree = content(plan(pp=2))
    tree["schedule"]["programs"] = ["0F0,0B0"]
    with pytest.raises(PlanError, match="are of 1 ranks and 1 stages, the plan has pp=2 and 2; write the plan again"):
        load_plan(written(tmp_path, tree))
