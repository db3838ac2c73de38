"""The bench's logic: what is paired with what, what is counted, what is written. No times are asserted."""

from __future__ import annotations

import dataclasses
import gc
import io
import itertools
import json
import math
import sys
import time
from pathlib import Path

import octavo.bench
import pytest
import torch
from bench_settings import limits_of, setting
from octavo import _C, reference
from octavo.bench import blockwise, cases, common, limits, memory, nf4, optim, plot, sparse
from octavo.bench import int8 as family
from rich.console import Console


def fake_clock(seconds):
    """Runs the call and reports the next of `seconds`."""
    stream = iter(seconds)

    def clock(run):
        run()
        return next(stream)

    return clock


def timing(*samples, busy=None):
    return common.Timing(tuple(samples), tuple(busy or samples), 1)


def test_contenders_alternate_and_take_their_copies_in_turn():
    log = []
    contenders = {
        "a": [lambda: log.append("a0"), lambda: log.append("a1")],
        "b": [lambda: log.append("b0")],
    }
    effort = common.Effort(sample_s=1.0, budget_s=math.inf, min_rounds=1, max_rounds=3)
    # Two calibrations each, of 1 s for a and .5 s for b; then three rounds of one a and two b.
    timings = common.time_paired(contenders, effort, fake_clock([1.0, 1.0, 0.5, 0.5, *[8.0] * 6]))
    assert log[:7] == ["a0", "a1", "a0", "a0", "b0", "b0", "b0"]  # warm-up of each copy, then calibration
    assert log[7:] == ["a0", "b0", "b0", "b0", "b0", "a1", "a0", "b0", "b0"]  # A B, B A, A B; a0, a1, a0
    assert timings["a"].inner == 1
    assert timings["b"].inner == 2
    assert timings["a"].samples == (8.0, 8.0, 8.0)
    assert timings["b"].samples == (4.0, 4.0, 4.0)  # per call


def test_rounds_fill_the_budget_within_their_bounds():
    effort = common.Effort(budget_s=10.0, min_rounds=3, max_rounds=20)
    assert effort.rounds(1.0) == 10
    assert effort.rounds(100.0) == 3
    assert effort.rounds(1e-6) == 20
    assert effort.rounds(0.0) == 20


@pytest.mark.parametrize("contenders", [{}, {"a": []}])
def test_a_contender_without_calls_is_an_error(contenders):
    with pytest.raises(ValueError, match="at least one call"):
        common.time_paired(contenders, common.QUICK)


def test_garbage_collection_is_restored_when_a_contender_fails():
    turns = itertools.count()

    def fails_later():
        if next(turns) > 3:
            raise RuntimeError("broken")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="broken"):
        common.time_paired({"a": [fails_later]}, common.QUICK)
    assert gc.isenabled()


def test_a_ratio_is_taken_round_by_round():
    # A neighbour slows rounds 2 and 3 of both: the times vary by 10, the ratio does not.
    assert common.paired_ratio([2.0, 20.0, 10.0], [1.0, 10.0, 5.0]) == (2.0, 2.0, 2.0)
    assert common.paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == (2.0, 3.0, 4.0)
    assert common.paired_ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="2 and 1 rounds"):
        common.paired_ratio([1.0, 1.0], [1.0])


def test_the_fields_of_a_row_come_from_its_timing():
    timings = {"a": timing(1.0, 3.0, 2.0, busy=(2.0, 2.0, 2.0)), "b": timing(1.0, 1.0, 1.0)}
    fields = common.timed(timings["a"], timings, "b")
    assert (fields["median_s"], fields["best_s"], fields["busy_s"], fields["rounds"]) == (2.0, 1.0, 2.0, 3)
    assert fields["versus"] == "b"
    assert fields["ratio"] == (1.5, 2.0, 2.5)
    assert fields["busy_ratio"] == (2.0, 2.0, 2.0)
    assert "versus" not in common.timed(timings["a"], timings, "absent")


def test_enough_copies_to_overflow_the_cache():
    assert common.copies_for(16 << 20, 32 << 20) == 8
    assert common.copies_for(1 << 30, 32 << 20) == 1
    assert common.copies_for(100, 32 << 20) == common.MAX_COPIES
    assert common.copies_for(0, 32 << 20) == common.MAX_COPIES
    assert common.last_level_cache() > 0


def test_relative_error():
    exact = torch.tensor([3.0, 4.0])
    assert common.relative_error(exact.to(torch.bfloat16), exact) == 0.0
    assert common.relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)


# ---- limits --------------------------------------------------------------------------------------------------------


