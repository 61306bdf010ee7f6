"""The page, the picture and the plots of `kvspn bench`: complete, equal to the record, from nowhere else."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from support.pages import Page, assert_shown
from support.rows import STEP

report = pytest.importorskip(
    "kvspn.measure.report", exc_type=ValueError, reason="matplotlib is not installed"
)


@pytest.fixture
def document() -> dict:
    steps = [
        replace(STEP, batch=batch, weights=weights, ms_median=2.0 * batch + len(weights))
        for batch in (1, 4)
        for weights in ("fp32", "int8/int4")
    ]
    steps.append(replace(STEP, what="draft", ms_median=-0.1, ms_min=-1.0, ms=[-1.0, -0.1, 2.0]))
    attention = replace(STEP, what="flat_kv_attention/self", backend="<mine>", correct=False)
    ops = [attention, replace(STEP, what="append_kv/new", flops=0, gflop_per_s=0.0)]
    machine = {
        "read_gb_per_s": 4.0,
        "cpu": {"model": "A & B", "cores": 2, "threads": 2},
        "versions": {"torch": "2.13.0", "kvspn": "0.1"},
        "date": "2026-11-21T00:00:00+00:00",
        "devices": {
            "cpu": {"name": "A & B", "read_gb_per_s": 4.0, "product_gflop_per_s": {"fp32": 9.5, "bf16": 40.0}}
        },
    }
    summary = {"two_row_cost": {}, "draft_overhead": {}, "tokens_per_step": {}, "speedup": {}}
    return {
        "machine": machine,
        "rows": [asdict(row) for row in steps],
        "summary": summary,
        "ops": [asdict(row) for row in ops],
    }


def test_plots(document: dict) -> None:
    plots = report.bench_plots(document)
    assert list(plots) == [
        "roofline: tiny, cpu, steps",
        "roofline: tiny, cpu, ops",
        "milliseconds: tiny, batch 1, T = 64",
        "milliseconds: tiny, batch 4, T = 64",
        "batch: tiny, T = 64",
    ]
    roofline = plots["roofline: tiny, cpu, ops"]
    assert "fp32 10 GFLOP/s" in roofline and "4.0 GB/s" in roofline and "&lt;mine&gt;, fp32" in roofline
    steps = plots["roofline: tiny, cpu, steps"]
    assert ">step, 1 row<" in steps  # each dot has its name
    assert ">flat_kv_attention/self<" in roofline
    # Each row is a point; the op that computes nothing has no place there.
    assert plots["roofline: tiny, cpu, steps"].count("<use") > roofline.count("<use")
    assert plots == report.bench_plots(document)  # the same bytes from the same record


def test_page(document: dict, tmp_path: Path) -> None:
    file = tmp_path / "bench.html"
    file.write_text(report.bench_page(document), "utf-8")
    page = Page(file)
    assert page.plots == 5
    devices, steps, ops = page.tables
    assert devices[1] == ["cpu", "A & B", "4.0", "fp32 10, bf16 40"]
    for table, rows in ((steps, document["rows"]), (ops, document["ops"])):
        assert len(table) == len(rows) + 1
        for cells, row in zip(table[1:], rows, strict=True):
            shown = dict(zip(table[0], cells, strict=True))
            assert (shown["what"], shown["backend"]) == (row["what"], row["backend"])
            for heading, name in (
                ("batch", "batch"),
                ("T", "kv_length"),
                ("ms", "ms_median"),
                ("max", "ms_max"),
            ):
                assert float(shown[heading]) == row[name]
            assert shown["of the read"] == f"{row['percent_of_measured_peak']}%"
            assert shown["correct"] == ("yes" if row["correct"] else "NO")
            assert shown["launches"] == "1" and "syncs" not in shown  # no row has any


def test_page_in_a_browser(document: dict, tmp_path: Path) -> None:
    file = tmp_path / "bench.html"
    file.write_text(report.bench_page(document), "utf-8")
    assert_shown(file, 5, ["kvspn bench", "int8/int4", "flat_kv_attention/self"])


def test_png(document: dict) -> None:
    assert report.bench_png(document).startswith(b"\x89PNG\r\n")
