"""Your own kernel in kvspn's benchmark, beside the package's: python examples/own_kernel.py

Here the kernel is torch's scaled_dot_product_attention in the place of flat_kv_attention. Any other callable
with the op's signature does: a Triton or CUDA kernel (device="cuda" below), a compiled function.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from kvspn.measure import ops
from kvspn.measure.intervals import ratio
from kvspn.measure.shapes import SHAPES


def flat_kv_attention(
    q: Tensor,
    kv: Tensor,
    lengths: Tensor,
    causal: bool,
    scale: float | None = None,
    tail: Tensor | None = None,
    tail_lengths: Tensor | None = None,
) -> Tensor:
    """The contract is the docstring of kvspn.ops.flat_kv_attention; a tail the benchmark does not ask for."""
    queries, capacity = q.shape[2], kv.shape[4]
    # [n, 2, B, H, S, D] -> keys and values [B, H, n * S, D]: the copy that the package's kernels save.
    keys, values = kv.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
    later = torch.arange(1, queries + 1, device=q.device) * causal  # a query sees its own position too
    end = lengths[:, None] + later  # [B, Q]
    seen = torch.arange(capacity, device=q.device) < end[..., None]  # [B, Q, S]
    mask = seen.repeat(1, 1, len(kv))[:, None]
    return F.scaled_dot_product_attention(q, keys, values, mask, scale=scale).transpose(1, 2).flatten(2)


def main() -> None:
    parser = argparse.ArgumentParser(description="One op by several implementations.")
    parser.add_argument("--shape", default="miniature", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--html", type=Path, help="write a page with the roofline here (needs matplotlib)")
    options = parser.parse_args()

    # Every implementation of the op is timed in turn, round after round, and checked against float64.
    found = ops.run(
        {"sdpa": SimpleNamespace(flat_kv_attention=flat_kv_attention)},
        ops=["flat_kv_attention"],
        shapes={options.shape: SHAPES[options.shape]},
        formats=["fp32", "bf16"],
        rounds=options.rounds,
        device="cpu",
    )

    for row in found["ops"]:
        print(
            f"{row.what:30} {row.backend:9} {row.weights}  {row.ms_median:8.4f} ms  "
            f"{row.flops / row.bytes:4.1f} FLOP/byte  {row.percent_of_measured_peak:4.0f}% of a bare read  "
            f"{row.percent_of_measured_compute:4.0f}% of a product  {'correct' if row.correct else 'WRONG'}"
        )

    # Beside each of the package's own: times as long, with a 95% confidence interval.
    own = {(row.what, row.weights): row for row in found["ops"] if row.backend == "sdpa"}
    for row in found["ops"]:
        if row.backend != "sdpa":
            over = ratio(row.ms, own[row.what, row.weights].ms)
            print(
                f"{row.what}, {row.weights}: sdpa takes {over.estimate:.2f} times as long as {row.backend} "
                f"[{over.low:.2f}, {over.high:.2f}]"
            )

    if options.html:
        from kvspn.measure import report

        document = {**found, "ops": [asdict(row) for row in found["ops"]]}
        options.html.write_text(report.bench_page(document), "utf-8")


if __name__ == "__main__":
    main()
