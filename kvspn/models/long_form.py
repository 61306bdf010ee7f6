"""Speech that is longer than a window, as transformers' Whisper hears it: window after window."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from kvspn.decoding import DecodeStats
from kvspn.decoding.alignment import POSITION
from kvspn.models import prompts
from kvspn.models.segments import pairs

if TYPE_CHECKING:
    from kvspn.models.modeling import WhisperM2MForConditionalGeneration

_STRIDE = 2  # frames in an encoder position


def generate_long(
    model: WhisperM2MForConditionalGeneration,
    features: Tensor,
    attention_mask: Tensor | None,
    said: Mapping[str, Any],
    timed: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of a GenerateOutput, each row's by itself, from its windows' outputs one after the other.

    Whole segments stand, and the next window begins where the last of them ends; no window is told what the
    one before it has heard (`condition_on_prev_tokens` of transformers, false by default).

    Args:
        features: [B, mel bins, frames].
        attention_mask: [B, frames], 1 where there is sound; None everywhere.
        said: the settings of the call.
        timed: whether to tell when tokens are said.
        options: of `generate`, for every window.

    Raises:
        ValueError: naming what is set for each row apart.
    """
    if not isinstance(options["target_language"], str | None):
        raise ValueError(
            "target_language must be one for all rows where speech is longer than a window, got "
            f"{options['target_language']!r}"
        )
    batch, _, most = features.shape
    frames = [most] * batch if attention_mask is None else attention_mask.sum(-1).tolist()
    known = prompts.language_ids(said)
    languages = prompts.languages("language", said.get("language"), batch, known)
    window = _STRIDE * model.config.max_source_positions
    begin = said["no_timestamps_token_id"] + 1
    ends = said.get("eos_token_id", model.config.eos_token_id)
    ends = [ends] if isinstance(ends, int) else ends
    rows: dict[str, list[Any]] = defaultdict(list)
    likely: list[dict[str, float]] = []
    for row, last in enumerate(frames):
        language = None if languages is None else languages[row]
        segments: list[dict[str, Any]] = []
        stats: list[DecodeStats] = []
        seek = 0
        while seek < last:
            size = min(window, last - seek)
            part = F.pad(features[row, :, seek : seek + size], (0, window - size))
            mask = (torch.arange(window) < size)[None]
            made: Any = model.generate(
                input_features=part[None],
                attention_mask=mask,
                language=language,
                return_timestamps=True,
                return_token_timestamps=timed,
                return_segments=True,
                **options,
            )
            if language is None:
                language = made.languages[0]
                likely += made.language_probabilities or []
            stats += made.stats
            whole = made.sequences[0].tolist()
            tokens = whole[:-1] if whole and whole[-1] in ends else whole
            slices, forward = _stand(tokens, begin)
            offset = seek * POSITION / _STRIDE
            result = made.segments[0][0]["result"]
            prompt = len(result) - len(whole)
            for first, end in slices:
                piece = tokens[first:end]
                stamps = [token - begin for token in piece if token >= begin]
                opened = stamps[0] if len(slices) > 1 or forward is not None else 0
                closed = stamps[-1] if stamps and stamps[-1] else size / _STRIDE
                if forward is not None and end == slices[-1][1]:  # which holds the next one's start, too
                    closed = forward
                segment = {
                    "start": torch.tensor(offset + opened * POSITION),
                    "end": torch.tensor(offset + closed * POSITION),
                    "tokens": torch.tensor(piece, dtype=torch.int64),
                    "idxs": (prompt + first, prompt + end),
                    "result": result,
                }
                if timed:
                    segment["token_timestamps"] = made.token_timestamps[0, first:end] + offset
                segments.append(segment)
            seek += size if forward is None else max(1, forward * _STRIDE)
        for name in ("tokens", "token_timestamps") if timed else ("tokens",):
            parts = [each[name] for each in segments] or [torch.empty(0, dtype=torch.int64)]
            rows[name].append(torch.cat(parts))
        rows["languages"].append(language)
        rows["stats"].append(DecodeStats.total(stats, sum(each.seconds for each in stats)))
        rows["segments"].append(segments)
    stats = rows["stats"]
    times = rows.pop("token_timestamps", None)
    return {
        "sequences": rows.pop("tokens"),
        "token_timestamps": None
        if times is None
        else pad_sequence(times, batch_first=True).to(features.device),
        "total": DecodeStats.total(stats, sum(each.seconds for each in stats)),
        "language_probabilities": likely or None,
        **rows,
    }


def _stand(tokens: Sequence[int], begin: int) -> tuple[list[tuple[int, int]], int | None]:
    """The slices of a window's tokens that stand, and the position at which the next window begins.

    None is behind this one: there is no pair of timestamps, or a single one at the end, which says that
    nothing follows. Else what follows the last pair is heard again.
    """
    cuts = pairs(tokens, begin)
    single = len(tokens) > 1 and tokens[-1] >= begin > tokens[-2]
    if not cuts or single:
        return list(pairwise([0, *cuts, len(tokens)])), None
    return list(pairwise([0, *cuts[:-1], cuts[-1] + 1])), tokens[cuts[-1] - 1] - begin
