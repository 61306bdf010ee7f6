"""`kvspn plan`: the stages of a step, what each must read, and how fast it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvspn.cli.common import KV, check_backend, model_folder, open_decoder, print_json, print_table


def plan(
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="SHAPE",
            help="whisperM2M, miniature, or your own as in kvspn bench.",
            show_default="whisperM2M",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            callback=model_folder,
            help="A model as in kvspn translate, in place of a shape.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option("--weights", metavar="FORMAT", help="As in kvspn translate; the cache follows.")
    ] = "bf16",
    kv: KV = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            metavar="T",
            help="Positions in the cache.",
            show_default="the shape's own; a tenth of the model's",
        ),
    ] = None,
    draft: Annotated[
        bool | None,
        typer.Option(
            "--draft/--no-draft",
            help="A KVSPN step, or a plain one.",
            show_default="what the model can do",
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option("--backend", metavar="NAME", help="Whose plan: native or cuda.")
    ] = "native",
    bandwidth: Annotated[
        float | None,
        typer.Option(
            "--bandwidth",
            metavar="GB/s",
            help="Of the memory that a stage reads from.",
            show_default="the best of five bare reads",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the stages of a decoder step of one row: what they must read, and the least time that it takes.

    Nothing runs. A stage is what the threads, or the blocks of a GPU, do between two barriers; those of one
    name are shown together.
    """
    from kvspn.measure import plan as of
    from kvspn.measure.shapes import device_of, find_shapes
    from kvspn.measure.timing import read_gb_per_s
    from kvspn.weights.formats import base_and_draft, quantise

    if bandwidth is not None and not 0 < bandwidth < float("inf"):
        raise typer.BadParameter(f"--bandwidth must be above 0; got {bandwidth}")
    if model is not None and shape is not None:
        raise typer.BadParameter(f"--shape is the model's own beside --model; got {shape}")
    if backend not in of.BACKENDS:
        raise typer.BadParameter(
            f"--backend must be {' or '.join(of.BACKENDS)}, whose step is a plan; got {backend}"
        )
    check_backend(backend)
    base_and_draft(weights)
    with Console(stderr=True).status("making the weights"):
        if model is not None:
            name = model.resolve().name
            decoder, positions = open_decoder(model)
            usual = max(decoder.positions // 10, 1)
        else:
            chosen = find_shapes(shape or "whisperM2M")
            if len(chosen) > 1:
                raise typer.BadParameter(f"--shape must be one shape; got {shape!r}")
            ((name, sizes),) = chosen.items()
            decoder, positions = sizes.weights(), sizes.encoder_positions
            usual = sizes.length
        length = usual if length is None else length
        if draft and not decoder.blocks:
            raise typer.BadParameter(f"--draft must be for a model with a draft network; got {name}")
        drafting = bool(decoder.blocks) if draft is None else draft
        stages = of.plan(
            quantise(decoder, weights),
            length=length,
            encoder_positions=positions,
            draft=drafting,
            backend=backend,
            kv=kv,
        )
    # The best of some: a read that something else disturbed is no floor.
    rate = bandwidth or max(read_gb_per_s(device_of(backend)) for _ in range(5))
    total = of.Stage(
        sum(stage.times for stage in stages.values()), sum(each.bytes for each in stages.values())
    )

    def figures(stage: of.Stage) -> dict[str, Any]:
        share, floor = stage.bytes / total.bytes, stage.bytes / rate / 1e3
        return {**stage._asdict(), "share": round(share, 6), "floor_us": round(floor, 3)}

    rows = {stage: figures(each) for stage, each in stages.items()}
    if as_json:
        document = {
            "shape": name,
            "weights": weights,
            "kv": kv,
            "backend": backend,
            "length": length,
            "encoder_positions": positions,
            "draft": drafting,
            "gb_per_s": round(rate, 1),
            "gb_per_s_measured": bandwidth is None,
            "stages": [{"name": stage, **each} for stage, each in rows.items()],
            "total": figures(total),
        }
        print_json(document)
        return
    typer.echo(
        f"{name}, {'KVSPN' if drafting else 'plain'} step on {backend}: {weights} weights, "
        f"{f'{kv} KV, ' if kv else ''}T = {length}, {positions:,} encoder positions"
    )
    print_table(
        ("stage", "times", "MB", "of all bytes", "at least, µs"),
        [
            (
                stage,
                str(each["times"]),
                *(
                    (f"{each['bytes'] / 1e6:.2f}", f"{each['share']:.1%}", f"{each['floor_us']:.1f}")
                    if each["bytes"]
                    else ("–", "–", "–")
                ),
            )
            for stage, each in {**rows, "total": figures(total)}.items()
        ],
    )
    typer.echo(f"At {rate:.1f} GB/s, {'the best of five bare reads' if bandwidth is None else 'as given'}.")
