"""Reading the compiler's dumps: a doctored one in its layout, and every way it can be wrong."""

from pathlib import Path

import pytest

from tpu_stack.kernels.compiled.loops import DumpError, issued, loop_depths
from tpu_stack.planner.kernels.bundles import Schedule, read_schedules
from tpu_stack.planner.kernels.profile import profile_schedule
from tpu_stack.planner.kernels.targets import libtpu_version

DATA = Path(__file__).parent / "data" / "kernel_dump"
FILES = {path.name: path.read_text() for path in DATA.iterdir()}
ONE = "17-kernel_int4.1-"
LISTING = FILES[f"{ONE}72-final_bundles.txt"]
UTILIZATION = FILES[f"{ONE}70-final_hlo-static-per-bundle-utilization.txt"]
ANALYSIS = FILES[f"{ONE}71-schedule-analysis_final_bundles.txt"]


def dump(folder: Path, **changed: str | None) -> Path:
    """A dump folder, with files whose name contains a key replaced, or left out for None."""
    for name, text in FILES.items():
        for key, other in changed.items():
            if name.startswith(ONE) and name.endswith(f"-{key}.txt"):
                text = other
        if text is not None:
            (folder / name).write_text(text)
    return folder


def test_a_schedule_is_split_at_the_grid_loop(tmp_path):
    [schedule] = read_schedules(dump(tmp_path))
    assert schedule.name == "kernel_int4"
    assert (schedule.bundles, schedule.loop.bundles, schedule.outside.bundles) == (8, 4, 4)
    assert schedule.grid == (1, 14, 2)
    assert schedule.steps == 28
    assert schedule.executed == 4 * 28 + 4
    assert schedule.inner_loops == 0
    assert schedule.vmem_bytes == 0x12000
    assert schedule.loop.slots["VALU"] == 2
    assert schedule.outside.slots["VLOAD"] == 0
    assert Schedule.from_json(schedule.as_json()) == schedule


def test_an_empty_bundle_is_as_deep_as_its_shallower_neighbour():
    listing = "\n".join(
        ["0 : {}", "0x1 LB: > { a }", "0x2 : {}", "0x3 LB: > > { b }", "0x4 : {}", "0x5 : > { c }"]
    )
    assert loop_depths(listing, "k") == ([0, 1, 1, 2, 1, 1], 2)


def test_bundles_issued_multiply_loops_out(tmp_path):
    dump(tmp_path)
    assert issued(tmp_path, "kernel_int4", (28,)) == 4 * 28 + 4
    with pytest.raises(DumpError, match="no final listing"):
        issued(tmp_path, "another", (28,))


def test_a_profile_names_the_unit_that_binds(tmp_path):
    [schedule] = read_schedules(dump(tmp_path))
    found = profile_schedule(schedule)
    # 4 bundles: VSTORE fills 1 of 4 slots, VALU 2 of 16, MATMUL 1 of 8, VLOAD 1 of 12. The spill
    # is the same store again and does not count as a unit of its own.
    assert found["binding_unit"] == "VSTORE"
    assert found["binding_occupancy"] == 0.25
    assert found["occupancy_loop"]["VALU"] == 2 / 16
    assert found["spills"] == 1
    assert found["fills"] == 0


def test_without_a_grid_loop_the_whole_kernel_is_the_body(tmp_path):
    [schedule] = read_schedules(dump(tmp_path, final_bundles=LISTING.replace(" > {", " {")))
    assert schedule.loop.bundles == 0
    assert schedule.steps == 1
    assert schedule.executed == 8
    assert profile_schedule(schedule)["binding_occupancy"] == 1 / 8


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("final_bundles", None, "no final_bundles.txt"),
        ("final_bundles", "something else", "has no bundles"),
        ("final_bundles", LISTING + "  0x8 : {}\n", "8 bundles by the analysis, 9 in the listing"),
        ("final_hlo-static-per-bundle-utilization", None, "no final_hlo-static"),
        ("final_hlo-static-per-bundle-utilization", "UNITS", "does not start with capacities"),
        (
            "final_hlo-static-per-bundle-utilization",
            UTILIZATION.replace("0 0 1 0 0 0", "0 0 1 0 0"),
            "rows that are not 6 units",
        ),
        (
            "final_hlo-static-per-bundle-utilization",
            UTILIZATION.replace("0 0 1 0 0 0", "0 0 x 0 0 0"),
            "no numbers",
        ),
        ("schedule-analysis_final_bundles", ANALYSIS.replace("total", "sum of"), "states no total"),
        ("schedule-analysis_final_bundles", None, "no schedule of a Pallas kernel among"),
        ("post-delay-converter", None, "no post-delay-converter.txt"),
    ],
)
def test_a_dump_that_is_not_as_expected_names_libtpu(tmp_path, file, text, says):
    with pytest.raises(DumpError, match=f"libtpu {libtpu_version()}: .*{says}"):
        read_schedules(dump(tmp_path, **{file: text}))