def test_the_slower_of_memory_and_compute_binds():
    machine = limits_of(read=10.0, int8=100.0, fma=20.0)
    assert machine.bound(ops=100.0, moved=30.0, kind="int8") == ("memory", 3.0)
    assert machine.bound(ops=1000.0, moved=30.0, kind="int8") == ("compute", 10.0)
    # No peak of its own: memory binds only where it would at fp32's rate too.
    assert machine.bound(ops=20.0, moved=30.0, kind=None) == ("memory", 3.0)
    assert machine.bound(ops=1000.0, moved=30.0, kind=None) == (None, 0.0)


def test_pieces_run_at_once_and_their_results_add_up():
    def piece():
        time.sleep(0.01)
        return 5.0

    assert 0.0 < limits.on_threads([piece, piece]) < 10.0 / 0.01


@pytest.mark.parametrize("kind", ["int8", "fma"])
def test_a_peak_loop_counts_what_it_did(kind):
    in_force = _C.isa()
    try:
        for level in _C.available_isas():
            _C.set_isa(level)
            assert _C.peak(kind, 0) == 0.0
            assert _C.peak(kind, 30) == 30 * _C.peak(kind, 1) > 0.0
    finally:
        _C.set_isa(in_force)


def test_a_peak_loop_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown kind 'fp8'"):
        _C.peak("fp8", 1)
    with pytest.raises(ValueError, match="iterations is -1"):
        _C.peak("int8", -1)


def test_read_all_reads_every_byte():
    """Its sum over 64-bit words shows whether a level skips or repeats anything."""
    data = bytearray(itertools.islice(itertools.cycle(range(251)), 256 * 37))
    words = sum(int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)) % 2**64
    in_force = _C.isa()
    try:
        for level in _C.available_isas():
            _C.set_isa(level)
            assert _C.read_all(data) == words, level
            assert _C.read_all(memoryview(data)[: 256 * 5]) == _C.read_all(bytes(data[: 256 * 5]))
    finally:
        _C.set_isa(in_force)
    with pytest.raises(ValueError, match="contiguous"):
        _C.read_all(memoryview(data)[::2])


# ---- the int8 family -----------------------------------------------------------------------------------------------

