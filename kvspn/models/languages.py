"""Which language is spoken: the model's own probabilities after the start token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kvspn.engines import Engine


def likely_languages(
    engine: Engine, states: Sequence[Tensor] | None, start: int, language_ids: Mapping[str, int]
) -> list[dict[str, float]]:
    """Of each row every language's probability behind the start token alone, the likeliest first.

    From one pass of the engine, which has the states then, and that token's keys and values: see
    `Engine.start`.

    Args:
        states: the rows' encoder states [E, d]; None: those that the engine has.
        language_ids: the languages' tokens, by their codes.

    Returns: probabilities among these, their sum 1.
    """
    rows = len(engine.tokens)
    engine.start(states, [[start, start]] * rows, eos=-1, max_length=2, logits_at=[0] * rows)
    found = engine.logits[:, list(language_ids.values())].softmax(-1)
    rows_of = (
        sorted(zip(row, language_ids, strict=True), key=lambda each: -each[0]) for row in found.tolist()
    )
    return [{code: probability for probability, code in row} for row in rows_of]
