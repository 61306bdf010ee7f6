"""Segments as text, subtitles and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvspn.speech.segments import Segment


def srt(segments: Sequence[Segment]) -> str:
    """SubRip."""
    return "\n".join(
        f"{i}\n{clock(each.start, ',')} --> {clock(each.end, ',')}\n{_line(each)}\n"
        for i, each in enumerate(segments, 1)
    )


def vtt(segments: Sequence[Segment]) -> str:
    """WebVTT, which ends a cue's times at "-->" and takes & and < for marks."""
    marks = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    cues = (
        f"{clock(each.start, '.')} --> {clock(each.end, '.')}\n{_line(each).translate(marks)}\n"
        for each in segments
    )
    return "\n".join(["WEBVTT\n", *cues])


def tsv(segments: Sequence[Segment]) -> str:
    """Start and end in whole milliseconds, and the text, parted by tabs."""
    rows = (f"{round(1000 * each.start)}\t{round(1000 * each.end)}\t{_line(each)}\n" for each in segments)
    return "".join(["start\tend\ttext\n", *rows])


def txt(segments: Sequence[Segment]) -> str:
    """A line a segment."""
    return "".join(f"{_line(each)}\n" for each in segments)


WRITERS: Mapping[str, Callable[[Sequence[Segment]], str]] = {
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


def _line(segment: Segment) -> str:
    """The text on one line: an empty one would end a subtitle, a tab a column."""
    return " ".join(segment.text.split())
