"""What a step of csrc/cuda should take on a GPU, before anything is measured: the table of docs/cuda.md.

    python -m bench.cuda_model [--length 448]

Two things take time. Memory works through the bytes of stage after stage, and is asked for those of a stage
when the stage before the last has ended. And each stage is a chain of waits that nothing shortens: the
barrier, trips to the L2 cache, sums that a warp makes step by step. A stage ends when both have.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.performance import table
from kvspn.measure.shapes import SHAPES, Shape

# Of an H100, in microseconds unless a name says otherwise: published figures and the SASS, until a record
# corrects them (bench/stages.py measures the stages). Within a third; good for ranking.
COPY_BYTES = 3.0e6  # a microsecond, of memory
L2_BYTES = 5.5e6  # a microsecond, from the L2 cache
MULTIPROCESSORS = 132
LATENCIES = {
    "HBM": 0.60,  # a trip to memory
    "L2": 0.16,  # a trip to the L2 cache: 270 cycles
    "barrier": 0.80,  # of the grid: what was written must be there, an atomic, and the others must see it
    "block": 0.03,  # a barrier of a block
    "norm": 0.45,  # mean, then variance: sums of a lane and of the warp, a square root, a division
    "turn": 0.16,  # of a warp's weights, 2 KB: a chain of multiply-adds
    "tree": 0.09,  # of shuffles, one sum of a warp
    "split": 0.75,  # of attention: where it is, scores, their largest, weights, sums
    "arrival": 0.40,  # of a split: what was written must be there, and an atomic
    "piece": 0.30,  # of a combination: the largest score, weights, sums
}
AHEAD = 2 * 8 * 2048  # bytes of weights that a multiprocessor's eight warps have under way
WARPS = 8 * MULTIPROCESSORS
SPLIT, PIECE = 32, 24  # positions of a split in 16 bits, splits that the last warp combines at once


@dataclass(frozen=True)
class Stage:
    """What it reads of memory, and what happens one after the other in it.

    chain: names of LATENCIES. behind: bytes that a multiprocessor must read after those under way at first.
    """

    name: str
    bytes: int
    chain: tuple[str, ...]
    behind: float = 0.0

    @property
    def chain_us(self) -> float:
        """From the barrier on."""
        return sum(LATENCIES[each] for each in self.chain) + self.behind * MULTIPROCESSORS / L2_BYTES


def linear(name: str, outputs: int, inputs: int, norm: bool) -> Stage:
    """fp16 weights: a row of activations, the LayerNorm, the weights' last turn, the sum."""
    size = 2 * outputs * inputs
    chain = ["L2", "block", *(["norm", "block", "block"] if norm else []), "turn", "tree"]
    return Stage(name, size, ("barrier", *chain), max(0, size / MULTIPROCESSORS - AHEAD))


