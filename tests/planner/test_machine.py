"""Profiles: what is shipped, how files merge and round-trip, datasheet words, and what is refused and how."""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec
import pytest

from planner.errors import MachineError
from planner.machine import (
    GENERIC_PROFILE,
    Machine,
    MeasuredCollective,
    MeasuredRegime,
    dump_machine,
    load_machine,
    machine_names,
    render_machine,
    user_profile_path,
)

DATASHEETS = ["a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200"]
PUBLISHED = [
    "staged-mpi-node",
    "eos-h100-80gb",
    "jean-zay-a100-80gb",
    "selene-a100-80gb",
    "simumax-b200",
    "torchtitan-h100-96gb",
    "vtrain-a100-80gb",
    "zero-bubble-a100-80gb",
]


@pytest.fixture
def a100() -> Machine:
    return load_machine("a100-80gb")


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_shipped_profiles_are_exactly_the_published_machines_datasheets_and_a_generic_one() -> None:
    assert sorted(machine_names()) == sorted([*DATASHEETS, *PUBLISHED, GENERIC_PROFILE])


@pytest.mark.parametrize("name", [*DATASHEETS, *PUBLISHED, GENERIC_PROFILE])
def test_shipped_profile_loads_names_itself_and_states_provenance(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    groups = (machine.host, machine.device, machine.link_in_host, machine.link_between_hosts, machine.overheads)
    for group in (*groups, machine.memory, machine.residuals):
        assert len(group.provenance.split()) >= 3


@pytest.mark.parametrize("name", [*DATASHEETS, *PUBLISHED, GENERIC_PROFILE])
def test_written_profile_reads_back_equal(name: str, tmp_path: Path) -> None:
    machine = load_machine(name)
    dump_machine(machine, tmp_path / "folder" / "copy.toml")
    assert load_machine(tmp_path / "folder" / "copy.toml") == machine


def test_round_trip_keeps_measured_tables_and_awkward_text(a100: Machine, tmp_path: Path) -> None:
    regimes = (
        MeasuredRegime(up_to_bytes=8192.0, latency_seconds=1e-6, seconds_per_byte=1e-10),
        MeasuredRegime(latency_seconds=3e-6, seconds_per_byte=5e-11),
    )
    table = MeasuredCollective(operation="all_reduce", group_size=2, algorithm="ring", regimes=regimes)
    machine = msgspec.structs.replace(
        a100,
        name='quote " back\\slash \n new line \x7f µs',
        link_in_host=msgspec.structs.replace(a100.link_in_host, measured=(table, table)),
        relative_speeds=(1.0, 0.5),
        residuals=msgspec.structs.replace(a100.residuals, ranges={"hidden": (256.0, 4096.0)}),
    )
    dump_machine(machine, tmp_path / "m.toml")
    assert load_machine(tmp_path / "m.toml") == machine


def test_datasheet_peaks_match_the_published_ones() -> None:
    peaks = {name: load_machine(name).peak_flops_per_second("bfloat16") for name in DATASHEETS}
    assert peaks == {
        "a100-40gb": 312e12,
        "a100-80gb": 312e12,
        "h100-80gb": 989.4e12,
        "h200": 989.4e12,
        "b200": 2250e12,
    }
    assert load_machine("h100-80gb").peak_flops_per_second("fp8") == 2 * 989.45e12


def test_every_machine_named_in_the_published_measurements_has_a_profile() -> None:
    files = sorted((Path(__file__).parents[1] / "data" / "published").glob("*.csv"))
    assert files
    for path in files:
        with path.open(newline="") as handle:
            named = {row["machine"] for row in csv.DictReader(handle) if "machine" in row}
        assert named <= set(machine_names()), path.name


def test_extending_profile_changes_only_what_it_states(a100: Machine, tmp_path: Path) -> None:
    path = write(tmp_path, 'extends = "a100-80gb"\nname = "mine"\n[host]\ndevices = 4\n')
    machine = load_machine(path)
    expected = msgspec.structs.replace(a100, name="mine", host=msgspec.structs.replace(a100.host, devices=4))
    assert machine == expected


def test_a_retired_figure_of_older_profiles_is_ignored_and_no_other(a100: Machine, tmp_path: Path) -> None:
    table = 'extends = "a100-80gb"\n[residuals]\n'
    assert load_machine(write(tmp_path, f"{table}memory_log_sigma = 0.1\n")) == a100
    with pytest.raises(MachineError, match=r"unknown field `memory_sigma`.*residuals"):
        load_machine(write(tmp_path, f"{table}memory_sigma = 0.1\n"))


def test_a_table_of_threads_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"Expected `array` of length >= 1 - at `\$\.host\.thread_speedup`; compare"):
        load_machine(write(tmp_path, 'extends = "a100-80gb"\n[host]\nthread_speedup = []\n'))


def test_extending_in_a_circle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "circle.toml"
    path.write_text(f'extends = "{path}"\n')
    with pytest.raises(MachineError, match="extends itself"):
        load_machine(path)


