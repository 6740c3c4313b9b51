"""The benchmarks: what is timed was verified, in quiet rounds, and no figure is typed by hand."""

from __future__ import annotations

import csv
import json
import mmap
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import coreai_torch
from coreai_torch.backends import cpu

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks" / "results" / "cpu.json").exists():
    pytest.skip("needs a checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT))  # as `python -m benchmarks` has it

from benchmarks import (  # noqa: E402
    cases,
    compile_modes,
    instructions,
    models,
    overheads,
    plot,
    providers,
    report,
    run,
    scaling,
    sections,
    targets,
    timing,
)
from benchmarks.measure import Plan, measure  # noqa: E402

SHAPES = "4x64,2x2x8x64,1x64"
EAGER = ["ours", "reference", "torch"]
TRIAL = Plan(EAGER, effort=timing.TRIAL)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch._dynamo.reset()


def trial(folder: Path, *arguments: str, providers: str = ",".join(EAGER)) -> dict:
    path = folder / "result.json"
    common = ["--rounds", "1", "--budget", "0", "--providers", providers, "--json", str(path)]
    assert run.main([*common, *arguments]) == 0
    return json.loads(path.read_text())


def test_json_csv_plot_and_report(tmp_path, capsys):
    table, picture = tmp_path / "times.csv", tmp_path / "times.svg"
    result = trial(
        tmp_path,
        *("--mode", "default", "--threads", "1,2", "--shapes", SHAPES),
        *("--dtypes", "float32,mixed", "--csv", str(table), "--plot", str(picture)),
    )
    assert [r["threads"] for r in result["runs"]] == [1, 2]
    for each in result["runs"]:
        assert len(each["cases"]) == 6
        for case in each["cases"]:
            assert case["same_bits"]["ours"]
            assert {"copy_", "clone", *EAGER} <= case["times"]["forward"].keys()
            assert case["times"]["forward+backward"]["ours"]["median_us"] > 0
            assert case["times"]["backward"]["torch"]["gb_per_s"] > 0
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 2 * 6 * (2 + 3 * len(EAGER))
    one = next(r for r in rows if r["provider"] == "ours" and r["direction"] == "backward")
    seconds = float(one["median_us"]) * 1e-6
    assert float(one["gb_per_s"]) == pytest.approx(int(one["bytes"]) / seconds / 1e9, rel=0.02)
    assert picture.read_text().lstrip().startswith("<?xml")
    text = report.report(result)
    order = ["slower, or takes more", "Targets missed", "Where the figures come from", "## Default"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert result["environment"]["torch"] == torch.__version__
    assert "ours" in capsys.readouterr().out


@pytest.mark.slow
def test_both_modes_run_in_processes_of_their_own(tmp_path):
    result = trial(tmp_path, "--shapes", "4x64", "--dtypes", "float32")
    assert [each["mode"] for each in result["runs"]] == ["default", "warm"]
    assert "GLIBC_TUNABLES" in result["runs"][1]["allocator"]


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path, monkeypatch):
    def measure_one(case, plan):
        if case.shape == (2, 8):
            raise KeyboardInterrupt
        return measure(case, plan)

    monkeypatch.setattr(run, "measure", measure_one)
    result = trial(
        tmp_path,
        *("--mode", "default", "--shapes", "4x64,2x8,4x8", "--dtypes", "float32"),
        *("--measures", "times,memory", "--threads", "1,2"),
    )
    (each,) = result["runs"]
    assert [case["shape"] for case in each["cases"]] == [[4, 64]]
    assert "memory" not in result


def test_times_are_kept_where_another_measure_is_interrupted(tmp_path, monkeypatch):
    def interrupted(plan):
        raise KeyboardInterrupt

    monkeypatch.setattr(overheads, "memory_use", interrupted)
    result = trial(
        tmp_path,
        *("--mode", "default", "--shapes", "4x64", "--dtypes", "float32"),
        *("--measures", "times,memory"),
    )
    assert len(result["runs"][0]["cases"]) == 1
    assert "memory" not in result


def test_the_ring_of_cuda_is_tried_out(tmp_path):
    result = trial(
        tmp_path,
        *("--mode", "default", "--method", "ring", "--shapes", "4x64,2x2x8x64"),
        *("--dtypes", "bfloat16"),
    )
    (each,) = result["runs"]
    assert each["copy_bandwidth"] > 0
    for case in each["cases"]:
        assert case["times"].keys() == set(cases.DIRECTIONS)
    each["device"], each["mode"] = "cuda", "cuda"
    for case in each["cases"]:
        case["output_bytes"] = 10**9  # as large as the targets of a card want it
    found = [check for check in targets.checks(each) if check.target.other is None]
    assert [check.cells()[3] for check in found] == [
        "≥ 85% of the copy bandwidth",
        "≥ 88% of the copy bandwidth",
    ] * 2
    assert "of the copy bandwidth" in report.report(result)


def test_compiled_providers():
    plan = TRIAL._replace(providers=["ours", "compile", "compile-torch"])
    record = measure(cases.Case((4, 64), "bfloat16"), plan)
    assert not record["skipped"]
    for times in record["times"].values():
        assert {"ours", "compile", "compile-torch"} <= times.keys()


def test_add_rms_norm():
    case = cases.Case((4, 64), "bfloat16", "add_rms_norm")
    names = EAGER if hasattr(coreai_torch.ops, "add_rms_norm") else EAGER[1:]
    record = measure(case, TRIAL)
    for direction in cases.DIRECTIONS:
        assert set(names) == record["times"][direction].keys() - {"copy_", "clone"}
    assert record["errors"]["torch"].keys() == {"y", "sum", "dx", "dresidual", "dscale"}
    assert max(record["errors"]["torch"].values()) < 0.02
    assert case.bytes_moved("forward") == 4 * 4 * 64 * 2 + 64 * 2


def test_a_missing_op_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(coreai_torch.ops, "add_rms_norm", raising=False)
    result = trial(tmp_path, "--mode", "default", "--op", "add_rms_norm", "--shapes", "4x64")
    assert result["runs"][0]["cases"] == []
    assert "coreai_torch.ops has no add_rms_norm" in capsys.readouterr().out


def test_missing_libraries_are_said(tmp_path, capsys):
    result = trial(
        tmp_path,
        *("--mode", "default", "--shapes", "4x64", "--dtypes", "float32"),
        providers=",".join(providers.PROVIDERS.keys() - {"compile", "compile-torch"}),
    )
    for name in ("liger", "quack", "apex", "te", "flashinfer"):
        assert result["skipped"][name] == "runs on CUDA cards only"
    missing = providers.Provider("none", providers.ours, package="no_such_package")
    assert providers.unavailable(missing, "cpu") == "no_such_package is not installed"
    assert "skipped: liger" in capsys.readouterr().out


def test_apple():
    pytest.importorskip("coreai_torch.composite_ops._rms_norm")
    plan = TRIAL._replace(providers=["ours", "apple"])
    for case in (cases.Case((4, 64), "mixed"), cases.make_case((2, 2, 8, 64), "bfloat16")):
        record = measure(case, plan)
        assert record["same_bits"]["apple"]
        assert record["times"]["forward+backward"]["apple"]["median_us"] > 0


def test_scales_of_a_shape_with_heads():
    assert cases.make_case((2, 3, 8, 64), "float32").scale_shape == (3, 1, 64)
    assert cases.make_case((2, 3, 8, 64), "float32", one_scale=True).scale_shape == (64,)


def wrong(name: str, change):
    """The provider with outputs changed."""
    right = providers.PROVIDERS[name]

    def make(case, scale):
        subject = right.make(case, scale)
        return subject._replace(call=lambda x: change(subject.call(x)))

    return right._replace(make=make)


@pytest.mark.parametrize(
    "change",
    [lambda y: y * 1.01, lambda y: y * float("nan"), lambda y: y[:1], lambda y: y.no_such_method()],
    ids=["off by 1 %", "NaN", "shape", "error"],
)
def test_wrong_results_have_no_speed(change, monkeypatch):
    monkeypatch.setitem(providers.PROVIDERS, "torch", wrong("torch", change))
    record = measure(cases.Case((4, 64), "float32"), TRIAL)
    assert "torch" in record["skipped"]
    for times in record["times"].values():
        assert "torch" not in times
        assert "ours" in times


def test_a_wrong_result_of_ours_is_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(providers.PROVIDERS, "ours", wrong("ours", lambda y: y * 1.0001))
    path = tmp_path / "result.json"
    arguments = ["--mode", "default", "--shapes", "4x64", "--dtypes", "float32", "--budget", "0"]
    arguments += ["--providers", "ours,reference", "--json", str(path)]
    assert run.main(arguments) == 1
    (case,) = json.loads(path.read_text())["runs"][0]["cases"]
    assert "times" not in case
    assert case["failed"].startswith("y is off by")
    assert "wrong result, not timed" in capsys.readouterr().err
    assert "**wrong result**" in report.report(json.loads(path.read_text()))


class Machine:
    """A clock and a /proc/stat in which every run takes a second and others use `shares` of it."""

    def __init__(self, shares: list[float]) -> None:
        self.shares, self.now, self.own, self.busy = shares, 0.0, 0.0, 0.0
        self.calls = 0

    def run(self) -> None:
        share = self.shares[min(self.calls, len(self.shares) - 1)]
        self.calls += 1
        self.now += 1 + share
        self.own += 1
        self.busy += 1 + share * (1 + share)

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.time, "process_time", lambda: self.own)
        monkeypatch.setattr(timing, "busy_seconds", lambda: self.busy)
        monkeypatch.setattr(timing.os, "cpu_count", lambda: 1)