def attend(name: str, layers: int, positions: int, heads: int, width: int) -> Stage:
    """fp16 keys and values, one row: a warp a split, and the last of a head combines."""
    splits = layers * -(-positions // SPLIT)
    rounds, pieces = -(-splits * heads // WARPS), -(-splits // PIECE)
    chain = ("barrier", *("L2", "split", "arrival") * rounds, *("L2", "piece") * pieces, "tree")
    return Stage(name, 2 * 2 * layers * positions * width, chain)


def base_stages(shape: Shape) -> Iterator[Stage]:
    """Of the base model's half of a step, in order."""
    d, heads = shape.width, shape.heads
    yield Stage("embed", 4 * d, ("barrier", "L2", "HBM"))
    for _ in range(shape.layers):
        yield linear("LayerNorm + q, k, v + append", 3 * d, d, True)
        yield attend(f"self-attention, T = {shape.length}", 1, shape.length, heads, d)
        yield linear("output + residual", d, d, False)
        yield linear("LayerNorm + cross q", d, d, True)
        yield attend(f"cross-attention, {shape.encoder_positions:,}", 1, shape.encoder_positions, heads, d)
        yield linear("cross output + residual", d, d, False)
        yield linear("LayerNorm + fc1 + GELU", shape.ffn, d, True)
        yield linear("fc2 + residual", d, shape.ffn, False)
    yield linear("verify", shape.vocabulary, d, True)
    yield Stage("accept", 0, ("barrier", "L2", "L2", "HBM"))


def draft_stages(shape: Shape) -> Iterator[Stage]:
    """Of the draft network's half."""
    d, heads, group = shape.width, shape.heads, shape.layers // shape.groups
    positions = -(-shape.encoder_positions // shape.encoder_stride)
    yield Stage("draft: embed", 4 * d, ("barrier", "L2", "HBM"))
    for _ in range(shape.groups):
        yield linear("draft: LayerNorm + q", d, d, True)
        yield attend(f"draft: its group's cache, {group} x {shape.length}", group, shape.length, heads, d)
        yield linear("draft: output + residual", d, d, False)
        yield linear("draft: LayerNorm + cross q", d, d, True)
        yield attend(f"draft: cross-attention, {positions:,}", 1, positions, heads, d)
        yield linear("draft: cross output + residual", d, d, False)
        yield linear("draft: LayerNorm + fc1 + GELU", shape.ffn, d, True)
        yield linear("draft: fc2 + residual", d, shape.ffn, False)
    yield linear("draft: verify", shape.short_list or shape.vocabulary, d, True)


def ends(stages: list[Stage]) -> list[float]:
    """When each ends, in microseconds; memory has nothing under way when the first begins."""
    memory, found = 0.0, [0.0, 0.0]  # two stages that end as the step begins
    for stage in stages:
        memory = max(memory, found[-2] + LATENCIES["HBM"]) + stage.bytes / COPY_BYTES
        last = LATENCIES["turn"] + LATENCIES["tree"]  # what remains when the last bytes have come
        found.append(max(found[-1] + stage.chain_us, memory + last))
    return found[2:]


def rows(stages: list[Stage]) -> list[tuple[str, ...]]:
    """The table's, one for each name."""
    times: dict[str, list[float]] = {}
    before = 0.0
    for stage, end in zip(stages, ends(stages), strict=True):
        times.setdefault(stage.name, []).append(end - before)
        before = end
    found = []
    for name, spent in times.items():
        stage = next(each for each in stages if each.name == name)
        found.append(
            (
                *(name, f"{stage.bytes / 1e6:.2f}", f"{stage.bytes / COPY_BYTES:.2f}"),
                *(str(stage.chain.count("L2")), f"{stage.chain_us:.2f}"),
                *(f"{sum(spent) / len(spent):.2f}", str(len(spent)), f"{sum(spent):.1f}"),
            )
        )
    return found


def total(stages: list[Stage]) -> str:
    """One line of the sum."""
    size, microseconds = sum(stage.bytes for stage in stages), ends(stages)[-1]
    chains = sum(stage.chain_us for stage in stages)
    reached = size / COPY_BYTES / microseconds
    return (
        f"{len(stages)} stages, {size / 1e6:.0f} MB: {size / COPY_BYTES:.0f} µs of memory, {chains:.0f} µs "
        f"of chains, together {microseconds:.0f} µs: {reached:.0%} of a copy's bandwidth."
    )


def page(shape: Shape) -> str:
    """Table and sums, as docs/cuda.md has them."""
    base = list(base_stages(shape))
    both = [*draft_stages(shape), *base]
    heads = ("stage", "MB", "memory, µs", "L2 trips", "chain, µs", "a stage, µs", "times", "a step, µs")
    return "\n\n".join(
        (
            table(heads, rows(base)),
            f"Base model: {total(base)}",
            f"With the draft network: {total(both)}",
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=448, help="T, positions in the self-attention cache")
    arguments = parser.parse_args()
    print(page(replace(SHAPES["whisperM2M"], length=arguments.length)))
