"""What the benchmarks conclude from what a console printed."""

import sys
from pathlib import Path

import pytest
from tools.bench import compare, debian, guest, process, report
from tools.bench.compare import Median
from tools.bench.iperf import iperf_figure
from tools.bench.process import Result, Run


def run(**values: Result) -> Run:
    return Run({name.replace("_", ".", 1): result for name, result in values.items()})


def median(value: float, unit: str = "ns", check: str = "") -> Median:
    return Median(value, unit, 1, frozenset({check} - {""}))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("int.sha256 1.25e-3 s 00c0ffee", ("int.sha256", Result(1.25e-3, "s", "00c0ffee"))),
        ("boot.kernel_uptime_at_init 0.92 s", ("boot.kernel_uptime_at_init", Result(0.92, "s"))),
        ("# begin guestbench 1 mode=full", None),
        ("[    0.5] ACPI: 2 s", None),
        ("int.sha256 fast s", None),
    ],
)
def test_result_lines_are_told_from_others(line: str, expected: tuple[str, Result] | None) -> None:
    assert process.parse_line(line) == expected


def test_medians_leave_out_runs_without_the_value() -> None:
    runs = [
        run(int_a=Result(1, "s", "aa")),
        run(int_a=Result(9, "s", "aa"), fp_b=Result(2, "s")),
        run(int_a=Result(2, "s", "bb")),
    ]
    found = compare.medians(runs)
    assert found["int.a"] == Median(2, "s", 3, frozenset({"aa", "bb"}))
    assert found["fp.b"].runs == 1


@pytest.mark.parametrize(("unit", "expected"), [("s", 2.0), ("ns", 2.0), ("MB/s", 0.5)])
def test_speed_ratio_is_above_one_where_we_are_faster(unit: str, expected: float) -> None:
    assert compare.speed_ratio(median(10, unit), median(20, unit)) == expected


def test_speed_ratio_of_nothing_is_none() -> None:
    assert compare.speed_ratio(median(0), median(1)) is None


def test_families_leave_out_what_describes_the_run() -> None:
    names = ["boot.wall_total", "int.a", "fp.b", "int.c", "host.cpu_time"]
    assert compare.families(names) == {"int": ["int.a", "int.c"], "fp": ["fp.b"]}


def test_geometric_mean() -> None:
    assert compare.geometric_mean([2, 8]) == pytest.approx(4)
    assert compare.geometric_mean([]) is None


def test_check_value_that_is_not_natives_is_named() -> None:
    native = {"int.a": median(1, check="aa"), "int.b": median(1, check="bb")}
    other = {"int.a": median(1, check="aa"), "int.b": median(1, check="cc"), "boot.x": median(1)}
    assert compare.wrong_checks(native, other) == [("int.b", "bb", "cc")]


def test_run_of_a_process_has_its_results_and_times() -> None:
    script = (
        "print('boot.kernel_uptime_at_init 0.5 s'); print('# begin guestbench 1 mode=full');"
        "print('int.a 3 ns 0badcafe'); print('# end elapsed=0.1')"
    )
    done = process.run_once([sys.executable, "-c", script], timeout=60)
    assert done.finished
    assert done.results["int.a"] == Result(3, "ns", "0badcafe")
    assert 0 < done.results["boot.wall_to_init"].value <= done.results["boot.wall_total"].value


def test_run_that_fails_or_hangs_is_not_finished() -> None:
    failed = process.run_once([sys.executable, "-c", "print('# guest exit'); exit(3)"], timeout=60)
    assert not failed.finished
    assert "exit code 3" in failed.remarks
    hung = process.run_once([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    assert not hung.finished
    assert "stopped after 0.2 s" in hung.remarks


def test_sections_are_replaced_and_others_stay(tmp_path: Path) -> None:
    document = tmp_path / "docs" / "benchmarks.md"
    report.write_section("guest", "first text", document)
    report.write_section("exits", "kept \\1", document)
    report.write_section("guest", "second text", document)
    text = document.read_text()
    assert "first text" not in text
    assert text.index("second text") < text.index("kept \\1")
    assert text.startswith("# Benchmarks\n")


@pytest.mark.parametrize(
    ("load", "clock", "named"),
    [(0.02, 0.99, ""), (1.04, 1.0, "native"), (0.0, 0.5, "clock of native")],
    ids=["quiet", "shared", "slow-clock"],
)
def test_figures_of_a_disturbed_run_are_doubted(load: float, clock: float, named: str) -> None:
    values = {
        "host.other_load": Result(load, "CPUs"),
        "host.clock_ratio": Result(clock, "x"),
    }
    doubts = guest.disturbances({"native": [Run(values)]})
    assert bool(doubts) == bool(named)
    assert named in " ".join(doubts)


def test_figures_of_fio_and_iperf3_are_found() -> None:
    fields = ["3", "fio-3.33", "bench", "0", "0", *["0"] * 120]
    fields[6:8], fields[47:49] = ["2000", "500"], ["4000", "1000"]
    line = ";".join(fields)

    assert debian.fio_figure(line, "randread", large=False) == 500
    assert debian.fio_figure(line, "write", large=True) == pytest.approx(4.096)
    said = """
[  5]   0.00-10.00  sec  11.2 GBytes  9600 Mbits/sec    0             sender
[  5]   0.00-10.00  sec  11.2 GBytes  9590 Mbits/sec                  receiver
"""
    assert iperf_figure(said) == 9590


def test_a_promise_is_a_bound_of_the_ratio() -> None:
    assert debian.ROWS["boot"].kept(0.4)
    assert not debian.ROWS["boot"].kept(0.6)
    assert debian.ROWS["read"].kept(2.5)
    assert not debian.ROWS["read"].kept(1.9)


def test_memory_beside_the_guests_is_neither_its_ram_nor_the_hosts_cache() -> None:
    def mapping(name: str, pss_kib: int, dirty_kib: int) -> str:
        fields = f"Size: 9 kB\nPss: {pss_kib} kB\nPrivate_Dirty: {dirty_kib} kB\nVmFlags: rd wr\n"
        return f"7f0000000000-7f0000001000 rw-p 00000000 fe:00 12 {name}\n{fields}"

    smaps = (
        mapping("/memfd:tetrarch-ram (deleted)", 4096, 4096)
        + mapping("/usr/lib/libc.so.6", 2048, 1024)
        + mapping("/memfd:tetrarch-code (deleted)", 2048, 0)
        + mapping("[heap]", 1024, 1024)
        + mapping("", 1024, 1024)
    )
    assert debian.beside_ram_mib(smaps) == 5
