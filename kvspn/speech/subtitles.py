"""Segments as text, subtitles and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class Timed(Protocol):
    """A stretch of text from one second to another."""

    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def text(self) -> str: ...


def srt(segments: Sequence[Timed]) -> str:
    """SubRip."""
    return "\n".join(
        f"{i}\n{clock(each.start, ',')} --> {clock(each.end, ',')}\n{_line(each)}\n"
        for i, each in enumerate(segments, 1)
    )


def vtt(segments: Sequence[Timed]) -> str:
    """WebVTT, which ends a cue's times at "-->" and takes & and < for marks."""
    marks = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    cues = (
        f"{clock(each.start, '.')} --> {clock(each.end, '.')}\n{_line(each).translate(marks)}\n"
        for each in segments
    )
    return "\n".join(["WEBVTT\n", *cues])


def tsv(segments: Sequence[Timed]) -> str:
    """Start and end in whole milliseconds, and the text, parted by tabs."""
    rows = (f"{round(1000 * each.start)}\t{round(1000 * each.end)}\t{_line(each)}\n" for each in segments)
    return "".join(["start\tend\ttext\n", *rows])


def txt(segments: Sequence[Timed]) -> str:
    """A line a segment."""
    return "".join(f"{_line(each)}\n" for each in segments)


WRITERS: Mapping[str, Callable[[Sequence[Timed]], str]] = {
    "srt": srt,
    "vtt": vtt,
    "tsv": tsv,
    "txt": txt,
}


def clock(seconds: float, point: str) -> str:
    """3.5 -> "00:00:03.500"."""
    total = max(0, round(1000 * seconds))
    minutes, milliseconds = divmod(total, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02}:{minutes:02}:{whole:02}{point}{milliseconds:03}"


def _line(segment: Timed) -> str:
    """The text on one line: an empty one would end a subtitle, a tab a column."""
    return " ".join(segment.text.split())
