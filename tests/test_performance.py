"""docs/performance.md says what the records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import performance

MISSING = [name for name in performance.RECORDS if not (performance.RESULTS / f"{name}.json").is_file()]


@pytest.mark.skipif(bool(MISSING), reason=f"not under bench/results: {', '.join(MISSING)}")
def test_the_page_is_made_of_the_records() -> None:
    page = performance.DOCS / "performance.md"
    assert page.read_text("utf-8") == performance.performance(), "python -m bench.performance makes it again"
    if pytest.importorskip("matplotlib"):
        plots = set(performance.plots())
        assert plots == {file.stem for file in (performance.DOCS / "plots").glob("*.svg")}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of our own."""
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(performance, "RESULTS", results)
    monkeypatch.setattr(performance, "DOCS", tmp_path / "docs")
    machine = {
        "cpu": {"model": "A processor", "threads": 2},
        "read_gb_per_s": 50.0,
        "versions": {"torch": "2.13.0"},
        "date": "2026-11-21T00:00:00",
    }
    row = {
        "what": "step",
        "shape": "whisperM2M",
        "backend": "native",
        "weights": "int8",
        "kv": None,
        "batch": 1,
        "rows": 2,
        "kv_length": 64,
        "ms_median": 6.543,
        "ms_min": 6.0,
        "gb_per_s": 48.7,
        "percent_of_measured_peak": 90.0,
        "correct": True,
    }
    summary = {
        "two_row_cost": {"whisperM2M/native/int8": 1.083},
        "draft_overhead": {"whisperM2M/native/int8": 0.4},
        "speedup": {
            "whisperM2M/native/int8": {"step_2": {"fastest_peer": "openvino", "over_fastest_peer": 1.5}}
        },
    }
    rows = [row, {**row, "kv": "int8"}, {**row, "batch": 4, "ms_median": 77.7}]
    point = {
        "length": 64,
        "step": 10.0,
        "kvspn_step": 12.0,
        "overhead": 0.2,
        "attention": {"flattened": 0.5, "int8": 0.3, "strided": 0.1, "last layer": 0.2},
        "attention_bytes": {"flattened": 8, "int8": 4, "strided": 2, "last layer": 2},
        "kv_bytes": 3_000_000,
    }
    check = {"length": 64, "k": "1", "acceptance": 0.5, "predicted": 1.25, "measured": 1.21}
    profile = {
        "shape": "whisperM2M",
        "weights": "bf16",
        "points": [point],
        "checks": [check],
        "machine": machine,
        "acceptance": {"flattened": 0.5, "strided": None},
    }
    cheap = {
        "two_row_cost": {"whisperM2M/native/int8": 1.074},
        "draft_overhead": {"whisperM2M/native/int8": 0.213},
        "tokens_per_step": {"whisperM2M/native/int8": 1.731},
        "speedup": {
            "whisperM2M/native/int8": {"token": {"fastest_peer": "openvino", "over_fastest_peer": 2.345}}
        },
    }
    figures = {"set": "unseen", "k": 1, "bleu": 33.3, "bleu_transcription": 44.4, "acceptance": 0.5}
    for name, record in {
        "step-cpu": {"machine": machine, "rows": rows, "summary": summary},
        "profile-cpu": {**profile, "read_gb_per_s": 51.0},
        "miniature": {"rows": [{**figures, "tokens_per_step": 1.5, "identical_to_greedy": 1.0}]},
        "miniature-int8": {"rows": [{**figures, "tokens_per_step": 1.4, "identical_to_full": 0.9}]},
        "step-cpu-avx2": {
            "machine": {**machine, "cpu": {**machine["cpu"], "instruction_set": "avx2"}},
            "rows": [{**row, "ms_median": 8.765}],
        },
        "ops-cpu": {"machine": machine, "ops": [{**row, "what": "fused_linear/fc1", "ms_median": 0.1234}]},
        "encoder-cpu": {
            "machine": {"device": "A processor"},
            "gflop": 87.4,
            "rows": [
                {
                    "encoder": "native int8",
                    "instruction_set": "amx",
                    "threads": 2,
                    "ms": 123.4,
                    "cpu_ms": 234.5,
                    "gflop_per_cpu_s": 345.6,
                    "over_torch_fp32": 4.567,
                    "over_torch_fp32_cpu": 5.678,
                    "relative_error": 0.037,
                }
            ],
        },
        **{
            f"batches-{model}": {
                "model": model,
                "rounds": 3,
                "draft_windows": 160,
                "rows": [
                    {
                        "batch": 4,
                        "rows": 32,
                        "acceptance": 0.523,
                        "tokens_per_row_and_step": 1.517,
                        "passes": [300, 200],
                        "fewer_passes": 1.5,
                        "cpu_ms_a_token": [2.345, 1.234],
                        "times_as_fast_cpu": 1.9,
                        "times_as_fast_cpu_spread": [1.8, 2.0],
                    }
                ],
            }
            for model in ("whisper-base", "miniature")
        },
        "step-cpu-cheap-draft": {
            "machine": machine,
            "summary": cheap,
            "draft": {"vocabulary": 9000, "encoder_stride": 4},
        },
    }.items():
        (results / f"{name}.json").write_text(json.dumps(record), "utf-8")
    return tmp_path


def test_written(folders: Path) -> None:
    pytest.importorskip("matplotlib")
    performance.main()
    page = (folders / "docs/performance.md").read_text("utf-8")
    assert "| native | int8 | step, 2 rows | 6.54 | 6.00 | 48.7 | 90% | yes |" in page
    assert "| whisperM2M/native/int8 | step 2 | openvino | 1.50 | – | – |" in page
    assert "costs 8% to 8% more" in page and "int4 it falls" not in page  # there is no such row
    assert "| native | int8 | step, 2 rows | 8.77 |" in page and "2 threads, avx2 kernels, 50.0 GB/s" in page
    assert "| native | int8, int8 KV | step, 2 rows | 6.54 |" in page
    assert "| fused_linear, fc1 | int8 | 2 | 0.123 | 48.7 | 90% | yes |" in page
    assert "77.7" not in page  # the tables are of batch 1
    assert "| 64 | 10.00 | 12.00 | 20% | 3.0 |" in page and "33.3" in page
    assert "| int8 | 33.3 | 50.0% | 1.40 | 90.0% |" in page
    assert "flattened 50.0%; strided not measured" in page
    assert "list of 9,000 of" in page
    assert "| whisperM2M/native/int8 | 7.4% | 21.3% | 40.0% | 1.73 | 2.35 openvino |" in page
    assert "| native int8 | 2 | 123 | 234 | 346 | 4.57 × | 5.68 × | 3.7e-02 |" in page
    batches = "| 4 | 52.3% | 1.52 | 300 → 200 | 1.50 × | 2.35 → 1.23 | 1.90 (1.80 to 2.00) |"
    assert f"| whisper-base {batches}" in page and f"| miniature {batches}" in page
    assert {file.stem for file in (folders / "docs/plots").iterdir()} == set(performance.plots())


def test_a_missing_record_is_named_and_nothing_is_written(folders: Path) -> None:
    (folders / "results/profile-cpu.json").unlink()
    with pytest.raises(SystemExit, match=r"no record profile-cpu.json .*: kvspn profile --json"):
        performance.main()
    assert not (folders / "docs").exists()


def test_an_old_record_is_told(folders: Path) -> None:
    file = folders / "results/step-cpu.json"
    record = json.loads(file.read_text("utf-8"))
    del record["summary"]
    file.write_text(json.dumps(record), "utf-8")
    with pytest.raises(SystemExit, match="older version: it has no 'summary'"):
        performance.main()