SHAPE = (4, 48, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_have_the_outliers_they_promise(dtype):
    problem = family.Problem(5, 24, 128, dtype)
    assert problem.inputs["plain"].abs().max() < family.THRESHOLD
    columns = (problem.inputs["outliers"].abs() >= family.THRESHOLD).all(0)
    assert columns.sum() == cases.OUTLIER_COLUMNS
    assert torch.equal(problem.inputs["outliers"][:, ~columns], problem.inputs["plain"][:, ~columns])
    again = family.Problem(5, 24, 128, dtype)
    assert torch.equal(problem.weight, again.weight)


def test_rows_of_a_layer():
    names = ["octavo t=0", "octavo t=6", "octavo t=6, outliers", "octavo int8_gemm", "torch bf16", "torch._int_mm"]
    skipped = {}
    rows = family.bench_linear(family.Problem(*SHAPE, torch.bfloat16), setting(names), skipped)
    by_name = {row.method: row for row in rows}
    assert list(by_name) == names
    assert not skipped
    m, n, k = SHAPE
    for row in rows:
        assert row.ops == 2 * m * n * k
        assert row.rounds == 2
        assert row.copies == common.MAX_COPIES
        assert not row.from_memory
        assert 0 < row.best_s <= row.median_s
    assert by_name["octavo t=6"].bytes == n * k + 2 * m * k + 2 * m * n
    assert by_name["torch bf16"].bytes == 2 * n * k + 2 * m * k + 2 * m * n
    assert by_name["torch._int_mm"].bytes == n * k + 2 * m * k + 4 * m * n
    assert by_name["torch._int_mm"].error is None
    assert by_name["torch._int_mm"].versus == "octavo int8_gemm"
    for name in ("octavo t=0", "octavo t=6", "octavo t=6, outliers", "octavo int8_gemm"):
        assert 1e-3 < by_name[name].error < 3e-2, name  # int8 at both ends, and not a wrong product
    assert by_name["torch bf16"].error < 5e-3


def test_a_peer_that_is_missing_is_skipped_and_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    skipped = {}
    names = ["octavo t=6", "bitsandbytes t=6"]
    rows = family.bench_linear(family.Problem(*SHAPE, torch.float32), setting(names), skipped)
    assert [row.method for row in rows] == ["octavo t=6"]
    assert "bitsandbytes" in skipped["bitsandbytes t=6"]


def test_a_failure_of_octavo_itself_is_not_skipped(monkeypatch):
    def broken(*_):
        raise RuntimeError("broken kernel")

    monkeypatch.setattr(family.ops, "int8_linear", broken)
    with pytest.raises(RuntimeError, match="broken kernel"):
        family.prepare(family.Problem(*SHAPE, torch.float32), setting(["octavo t=6"]), {})


def test_rows_of_quantization():
    rows = family.bench_quantize(6, 40, torch.bfloat16, False, setting([]), {})
    assert [row.method for row in rows] == ["octavo t=0", "octavo t=6", "torch, op by op"]
    assert {row.bytes for row in rows} == {6 * 40 * 3 + 6 * 4}
    assert rows[0].ratio == (1.0, 1.0, 1.0)
    assert rows[0].limit is None
    cold = family.bench_quantize(6, 40, torch.bfloat16, True, setting([]), {})
    assert cold[0].limit == "memory"
    assert cold[0].limit_share > 0
    assert cold[0].copies == common.MAX_COPIES


def test_the_peer_written_in_torch_agrees_with_the_op():
    x = torch.randn(7, 33)
    codes, scale = family.torch_quantize_rowwise(x)
    expected, expected_scale = family.ops.quantize_rowwise(x)
    assert torch.equal(scale.squeeze(-1), expected_scale)
    assert (codes.int() - expected.int()).abs().max() <= 1  # x / scale and x * (1 / scale) round apart at midpoints


def test_every_comparison_names_a_contender():
    names = {method.name for method in family.METHODS}
    assert len(names) == len(family.METHODS)
    assert {method.versus for method in family.METHODS} - {None} <= names
    assert set(memory.METHODS) <= names


# ---- the blockwise and optim families -----------------------------------------------------------------------------


def test_blockwise_rows():
    effort, limit = common.Effort(0.0, 0.0, 1, 1), limits_of(read=1e9)
    skipped: dict[str, str] = {}
    how = family.Setting(effort, limit, 1, "cpu")
    tables = blockwise.bench(1024, torch.float32, False, how, skipped)
    assert [rows[0].section for rows in tables] == ["quantize_blockwise", "dequantize_blockwise"]
    for rows in tables:
        assert {row.method for row in rows} | set(skipped) == {"octavo", "torch, op by op", "bitsandbytes"}
        assert rows[0].bytes == 1024 * 5 + 16
    assert 0 < tables[1][0].error < 0.02
    (cold,) = {row.from_memory for row in blockwise.bench(512, torch.bfloat16, True, how, {})[0]}
    assert cold


def test_nf4_rows():
    how, skipped = setting([]), {}
    what = blockwise.Directions(("quantize_4bit", "dequantize_4bit"), nf4.contenders, 0.5 + 4 / nf4.BLOCKSIZE)
    tables = blockwise.bench(1024, torch.bfloat16, False, how, skipped, what)
    assert [rows[0].section for rows in tables] == ["quantize_4bit", "dequantize_4bit"]
    assert all({row.method for row in rows} | set(skipped) == {"octavo", "bitsandbytes"} for rows in tables)
    assert tables[0][0].bytes == 1024 * 2.5 + 64
    assert 0.05 < tables[1][0].error < 0.15


def test_nf4_products_compute_the_layer_and_its_gradient():
    problem = family.Problem(5, 64, 128, torch.bfloat16)
    names = ["octavo NF4", "octavo NF4, double quant.", "torch bf16", "octavo NF4, dX", "torch bf16, dX"]
    how = dataclasses.replace(setting([]), methods=[method for method in nf4.METHODS if method.name in names])
    rows = {row.method: row for row in family.bench_linear(problem, how, {})}
    assert list(rows) == names
    assert 0.05 < rows["octavo NF4"].error < 0.15
    assert rows["octavo NF4, dX"].versus == "torch bf16, dX"
    ours, theirs = (build(problem, problem.weight)() for build in (nf4.octavo_transposed, nf4.torch_transposed))
    assert common.relative_error(ours, theirs) < 0.15


def test_the_blockwise_peer_in_torch_computes_the_same():
    x = torch.randn(2048, generator=torch.Generator().manual_seed(0))
    values = reference.dynamic_map(True)
    codes, absmax = blockwise.torch_quantize(x, (values[1:] + values[:-1]) / 2)
    expected, expected_absmax = blockwise.ops.quantize_blockwise(x)
    assert torch.equal(absmax.flatten(), expected_absmax)
    assert (codes.flatten() != expected).float().mean() < 0.001  # a division instead of a product
    back = blockwise.torch_dequantize(expected, expected_absmax, values, torch.float32)
    assert torch.equal(back.flatten(), blockwise.ops.dequantize_blockwise(expected, expected_absmax))


def test_optim_rows_and_memory():
    effort, limit = common.Effort(0.0, 0.0, 1, 1), limits_of(read=1e9)
    skipped: dict[str, str] = {}
    shapes = [(64, 128), (7,)]
    rows = optim.bench("two tensors", shapes, torch.float32, effort, limit, "cpu", True, skipped)
    names = {method.name for method in optim.METHODS}
    assert {row.method for row in rows} | set(skipped) == names
    assert rows[0].method == optim.DEFAULT and rows[0].shape == (2, 64 * 128 + 7)
    assert rows[1].versus == optim.DEFAULT
    console = Console(record=True, width=160)
    optim.print_rows(console, rows)
    assert "ns / parameter" in console.export_text()
    found = optim.measure_memory(optim.DEFAULT, 1 << 16, "cpu")
    assert found["state_per_param"] < 2.04
    optim.print_memory(console, [found, {"method": "x", "count": 1, "error": "none"}])


def test_transformer_parameters():
    shapes = cases.transformer_parameters(cases.OPTIM_LAYERS)
    assert len(shapes) == 322
    assert sum(math.prod(shape) for shape in shapes) == pytest.approx(1e8, rel=0.01)


# ---- records -------------------------------------------------------------------------------------------------------


@pytest.fixture
def record():
    made = common.Record("int8", common.describe_machine())
    made.limits.append(limits_of(read=1e10, int8=1e12, fma=1e11).to_dict())
    for m in (1, 16):
        problem = family.Problem(m, 24, 32, torch.bfloat16)
        made.rows += family.bench_linear(problem, setting(["octavo t=6", "torch bf16"]), made.skipped)
    return made


def test_json_holds_every_figure(record, tmp_path):
    path = record.write(tmp_path / "new" / "folder")
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # nothing half-written beside it
    data = json.loads(path.read_text())
    assert data["schema"] == common.SCHEMA
    assert data["family"] == "int8"
    assert {"cpu", "cores", "isa", "threads", "versions", "pinning", "flags", "load"} <= set(data["machine"])
    assert data["machine"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert data["limits"][0]["peaks"] == {"int8": 1e12, "fma": 1e11}
    assert len(data["rows"]) == 4
    row = data["rows"][0]
    assert row["shape"] == [1, 24, 32]
    assert row["tops"] == pytest.approx(row["ops"] / row["median_s"] / 1e12)
    assert row["gbs"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
    assert data["rows"][1]["versus"] == "octavo t=6"
    assert len(data["rows"][1]["ratio"]) == 3


def test_table_and_plot_show_every_contender(record, tmp_path):
    pytest.importorskip("matplotlib")
    console = Console(width=200, record=True, file=io.StringIO())
    common.print_rows(console, record.rows[:2])
    text = console.export_text()
    assert "linear m=1 24x32 bf16, threads=1" in text
    assert "octavo t=6" in text
    assert "torch bf16" in text
    path = plot.speed(record, tmp_path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("width", [66, 80, 120, 200])
def test_no_figure_is_cut(record, width):
    row = dataclasses.replace(record.rows[1], method="bitsandbytes dequantize + matmul")
    row = dataclasses.replace(row, limit="compute", limit_share=0.5)
    row = dataclasses.replace(row, versus="octavo, blocks of 64", ratio=(0.9, 1.25, 99.75), busy_ratio=(1.0, 2.5, 3.0))
    console = Console(width=width, record=True, file=io.StringIO())
    common.print_rows(console, [record.rows[0], row])
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for cells in map(common._cells, (record.rows[0], row)):
        assert all(cell in text for cell in cells)
    for heading in ("TOP/s", "rel. error", *common.COMPARISON):
        assert text.count(heading) == 1
    assert text.count("contender") == text.count(row.method)  # every table names its rows
    assert (text.count("contender") == 1) == (width == 200)


def test_plot_of_nothing_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot.speed(common.Record("int8", {}), tmp_path)


@pytest.mark.parametrize(("family_name", "options"), [("int9", {}), ("int8", {"threads": 0})])
def test_bad_requests(family_name, options):
    with pytest.raises(ValueError, match=r"unknown family 'int9': int8|threads must be at least 1, got \[0\]"):
        octavo.bench.main(family_name, **options)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_peak_memory_sees_a_buffer_that_is_freed_again():
    def call():
        buffer = bytearray(64 << 20)
        del buffer
        return None

    assert memory.peak_extra_cpu(call) == pytest.approx(64 << 20, rel=0.1)


def test_sparse_rows_and_peers_that_compute_the_same():
    effort, limit = common.Effort(0.0, 0.0, 1, 1), limits_of(read=1e9)
    skipped: dict[str, str] = {}
    for m in (1, 5):
        rows = sparse.bench((m, 30, 200), 0.1, effort, limit, "cpu", skipped)
        names = {"octavo", "octavo, fp16 and uint16", "torch.sparse.mm", "scipy"}
        assert {row.method for row in rows} | set(skipped) == names
        assert all(row.error < (1e-3 if "fp16" in row.method else 1e-6) for row in rows)
        assert all((row.versus is None) == (row.method == "octavo") for row in rows)
    assert 0.05 < len(sparse.matrix(30, 200, 0.1)[0]) / 6000 < 0.15
