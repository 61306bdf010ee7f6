"""Self-contained HTML pages of measurements: tables, and plots as inline SVG. No scripts."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from kvspn.profiling import speedup

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise ValueError("--html needs matplotlib: pip install 'kvspn[report]'") from error

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
svg { max-width: 100%; height: auto; }
"""
_ACCEPTANCES = (0.25, 0.5, 0.75, 1.0)


def profile_plots(document: dict[str, Any]) -> dict[str, str]:
    """From the JSON of `kvspn profile`, an <svg> each of "steps", "attention", "speedup" and "memory"."""
    points = document["points"]
    lengths = [point["length"] for point in points]

    def plot(label: str, curves: dict[str, list[float]], logarithmic: bool = True) -> str:
        with matplotlib.rc_context({"svg.hashsalt": "kvspn", "svg.fonttype": "none"}):
            figure = Figure(figsize=(8, 4), layout="constrained")
            axes = figure.subplots()
            for name, values in curves.items():
                axes.plot(lengths, values, marker="o", label=name)
            axes.set_xscale("log", base=2)
            if logarithmic:
                axes.set_yscale("log")
            axes.set_xlabel("T, positions in the cache")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            axes.legend()
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :]

    def of_group(key: str, name: str, factor: float = 1) -> list[float]:
        return [point[key][name] * factor for point in points]

    names = list(points[0]["attention"])
    megabytes = {"cache of all layers": [point["kv_bytes"] / 1e6 for point in points]}
    for name in ("flattened", "strided", "last layer"):
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
    cost = _table(
        ("T", "step, ms", "KVSPN, ms", "breaks even at", "KV, MB", *(f"{name}, ms" for name in variants)),
        (
            (
                f"{point['length']:,}",
                f"{point['step']:.2f}",
                f"{point['kvspn_step']:.2f}",
                f"{point['overhead']:.0%}",
                f"{point['kv_bytes'] / 1e6:.1f}",
                *(f"{point['attention'][name]:.3f}" for name in variants),
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
        plots["steps"],
        cost,
        "<h2>One group's attention, one query</h2>",
        plots["attention"],
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
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: object) -> str:
    return html.escape(str(value))


def _page(title: str, *parts: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{_text(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
