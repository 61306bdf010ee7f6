"""docs/performance.md and its plots, from the records under bench/results: python -m bench.performance"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"

_PAGE = """\
# Performance

Made by `python -m bench.performance` from the records under [bench/results](../bench/results); every table
names its own. How the figures are taken, and what their fields mean, is in [benchmark.md](benchmark.md).

## The decoder step on a CPU

[step-cpu.json](../bench/results/step-cpu.json), by
`kvspn bench --peers --weights {formats} --kv int8 --json ...`:
{machine}. Batch 1, {kv_length} positions in the self-attention cache, 1,500 of the encoder, random weights.
"Of peak" is a bare read of as many bytes in the same rounds over the step. The machine is shared and its
bandwidth swings, so that ratios within a run say more than milliseconds.

{steps}

Against the fastest peer of the same weight width in the same run:

{peers}

### The kernels for AVX2

[step-cpu-avx2.json](../bench/results/step-cpu-avx2.json), by `{avx2_command} ...`, on the same machine
({avx2_machine}):

{avx2}

### How far from the limit, and why

{limit}

### A cheaper draft network

[step-cpu-cheap-draft.json](../bench/results/step-cpu-cheap-draft.json), by `{cheap_command} ...`
({cheap_machine}):
the draft network in int4, with a short list of {vocabulary:,} of the 51,865 tokens
(`kvspn_draft_vocab_size`) and attention to every {stride} encoder's positions (`kvspn_encoder_stride`).
What KVSPN adds to a plain step (c), so and as above; the tokens a step that the miniature reaches with
that stride, in that format; and a token against the fastest peer of the same weight width in that run.
What the short list costs in acceptance is not in it: the miniature has no 51,865 tokens to choose from.

{cheap}

### Single ops

[ops-cpu.json](../bench/results/ops-cpu.json), by
`{ops_command} ...`
({ops_machine}): each op of `torch.ops.kvspn` by itself, on matrices and caches as they lie.
"Of peak" is a bare read of as many bytes over the op, a small one out of the processor's caches. What an op
takes beside memory, such as putting torch's threads to work, shows in the short ones:

{ops}

## The speech encoder on a CPU

[encoder-cpu.json](../bench/results/encoder-cpu.json), by `{encoder_command} ...`: a window of 30 s,
{encoder_gflop} GFLOP, on {encoder_machine} ({encoder_set} kernels), round after round beside torch's encoder,
whose matrices are oneDNN's. Other programs kept both cores busy: the processor's own time is what a window
takes, the elapsed time what it took beside them. Ratios are medians of those within a round. The error is
that of the states, beside torch in fp32.

{encoder}

On one thread oneDNN's kernels in bf16 take longer than these by a third. Both are far from what AMX
tiles can do (some 2,000 GFLOP/s a core in bf16, in a loop of products alone): softmax, GELU and what
feeds the tiles bound them. On two threads and busy cores torch gives each thread half of every matrix,
and the first waits for the other at each, spinning; here a block of 64 rows is taken by whichever
thread is there, through all matrices between two attentions, and two threads take no more processor
time than one. For that, and for attention whose scores stay in the cache, the kernels are kvspn's own.

## Batches

The same {batch_rows} clips in batches of every size, plain and with drafts in turn, {batch_rounds} rounds,
k = 1, one thread; times are the processor's in the steps, since other programs ran beside them. Whisper base
with a draft network trained on {batch_draft_windows} windows
([batches-whisper-base.json](../bench/results/batches-whisper-base.json), by
`{batches_command} ...`, clips of Common Voice), and the
miniature ([batches-miniature.json](../bench/results/batches-miniature.json)):

{batches}

Each row accepts and rolls back on its own, and says what it says alone, to the last token: acceptance and
tokens a step are those of batch 1 at every size. A batch is done when its last row is, and its passes fall by
what that row accepts. Time falls on this processor at a single row alone, where a step waits for weights, and
with an acceptance like the miniature's. More rows keep a core multiplying: there a draft costs what a row of
its own does, and is not worth it.

## The miniature

[miniature.json](../bench/results/miniature.json), by `kvspn evaluate --k 1,2,3,inf --json ...`:

{miniature}

Weight formats, caches and other draft networks on the same base, each on the unseen sentences at k = 1 and
recorded beside it as miniature-....json (`kvspn evaluate --set unseen --k 1`, with `--weights`, `--kv` or
`--model`), on one day, when an output's first token was not drafted yet: fp32 as shipped had 89.3% and 1.74
then.

{variants}