def test_contended_rounds_are_dropped(monkeypatch):
    # Three runs to warm up, then two contended rounds among quiet ones.
    machine = Machine([0, 0, 0, 0, 0.5, 0, 0.5, 0])
    machine.install(monkeypatch)
    timings = timing.take_turns({"it": machine.run}, timing.Effort(3, 100.0))
    assert (timings.rounds, timings.dropped, timings.contended) == (3, 2, 0)
    assert timings.seconds["it"] == [1, 1, 1]


def test_where_all_rounds_are_contended_it_is_said(monkeypatch):
    machine = Machine([0.5, 0.5, 0.5, 0.9, 0.4, 0.3, 0.2, 0.6])
    machine.install(monkeypatch)
    timings = timing.take_turns({"it": machine.run}, timing.Effort(3, 100.0))
    assert timings.contended == timings.rounds == 3
    assert timings.seconds["it"] == pytest.approx([1.2, 1.3, 1.4])  # the least contended
    assert timings.dropped == 6


def test_rounds_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "busy_seconds", lambda: None)  # or disturbed rounds are repeated
    order: list[str] = []
    timed = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timing.take_turns(timed, timing.Effort(3, 100.0, 0.0))
    rounds = "".join(order[-9:])
    assert [rounds[i : i + 3] for i in range(0, 9, 3)] == ["abc", "bca", "cab"]