def test_words_set_devices_and_the_bandwidth_of_one_host() -> None:
    machine = load_machine("a100-80gb,per-host=4,network=800Gb/s,network-latency=5us,memory=40GiB,price=2.5")
    assert machine.devices_per_host == 4
    assert machine.link_between_hosts.shared_bandwidth_bytes_per_second == 100e9
    assert machine.link_between_hosts.bandwidth_bytes_per_second == 25e9
    assert machine.link_between_hosts.latency_seconds == pytest.approx(5e-6)
    assert machine.device.memory_bytes == 40 * 2**30
    assert machine.device.dollars_per_hour == 2.5
    assert machine.residuals.step_log_sigma == 0.25
    assert "datasheet words" in machine.link_between_hosts.provenance


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a100-80gb,gpus=8", "unknown word 'gpus'; use per-host, network"),
        ("a100-80gb,network=200", "network=200 is not a positive figure with its unit; write it like network=200GB/s"),
        ("a100-80gb,network=5us", "write it like network=200GB/s"),
        ("a100-80gb,memory=80GB/s", "write it like memory=80GiB"),
        ("a100-80gb,per-host=0", "write it like per-host=8"),
        ("a100-80gb,per-host=2.5", "write it like per-host=8"),
        ("a100-80gb,per-host=8,per-host=4", "'per-host' is given 2 times; give one value"),
        ("a100-80gb,network=-1GB/s", "network=-1GB/s is not a positive figure"),
        ("a900-80gb,per-host=8", "no machine 'a900-80gb'.*a100-80gb.*planner profile"),
    ],
)
def test_bad_words_are_refused_with_the_remedy(words: str, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        load_machine(words)


def test_default_is_the_measured_profile_and_else_the_generic_one(
    a100: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_machine().name == GENERIC_PROFILE
    assert user_profile_path() == tmp_path / "meshwright" / "machine.toml"
    dump_machine(msgspec.structs.replace(a100, name="measured here"), user_profile_path())
    assert load_machine().name == "measured here"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("latency_seconds = 2e-6", "latency_second = 2e-06", r"unknown field `latency_second`.*link_in_host"),
        ("latency_seconds = 2e-6\n", "", r"missing required field `latency_seconds`.*link_in_host"),
        ("latency_seconds = 2e-6", "latency_seconds = -1.0", r">= 0.*link_in_host.latency_seconds"),
        ("latency_seconds = 2e-6", "latency_seconds = inf", r"link_in_host.latency_seconds is inf"),
        ("devices = 8", "devices = 0", r">= 1.*host.devices"),
        ("devices = 8", "devices = 7.5", r"Expected `int`.*host.devices"),
        ("bfloat16 = ", "bf16 = ", r"Invalid enum value 'bf16'"),
        ("[device.gemm.default]", "[device.gemm.float16]", r"device.gemm.default.fraction is missing"),
        ("multiprocessors = 108\n", "", r"device.multiprocessors is missing"),
        (
            "[algorithms]",
            "[algorithms]\nallreduce = 'ring'",
            r"algorithms has the unknown key 'allreduce'; use all_gat",
        ),
        ("schema = 1", "schema = 2", r"schema"),
        ("schema = 1", "schema = ", r"not valid TOML.*line 1"),
    ],
)
def test_malformed_profile_names_the_file_and_the_figure(
    a100: Machine, tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = render_machine(a100)
    assert text.count(old) >= 1
    path = write(tmp_path, text.replace(old, new, 1))
    with pytest.raises(MachineError, match=message) as caught:
        load_machine(path)
    assert "mine.toml" in str(caught.value)


def test_missing_precision_names_the_figure_and_the_choices(a100: Machine) -> None:
    with pytest.raises(MachineError, match=r"device.peak_flops_per_second.fp8; use a precision it has \(bfloat16, "):
        a100.peak_flops_per_second("fp8")


def test_figures_are_read_and_replaced_by_path_and_checked(a100: Machine) -> None:
    changed = a100.with_figures({"device.gemm.default.fraction": 0.5, "link_in_host.efficiency.all_reduce": 0.7})
    assert changed.figure("device.gemm.default.fraction") == 0.5
    assert changed.link_in_host.efficiency == {"default": 0.78, "all_reduce": 0.7}
    assert a100.figure("device.gemm.default.fraction") == 0.8
    with pytest.raises(MachineError, match="fraction"):
        a100.with_figures({"device.gemm.default.fraction": 1.5})
    with pytest.raises(MachineError, match=r"no figure device\.gemms"):
        a100.figure("device.gemms")


def test_speeds_of_heterogeneous_ranks(a100: Machine) -> None:
    machine = msgspec.structs.replace(a100, relative_speeds=(1.0, 0.5))
    assert [machine.relative_speed(rank) for rank in range(3)] == [1.0, 0.5, 1.0]