## Long sequences

[profile-cpu.json](../bench/results/profile-cpu.json), by `kvspn profile --json ...`: {profile}.
A KVSPN step pays off as soon as its acceptance is above the share at which it breaks even.

{long}

![A step at growing lengths](plots/steps.svg)

One group's attention (4 layers, one query), in ms: flattened as kvspn reads it, where it lies; the keys
concatenated first and given to torch's `scaled_dot_product_attention`; layer by layer, merged; and cheaper
reads at the price of acceptance: the last layer alone; int8, with a scale for each head and position; the
newest 64 positions and every fourth of the older ones, or the means of four of them ("pooled").

{accepted}

{attention}

![One group's attention](plots/attention.svg)

Speed-up over plain decoding, (1 + acceptance) / (1 + overhead), from the measured steps, and the same by real
steps:

![Speed-up](plots/speedup.svg)

{checks}

![Memory](plots/memory.svg)
"""

_LIMIT = """\
A step cannot be faster than one read of its weights and caches. At one row, what is above that is spent in
the {regions} barriers of a step and in the ramps behind them, where a thread has little to read ahead. A
second row shares the read and costs {two_rows} more. KVSPN's own share is its weights, its output embedding
and a second read of one layer's cross-attention cache for each block{int4}."""
_INT4 = """\
; with the draft network in int4 it falls
from {same} to {int4} of a step ({format}, whole vocabulary)"""

_RATIOS = {
    "over_fastest_peer": "times as fast",
    "over_transformers_fp32": "over transformers, fp32",
    "over_whisper_medium_fp32": "over Whisper Medium, fp32",
}


RECORDS = {  # and what makes each
    "step-cpu": "kvspn bench --peers --weights fp32,bf16,int8,bf16/int4,int8/int4,int4 --kv int8 --json",
    "profile-cpu": "kvspn profile --json",
    "miniature": "kvspn evaluate --k 1,2,3,inf --json",
    "step-cpu-cheap-draft": "kvspn bench --peers --shape whisperM2M --weights bf16/int4,int8/int4,int4"
    " --kv int8 --draft-vocabulary 12288 --encoder-stride 4 --json",
    "step-cpu-avx2": "KVSPN_CPU=avx2 kvspn bench --shape whisperM2M --weights bf16,int8,int4 --json",
    "encoder-cpu": "python -m bench.encoder --model FOLDER --json",
    "batches-whisper-base": "python -m bench.batches --model whisper-base --draft FOLDER --clips clips.jsonl"
    " --split eval --weights int8/int4 --encoder-format int8 --json",
    "batches-miniature": "python -m bench.batches --json",
    "ops-cpu": "kvspn bench --ops --backend native --shape whisperM2M --weights bf16,int8,int4 --json",
}


def _record(name: str) -> dict[str, Any]:
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        raise FileNotFoundError(f"no record {file.name} in {RESULTS}: {RECORDS[name]} {file.name} makes it")
    record: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return record


def _encoder(rows: Iterable[dict[str, Any]]) -> str:
    return table(
        (
            "encoder",
            "threads",
            "ms",
            "processor ms",
            "GFLOP a processor s",
            "over torch fp32",
            "by processor time",
            "error",
        ),
        (
            (
                row["encoder"],
                str(row["threads"]),
                f"{row['ms']:.0f}",
                f"{row['cpu_ms']:.0f}",
                f"{row['gflop_per_cpu_s']:.0f}",
                f"{row['over_torch_fp32']:.2f} ×",
                f"{row['over_torch_fp32_cpu']:.2f} ×",
                f"{row['relative_error']:.1e}" if row["relative_error"] else "–",
            )
            for row in rows
        ),
    )


def _batches(records: Iterable[dict[str, Any]]) -> str:
    return table(
        (
            "model",
            "batch",
            "acceptance",
            "tokens a row and step",
            "passes, plain → drafted",
            "fewer passes",
            "processor ms a token",
            "times as fast",
        ),
        (
            (
                record["model"],
                str(row["batch"]),
                f"{row['acceptance']:.1%}",
                f"{row['tokens_per_row_and_step']:.2f}",
                "{} → {}".format(*row["passes"]),
                f"{row['fewer_passes']:.2f} ×",
                "{:.2f} → {:.2f}".format(*row["cpu_ms_a_token"]),
                "{:.2f} ({:.2f} to {:.2f})".format(
                    row["times_as_fast_cpu"], *row["times_as_fast_cpu_spread"]
                ),
            )
            for record in records
            for row in record["rows"]
        ),
    )


def performance() -> str:
    """The page.

    Raises:
        FileNotFoundError: a record is missing. KeyError: one is of an older version.
    """
    bench, profile, miniature, cheap, avx2, encoder, batches, mini_batches, ops = map(_record, RECORDS)
    rows = _of_batch_1(bench)
    summary = bench["summary"]
    formats = list(dict.fromkeys(row["weights"] for row in rows if row["backend"] == "native"))
    return _PAGE.format(
        encoder_gflop=encoder["gflop"],
        encoder_machine=encoder["machine"]["device"],
        encoder_set=next(row["instruction_set"] for row in encoder["rows"] if row["instruction_set"]),
        encoder=_encoder(encoder["rows"]),
        encoder_command=RECORDS["encoder-cpu"],
        batch_rows=batches["rows"][0]["rows"],
        batch_rounds=batches["rounds"],
        batch_draft_windows=batches["draft_windows"],
        batches_command=RECORDS["batches-whisper-base"],
        batches=_batches((batches, mini_batches)),
        formats=",".join(formats),
        machine=_machine(bench["machine"]),
        kv_length=rows[0]["kv_length"],
        steps=_steps(rows),
        peers=table(
            (
                "kvspn",
                "what",
                "fastest peer",
                "times as fast",
                "over transformers, fp32",
                "over Whisper Medium",
            ),
            (
                (
                    key,
                    what.replace("_", " "),
                    ratios.get("fastest_peer", "–"),
                    *(f"{ratios[name]:.2f}" if name in ratios else "–" for name in _RATIOS),
                )
                for key, compared in summary["speedup"].items()
                if not key.startswith("miniature")
                for what, ratios in compared.items()
            ),
        ),
        avx2_command=RECORDS["step-cpu-avx2"],
        avx2_machine=_machine(avx2["machine"]),
        avx2=_steps(_of_batch_1(avx2)),
        limit=_limit(summary),
        cheap_command=RECORDS["step-cpu-cheap-draft"],
        cheap_machine=_machine(cheap["machine"]),
        vocabulary=cheap["draft"]["vocabulary"],
        stride=f"{cheap['draft']['encoder_stride']}th of the",
        cheap=table(
            ("", "a second row", "c", "c as above", "tokens per step", "a token, times as fast as"),
            (
                (
                    key,
                    f"{cheap['summary']['two_row_cost'][key] - 1:.1%}",
                    f"{overhead:.1%}",
                    f"{summary['draft_overhead'][key]:.1%}" if key in summary["draft_overhead"] else "–",
                    f"{cheap['summary']['tokens_per_step'][key]:.2f}",
                    "{over_fastest_peer:.2f} {fastest_peer}".format(
                        **cheap["summary"]["speedup"][key]["token"]
                    ),
                )
                for key, overhead in cheap["summary"]["draft_overhead"].items()
            ),
        ),
        ops_command=RECORDS["ops-cpu"],
        ops_machine=_machine(ops["machine"]),
        ops=_ops(ops["ops"]),
        miniature=_miniature(miniature["rows"]),
        variants=_variants(),
        profile=f"{profile['shape']}, {profile['weights']}, {_machine(profile['machine'] | profile)}",
        long=table(
            ("T", "step, ms", "KVSPN step, ms", "breaks even at", "KV, MB"),
            (
                (
                    f"{point['length']:,}",
                    f"{point['step']:.2f}",
                    f"{point['kvspn_step']:.2f}",
                    f"{point['overhead']:.0%}",
                    f"{point['kv_bytes'] / 1e6:.1f}",
                )
                for point in profile["points"]
            ),
        ),
        accepted=_accepted(profile["acceptance"]),
        attention=table(
            ("T", *profile["points"][0]["attention"]),
            (
                (f"{point['length']:,}", *(f"{value:.3f}" for value in point["attention"].values()))
                for point in profile["points"]
            ),
        ),
        checks=table(
            ("T", "k", "acceptance", "predicted", "measured"),
            (
                (
                    f"{check['length']:,}",
                    check["k"],
                    f"{check['acceptance']:.0%}",
                    f"{check['predicted']:.2f} ×",
                    f"{check['measured']:.2f} ×",
                )
                for check in profile["checks"]
            ),
        ),
    )


def _of_batch_1(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """The large shape's rows of batch 1 at the first length."""
    rows = [row for row in bench["rows"] if row["shape"] != "miniature" and row["batch"] == 1]
    return [row for row in rows if row["kv_length"] == rows[0]["kv_length"]]


def _steps(rows: Iterable[dict[str, Any]]) -> str:
    return table(
        ("", "weights", "what", "ms", "min", "GB/s", "of peak", "correct"),
        (
            (
                row["backend"],
                row["weights"] + (f", {row['kv']} KV" if row["kv"] else ""),
                f"{row['what']}, {row['rows']} rows" if row["rows"] > 1 else row["what"],
                f"{row['ms_median']:.2f}",
                f"{row['ms_min']:.2f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['percent_of_measured_peak']:.0f}%",
                "yes" if row["correct"] else "no",
            )
            for row in rows
        ),
    )


def _ops(rows: Iterable[dict[str, Any]]) -> str:
    return table(
        ("op", "weights", "query rows", "ms", "GB/s", "of peak", "correct"),
        (
            (
                row["what"].replace("/", ", "),
                row["weights"],
                str(row["rows"]),
                f"{row['ms_median']:.3f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['percent_of_measured_peak']:.0f}%",
                "yes" if row["correct"] else "no",
            )
            for row in rows
            if row["backend"] == "native"
        ),
    )


def _limit(summary: dict[str, Any]) -> str:
    costs = {
        name: value for name, value in summary["two_row_cost"].items() if not name.startswith("miniature")
    }
    overhead = summary["draft_overhead"]
    name = next((key for key in overhead if key.endswith("/int4") and key.count("/") == 3), None)
    int4 = ""
    if name is not None and (base := name.rpartition("/")[0]) in overhead:
        int4 = _INT4.format(
            same=f"{overhead[base]:.0%}", int4=f"{overhead[name]:.0%}", format=base.rpartition("/")[2]
        )
    return _LIMIT.format(
        regions=12 * 8,
        two_rows=" to ".join(f"{value - 1:.0%}" for value in (min(costs.values()), max(costs.values()))),
        int4=int4,
    )


def _miniature(rows: Iterable[dict[str, Any]]) -> str:
    return table(
        ("set", "k", "BLEU", "BLEU, transcription", "acceptance", "tokens per step", "identical to greedy"),
        (
            (
                row["set"],
                str(row["k"]),
                f"{row['bleu']:.1f}",
                f"{row['bleu_transcription']:.1f}",
                f"{row['acceptance']:.1%}",
                f"{row['tokens_per_step']:.2f}",
                f"{row['identical_to_greedy']:.1%}",
            )
            for row in rows
        ),
    )


def _variants() -> str:
    records = sorted(RESULTS.glob("miniature-*.json"))
    return table(
        ("variant", "BLEU", "acceptance", "tokens per step", "outputs as in fp32"),
        (
            (
                name,
                f"{row['bleu']:.1f}",
                f"{row['acceptance']:.1%}",
                f"{row['tokens_per_step']:.2f}",
                "–" if row["identical_to_full"] is None else f"{row['identical_to_full']:.1%}",
            )
            for name, row in (
                (file.stem.partition("-")[2], json.loads(file.read_text("utf-8"))["rows"][0])
                for file in records
            )
        ),
    )


def _accepted(acceptance: dict[str, float | None]) -> str:
    """What each way to read does to the miniature's drafts."""
    return "Drafts accepted on the miniature at k = 1: " + "; ".join(
        f"{name} {'not measured' if value is None else f'{value:.1%}'}" for name, value in acceptance.items()
    )


def _machine(machine: dict[str, Any]) -> str:
    cpu = machine["cpu"] if "model" in machine["cpu"] else machine["machine"]["cpu"]
    kernels = f", {cpu['instruction_set']} kernels" if cpu.get("instruction_set") else ""
    return (
        f"{cpu['model']}, {cpu['threads']} threads{kernels}, {machine['read_gb_per_s']} GB/s read, torch "
        f"{machine['versions']['torch']}, {machine['date'][:10]}"
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plots() -> dict[str, str]:
    """The svg of each plot."""
    from kvspn.measure.report import profile_plots

    return profile_plots(_record("profile-cpu"))


def main() -> None:
    """Writes the page and its plots, or nothing."""
    try:
        page, drawn = performance(), plots()
    except FileNotFoundError as error:
        sys.exit(str(error))
    except KeyError as error:
        sys.exit(f"a record under {RESULTS} is of an older version: it has no {error}; make it again")
    (DOCS / "plots").mkdir(parents=True, exist_ok=True)
    (DOCS / "performance.md").write_text(page, "utf-8")
    for plot, text in drawn.items():
        (DOCS / "plots" / f"{plot}.svg").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