@pytest.mark.skipif(sys.platform == "win32", reason="does not count page faults")
def test_page_faults_are_counted():
    pages = 1000

    def touch() -> None:
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
            if hasattr(mmap, "MADV_NOHUGEPAGE"):
                memory.madvise(mmap.MADV_NOHUGEPAGE)
            memory[:: mmap.PAGESIZE] = bytes(pages)

    timings = timing.take_turns({"touch": touch, "rest": lambda: None}, timing.Effort(3, 100.0))
    assert all(pages <= faults < pages + 100 for faults in timings.page_faults["touch"])
    assert all(faults < 100 for faults in timings.page_faults["rest"])


def test_a_loss_is_told_with_its_page_faults():
    def taken(us: float, faults: int) -> dict[str, float]:
        return {"median_us": us, "page_faults": faults}

    times = {"forward": {"ours": taken(3.0, 4096), "compile": taken(2.0, 1)}}
    run = {"mode": "default", "threads": 2, "cases": [{"name": "it", "times": times}]}
    (line,) = targets.slower(run)
    assert line.endswith(
        "fwd: 1.50 times compile (3.0 against 2.0 µs; page faults: 4096 against 1)"
    )


def test_calls_apart_are_settled_one_by_one(monkeypatch):
    monkeypatch.setattr(timing, "busy_seconds", lambda: None)
    order: list[str] = []
    timed = {name: (lambda name=name: order.append(name)) for name in "ab"}
    effort = timing.Effort(3, 100.0, round_s=1e-4)  # several calls of each in a round
    timings = timing.take_turns(timed, effort, lambda: order.append("-"), apart=True)
    assert order[::2] == ["-"] * (len(order) // 2)
    assert set(order[1::2]) == {"a", "b"}
    assert len(timings.seconds["a"]) == 3


def test_other_measures():
    size = models.Size(dim=32, heads=2, layers=1, length=8, batch=2)
    result = {
        "host": overheads.host_times(TRIAL),
        "memory": overheads.memory_use(TRIAL, (cases.Case((64, 256), "float32"),)),
        "models": models.model_times(TRIAL, size),
        "cold": scaling.cold(TRIAL, ((8, 64),)),
        "rows": scaling.by_rows(TRIAL, (1, 10)),
        "threads": scaling.by_threads(TRIAL, [1, 2], ((8, 64),)),
        "levels": scaling.by_levels(TRIAL, cpu.supported_levels(), (8, 64)),
    }
    labels = {overheads.FLOOR, "ours, function", "ours, module", "F.rms_norm", "nn.RMSNorm"}
    for record in result["host"]:
        for times in record["times"].values():
            assert labels <= times.keys()
    (memory,) = result["memory"]
    tensor, scale = 64 * 256 * 4, 256 * 4
    ours = memory["bytes"]["ours"]
    assert ours["forward"] == tensor  # the output and nothing else
    assert ours["saved"] == tensor + scale  # the input and the scale
    assert memory["bytes"]["reference"]["saved"] > 1.9 * tensor
    assert memory["bytes"]["reference"]["forward"] >= 2 * tensor
    for record in result["models"]:
        assert record["times"].keys() == {"ours", "torch", "reference"}, record
    assert [case["dtype"] for case in result["cold"]] == ["float32", "bfloat16"]
    assert {"copy_", *EAGER} <= result["cold"][0]["times"]["forward"].keys()
    assert [case["shape"] for case in result["rows"]] == [[1, 64], [10, 64]]
    for name, records in result.items():
        section = {"mode": "default", "threads": 2, "records": records}
        lines = sections.EXTRA[name](section)
        assert lines[0].startswith("## ")
        assert any(line.startswith("| ") for line in lines)


def test_a_loss_with_cold_caches_is_told():
    times = {"ours": {"median_us": 3.0}, "torch": {"median_us": 2.0}}
    case = {"name": "float32 8x64", "times": {"forward": times}}
    result = {"cold": {"mode": "warm", "threads": 2, "records": [case]}}
    (line,) = targets.slower_elsewhere(result)
    assert line.startswith("warm, cold caches, 2 threads, float32 8x64, fwd: 1.50 times torch")


def test_the_share_of_a_copys_bandwidth():
    times = {"copy_": {"median_us": 10.0}, "ours": {"median_us": 20.0}}
    case = {
        **{"name": "float32 8x64", "dtype": "float32", "output_bytes": 100},
        **{"bytes": {"forward": 210}, "times": {"forward": times}},
    }
    target = targets.Target("forward", "copy_", 1.5)
    found = targets.check({"mode": "warm"}, case, target)
    assert found.cells()[4:] == ["2.00", "52%", "20.0, 10.0", "**missed**"]


def test_targets_of_levels():
    times = {name: {"median_us": us} for name, us in (("x86-64-v3", 30.0), ("x86-64-v4", 20.0))}
    records = [
        {"name": dtype, "dtype": dtype, "times": {"forward": times}}
        for dtype in ("float32", "bfloat16")
    ]
    section = {"mode": "warm", "threads": 2, "records": records}
    assert [check.met for check in targets.level_checks(section)] == [False, True]
    del times["x86-64-v4"]
    assert not list(targets.level_checks(section))


def test_other_measures_drop_wrong_results(monkeypatch):
    monkeypatch.setitem(providers.PROVIDERS, "torch", wrong("torch", lambda y: y * 1.01))
    host = overheads.host_time(cases.Case((1, 64), "float32"), TRIAL)
    assert {"ours, function", "copy_", "clone"} <= host["times"]["forward"].keys()
    assert not {"F.rms_norm", "nn.RMSNorm"} & host["times"]["forward"].keys()
    memory = overheads.memory(cases.Case((16, 64), "float32"), TRIAL)
    assert memory["bytes"].keys() == {"ours", "reference"}


def test_models_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setitem(models.NORMS, "torch", lambda *arguments: torch.nn.Identity())
    size = models.Size(dim=32, heads=2, layers=1, length=8, batch=2)
    record = models.measure("training step", "float32", TRIAL, size)
    assert "times" not in record
    assert record["failed"].startswith("torch differs from ours")
    assert "**wrong result**" in "\n".join(
        sections.models({"mode": "default", "threads": 2, "records": [record]})
    )


@pytest.mark.slow
def test_the_harness_measures_the_modes_of_compile(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compile_modes, "PATTERNS", (compile_modes.cast_after,))
    path = tmp_path / "modes.json"
    arguments = ["--shapes", "4x64", "--dtypes", "bfloat16", "--rounds", "1", "--budget", "0"]
    try:
        assert compile_modes.main([*arguments, "--json", str(path)]) == 0
    finally:
        coreai_torch.set_compile_mode("auto")
    (case,) = json.loads(path.read_text())["cases"]
    assert case["us"]["forward"].keys() == {"kernel", "decompose"}
    assert "geometric mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--shapes", "4"], "two or four positive numbers"),
        (["--shapes", "axb"], "expected shapes such as 64x4096"),
        (["--providers", "ours,none"], "unknown: none"),
        (["--measures", "host", "--csv", "host.csv"], "--measures leaves out"),
        (["--threads", "0"], "expected a positive number"),
        (["--device", "cuda", "--mode", "warm"], "cuda"),
    ],
)
def test_bad_arguments(arguments, problem, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert problem in capsys.readouterr().err


def test_results_and_readme_are_generated():
    result = report.load(report.RESULTS / "cpu.json")
    command = "run python -m benchmarks.report"
    committed = (report.RESULTS / "RESULTS.md").read_text(encoding="utf-8")
    others = report.other_machines(report.ELSEWHERE)
    assert committed == report.report(result, "bandwidth.svg", others), command
    alone = report.reported_alone()
    assert report.CARD in alone
    for path in alone:
        of_other = path.with_suffix(".md").read_text(encoding="utf-8")
        assert of_other == report.report(report.load(path)), command
    readme = report.README.read_text(encoding="utf-8")
    card = report.load(report.CARD)
    block = report.readme_block(result, "benchmarks/results/speedup.svg", card)
    assert readme == report.with_block(readme, block), command


def test_what_kept_memory_gains():
    case = {"op": "rms_norm", "dtype": "float32", "shape": [8, 64], "kind": "plain"}
    default, warm = (
        {
            "mode": mode,
            "threads": 2,
            "cases": [case | {"times": {report.BOTH: {"ours": {"median_us": median}}}}],
        }
        for mode, median in (("default", 3000.0), ("warm", 1000.0))
    )
    fresh = default["cases"][0]
    result = {"runs": [default, warm]}
    assert report.with_memory_kept(result, default, fresh) == pytest.approx(3)
    assert report.with_memory_kept(result, {"threads": 1}, fresh) is None
    assert report.with_memory_kept(result, default, fresh | {"shape": [9, 64]}) is None


def test_pictures_of_the_committed_results(tmp_path):
    pytest.importorskip("matplotlib")
    result = report.load(report.RESULTS / "cpu.json")
    for folder in (tmp_path / "once", tmp_path / "twice"):
        folder.mkdir()
        report.draw(result, folder)
    for name in ("bandwidth.svg", "speedup.svg"):
        text = (tmp_path / "once" / name).read_text()
        assert "ours" in text
        assert text == (tmp_path / "twice" / name).read_text()


def test_with_block_wants_its_markers():
    text = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    assert report.with_block(text, "new") == f"a\n{report.BEGIN}\nnew\n{report.END}\nb\n"
    with pytest.raises(ValueError, match="expected one"):
        report.with_block("nothing", "new")


def test_nothing_to_plot():
    with pytest.raises(ValueError, match="nothing to plot"):
        plot.write_bandwidth({"cases": [], "mode": "default", "threads": 1}, Path("none.svg"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_instructions_are_counted(tmp_path):
    path = tmp_path / "counts.json"
    assert instructions.main(["--dims", "64", "1024", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    counts = {(r["kernel"], r["dtype"], r["dim"]): r["per_element"] for r in result["records"]}
    assert len(counts) == 2 * 4 * 2
    assert 0.5 < counts["forward", "float32", 1024] < counts["backward", "float32", 1024] < 10
    assert counts["forward", "float32", 64] > counts["forward", "float32", 1024]


def test_the_command_line_from_the_root():
    command = [sys.executable, "-m", "benchmarks", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--providers" in done.stdout
