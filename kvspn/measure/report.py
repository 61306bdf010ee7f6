"""Self-contained HTML pages of measurements: tables, and plots as inline SVG. No scripts."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from kvspn.measure.profile import speedup
from kvspn.measure.timing import NOTES

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ValueError("--html and --png need matplotlib: pip install matplotlib") from error

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .2rem .4rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: white; }
svg { max-width: 100%; height: auto; }
"""
_ACCEPTANCES = (0.25, 0.5, 0.75, 1.0)
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _figure(height: float = 4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "kvspn", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def bench_png(document: dict[str, Any]) -> bytes:
    """The roofline plots of `kvspn bench`, one above the other, from its JSON document."""
    groups = _rooflines(document)
    figure = Figure(figsize=(8, 5 * len(groups)), layout="constrained")
    for axes, (title, rows) in zip(
        figure.subplots(len(groups), squeeze=False)[:, 0], groups.items(), strict=True
    ):
        _roofline(axes, title, rows, document["machine"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def bench_plots(document: dict[str, Any]) -> dict[str, str]:
    """From the JSON of `kvspn bench`, an <svg> each.

    By name: "roofline: ..." of the steps and of the ops of each shape and device; "milliseconds: ..." of
    the steps of each shape at one batch and length; "batch: ..." and "length: ..." where there are several.
    """
    plots = {}
    for title, rows in _rooflines(document).items():
        figure, axes = _figure(5)
        _roofline(axes, title, rows, document["machine"])
        plots[f"roofline: {title}"] = _svg(figure)
    steps = [row for row in document.get("rows", ()) if row["what"] in ("step", "kvspn_step")]
    for title, rows in _grouped(steps, ("shape", "batch", "kv_length")).items():
        plots[f"milliseconds: {title}"] = _milliseconds(rows)
    for along, fixed in (("batch", "kv_length"), ("kv_length", "batch")):
        for title, rows in _grouped(steps, ("shape", fixed)).items():
            if len({row[along] for row in rows}) > 1:
                plots[f"{along}: {title}"] = _along(along, rows)
    return plots


_CASE = ("backend", "weights", "kv", "what", "rows")


def _grouped(rows: Iterable[dict[str, Any]], fields: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_named(row, fields), []).append(row)
    return groups


def _named(row: dict[str, Any], fields: Sequence[str]) -> str:
    forms = {"batch": "batch {}", "kv_length": "T = {}", "kv": "{} KV", "rows": "rows: {}"}
    return ", ".join(forms.get(name, "{}").format(row[name]) for name in fields if row[name] is not None)


def _rooflines(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What is timed itself and computes, of each shape and device: steps, then ops."""
    found = {}
    for what in ("rows", "ops"):
        rows = [
            row for row in document.get(what, ()) if row["flops"] and row["what"] not in ("draft", "token")
        ]
        for title, group in _grouped(rows, ("shape", "device")).items():
            found[f"{title}, {'ops' if '/' in group[0]['what'] else 'steps'}"] = group
    return found


def _roofline(axes: Axes, title: str, rows: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """GFLOP/s over FLOP per byte, under the measured bandwidth and matrix products of the device."""
    measured = machine["devices"][rows[0]["device"]]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    for fmt, peak in measured["product_gflop_per_s"].items():
        ridge = peak / measured["read_gb_per_s"]
        span = [min(intensities) / 2, ridge, max(*intensities, ridge) * 2]
        roof = [min(peak, each * measured["read_gb_per_s"]) for each in span]
        axes.plot(
            span,
            roof,
            linewidth=1,
            label=f"measured: {measured['read_gb_per_s']} GB/s, {fmt} {peak:,.0f} GFLOP/s",
        )
    for name, group in _grouped(rows, ("backend", "weights", "kv")).items():
        x = [row["flops"] / row["bytes"] for row in group]
        axes.plot(x, [row["gflop_per_s"] for row in group], "o", markersize=4, label=name)
        for row in group:
            axes.annotate(
                _dot(row),
                (row["flops"] / row["bytes"], row["gflop_per_s"]),
                xytext=(3, 2),
                textcoords="offset points",
                fontsize=5,
            )
    reads = [row["flops"] / median(row["read_ms"]) / 1e6 for row in rows]
    axes.plot(intensities, reads, "_", color="0.4", label="a bare read of as many bytes")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(title)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))


def _dot(row: dict[str, Any]) -> str:
    """What a dot of the roofline is: "qkv" of "fused_linear/qkv"; "step, 2 rows", "kvspn_step"."""
    op, _, use = row["what"].rpartition("/")
    if op:
        return f"{op}/{use}" if row["rows"] == 1 else f"{op}/{use}, {row['rows']} rows"
    return f"step, {row['rows']} row{'s' * (row['rows'] > 1)}" if use == "step" else use


def _milliseconds(rows: list[dict[str, Any]]) -> str:
    """Medians, and lines from the fastest to the slowest round."""
    rows = sorted(rows, key=lambda row: row["ms_median"], reverse=True)
    figure, axes = _figure(1 + 0.22 * len(rows))
    for y, row in enumerate(rows):
        axes.plot([row["ms_min"], row["ms_max"]], [y, y], color="0.6", linewidth=1)
    axes.plot([row["ms_median"] for row in rows], range(len(rows)), "o", markersize=4)
    names = [_named(row, _CASE) for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize="x-small")
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds")
    return _svg(figure)


def _along(field: str, rows: list[dict[str, Any]]) -> str:
    figure, axes = _figure()
    for name, group in _grouped(rows, _CASE).items():
        points = sorted((row[field], row["ms_median"]) for row in group)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel({"batch": "batch", "kv_length": "T, positions in the cache"}[field])
    axes.set_ylabel("milliseconds")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def bench_page(document: dict[str, Any]) -> str:
    """The page of `kvspn bench`, from its JSON document."""
    machine = document["machine"]
    plots = "".join(f"<h3>{_text(name)}</h3>{plot}" for name, plot in bench_plots(document).items())
    devices = _table(
        ("device", "", "bare read, GB/s", "torch's matrix product, GFLOP/s"),
        (
            (
                device,
                measured["name"],
                str(measured["read_gb_per_s"]),
                ", ".join(f"{fmt} {peak:,.0f}" for fmt, peak in measured["product_gflop_per_s"].items()),
            )
            for device, measured in machine["devices"].items()
        ),
    )
    parts = [
        f"<p>torch {_text(machine['versions']['torch'])}, kvspn {_text(machine['versions']['kvspn'])}, "
        f"{machine['cpu']['threads']} threads; {_text(machine['date'])}.</p>",
        devices,
        *_notes(document, [*document.get("rows", ()), *document.get("ops", ())]),
        plots,
    ]
    for heading, rows in (("Steps", document.get("rows")), ("Ops", document.get("ops"))):
        if rows:
            parts += [f"<h2>{heading}</h2>", _rows_table(rows)]
    return _page("kvspn bench", *parts)


_COLUMNS: dict[str, tuple[str, str]] = {  # a row's field: heading and format
    "what": ("what", "{}"),
    "shape": ("shape", "{}"),
    "backend": ("backend", "{}"),
    "weights": ("weights", "{}"),
    "kv": ("KV", "{}"),
    "cache": ("cache", "{}"),
    "batch": ("batch", "{}"),
    "rows": ("rows", "{}"),
    "kv_length": ("T", "{}"),
    "ms_median": ("ms", "{:.4g}"),
    "ms_interval": ("95%", "{0[0]:.4g}–{0[1]:.4g}"),
    "ms_min": ("min", "{:.4g}"),
    "ms_max": ("max", "{:.4g}"),
    "gb_per_s": ("GB/s", "{:.1f}"),
    "percent_of_measured_peak": ("of the read", "{:.1f}%"),
    "peak_interval": ("95%", "{0[0]:.0f}–{0[1]:.0f}%"),
    "gflop_per_s": ("GFLOP/s", "{:.4g}"),
    "percent_of_measured_compute": ("of the product", "{:.2f}%"),
    "launches": ("launches", "{}"),
    "host_synchronisations": ("syncs", "{}"),
    "correct": ("correct", "{}"),
    "tokens_per_step": ("tokens a step", "{:.2f}"),
    "tokens_per_step_of": ("whose", "{}"),
    "notes": ("notes", "{}"),
}


def _rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """Without the columns that are empty, as those of another device's figures or of an older record."""

    def cell(name: str, row: dict[str, Any]) -> str:
        value = row.get(name)
        if isinstance(value, bool):
            return "yes" if value else "NO"
        if name == "notes":
            return ", ".join(value or ())
        if name.startswith("ms_") and "no interval" in (row.get("notes") or ()):
            return "–"  # a difference that may be nothing is no figure
        return "–" if value is None else _COLUMNS[name][1].format(value)

    shown = [name for name in _COLUMNS if any(row.get(name) not in (None, (), []) for row in rows)]
    return _table(
        [_COLUMNS[name][0] for name in shown], ([cell(name, row) for name in shown] for row in rows)
    )


def _notes(document: dict[str, Any], rows: Iterable[dict[str, Any]]) -> list[str]:
    """Paragraphs: the record's warnings, and what the notes of some rows mean."""
    said = [f"<p><strong>{_text(warning)}</strong></p>" for warning in document.get("warnings", ())]
    noted = dict.fromkeys(note for row in rows for note in row.get("notes") or ())
    return said + [f"<p>{_text(note)}: {_text(NOTES[note])}.</p>" for note in noted]


def profile_plots(document: dict[str, Any]) -> dict[str, str]:
    """From the JSON of `kvspn profile`, an <svg> each of "steps", "attention", "speedup" and "memory"."""
    points = document["points"]
    lengths = [point["length"] for point in points]

    def plot(label: str, curves: dict[str, list[float]], logarithmic: bool = True) -> str:
        figure, axes = _figure()
        for name, values in curves.items():
            axes.plot(lengths, values, marker="o", label=name)
        axes.set_xscale("log", base=2)
        if logarithmic:
            axes.set_yscale("log")
        axes.set_xlabel("T, positions in the cache")
        axes.set_ylabel(label)
        axes.legend()
        return _svg(figure)

    def of_group(key: str, name: str, factor: float = 1) -> list[float]:
        return [point[key][name] * factor for point in points]

    names = list(points[0]["attention"])
    megabytes = {"cache of all layers": [point["kv_bytes"] / 1e6 for point in points]}
    for name in ("flattened", "int8", "strided", "last layer"):
        megabytes[f"read for one group: {name}"] = of_group("attention_bytes", name, 1e-6)
    return {
        "steps": plot(
            "milliseconds",
            {
                "plain step": [point["step"] for point in points],
                "KVSPN step": [point["kvspn_step"] for point in points],
            },
        ),
        "attention": plot("milliseconds", {name: of_group("attention", name) for name in names}),
        "speedup": plot(
            "speed-up over plain decoding",
            {
                f"acceptance {acceptance:.0%}": [speedup(point["overhead"], acceptance) for point in points]
                for acceptance in _ACCEPTANCES
            },
            logarithmic=False,
        ),
        "memory": plot("megabytes", megabytes),
    }


def profile_page(document: dict[str, Any]) -> str:
    """The page of `kvspn profile`, from its JSON document."""
    points, machine = document["points"], document["machine"]
    variants = list(points[0]["attention"])
    plots = profile_plots(document)

    def spread(point: dict[str, Any], name: str, digits: int = 2) -> str:
        found = point.get("intervals", {}).get(name)
        return "" if found is None else f" [{found[0]:.{digits}f}, {found[1]:.{digits}f}]"

    stages = _table(
        ("stage", "of the step", "times", "ms, 95%", "MB", "of a bare read"),
        (
            (
                stage["name"],
                stage["step"],
                str(stage["count"]),
                f"{stage['ms']:.3f}{spread({'intervals': {'ms': stage['interval']}}, 'ms', 3)}",
                f"{stage['bytes'] / 1e6:.2f}",
                "–" if stage["percent_of_read"] is None else f"{stage['percent_of_read']:.0f}%",
            )
            for stage in document.get("stages", ())
        ),
    )
    cost = _table(
        ("T", "step, ms", "KVSPN, ms", "breaks even at", "KV, MB", *(f"{name}, ms" for name in variants)),
        (
            (
                f"{point['length']:,}",
                f"{point['step']:.2f}{spread(point, 'step')}",
                f"{point['kvspn_step']:.2f}{spread(point, 'kvspn_step')}",
                f"{point['overhead']:.0%}{spread(point, 'overhead')}",
                f"{point['kv_bytes'] / 1e6:.1f}",
                *(f"{point['attention'][name]:.3f}{spread(point, name, 3)}" for name in variants),
            )
            for point in points
        ),
    )
    checks = _table(
        ("T", "k", "acceptance", "predicted", "measured"),
        (
            (
                f"{check['length']:,}",
                check["k"],
                f"{check['acceptance']:.0%}",
                f"{check['predicted']:.2f} ×",
                f"{check['measured']:.2f} ×",
            )
            for check in document["checks"]
        ),
    )
    return _page(
        "kvspn profile: what long sequences cost in KV",
        f"<p>{_text(', '.join(document[key] for key in ('shape', 'weights', 'backend')))}, batch 1. "
        f"{_text(machine['cpu']['model'])}, {document['read_gb_per_s']} GB/s; {_text(machine['date'])}.</p>",
        "<h2>A step</h2>",
        *_notes(document, ()),
        plots["steps"],
        cost,
        f"<h2>Its stages at T = {points[0]['length']}, all layers together</h2>",
        stages,
        "<h2>One group's attention, one query</h2>",
        plots["attention"],
        "<p>What each variant does to the acceptance of drafts, on the miniature at k = 1:</p>",
        _table(
            list(document["acceptance"]),
            [["not measured" if each is None else f"{each:.1%}" for each in document["acceptance"].values()]],
        ),
        "<h2>Speed-up</h2><p>(1 + acceptance) / (1 + overhead), from the measured steps.</p>",
        plots["speedup"],
        "<p>Checked by real steps; the weights being random, so is the acceptance at k = 1.</p>",
        checks,
        "<h2>Memory</h2>",
        plots["memory"],
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _page(title: str, *parts: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{_text(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
