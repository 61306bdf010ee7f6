"""Whether training works out for a size of Whisper here: two steps on random weights and states, no data."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from kvspn.models import WhisperM2MForConditionalGeneration
from kvspn.models.configuration import WhisperM2MConfig
from kvspn.training.data import IGNORE
from kvspn.training.draft.recipe import DraftRecipe
from kvspn.training.draft.training import Learner, add_network
from kvspn.training.optimizer import MuonAdamW

_V3 = {"num_mel_bins": 128, "vocab_size": 51_866}
# width, layers of encoder and decoder, heads, and what else differs from the defaults
_SIZES: dict[str, tuple[int, int, int, int, dict[str, int]]] = {
    "tiny": (384, 4, 4, 6, {}),
    "base": (512, 6, 6, 8, {}),
    "small": (768, 12, 12, 12, {}),
    "medium": (1024, 24, 24, 16, {}),
    "large-v2": (1280, 32, 32, 20, {}),
    "large-v3": (1280, 32, 32, 20, _V3),
    "large-v3-turbo": (1280, 32, 4, 20, _V3),
}
_TOKENS = 224  # of an output: the most that a window's text takes
_STEPS = 2


@dataclass(frozen=True)
class Dry:
    """What two steps took.

    base, draft: parameters. saved, states: bytes of the draft network's file, and of a window's encoder
    states in the cache. peak: bytes of memory, on a GPU those of torch, else the process's. seconds: of the
    last step.
    """

    base: int
    draft: int
    saved: int
    states: int
    peak: int
    seconds: float


def dry_run(size: str, recipe: DraftRecipe) -> Dry:
    """Two steps of the recipe, at its batch, with outputs as long as they get.

    Args:
        size: "tiny", "base", "small", "medium", "large-v2", "large-v3" or "large-v3-turbo".

    Raises ValueError for another size.
    """
    if size not in _SIZES:
        raise ValueError(f"dry must be one of {', '.join(_SIZES)}, got {size!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _random(size, device)
    base = model.num_parameters()
    add_network(model, recipe, [])
    learner = Learner(model, recipe.loss).train()
    optimizer = MuonAdamW(learner.named_parameters(), recipe.learning_rate)
    config = model.config
    states = torch.randn(recipe.batch, config.max_source_positions, config.d_model).half().to(device)
    tokens = torch.randint(config.eos_token_id, (recipe.batch * recipe.targets, _TOKENS + 3)).to(device)
    labels = tokens.roll(-1, 1)
    labels[:, :3] = IGNORE
    for _ in range(_STEPS):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = learner(states, tokens, labels)[recipe.loss]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(loss):  # also waits for the GPU
            raise ArithmeticError(f"the loss must be finite, got {loss.item()}")
        seconds = time.perf_counter() - start
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draft = sum(each.numel() for each in learner.parameters())
    ids = 0 if learner.draft is None or learner.draft.draft_ids is None else 8 * len(learner.draft.draft_ids)
    return Dry(base, draft, 2 * draft + ids, 2 * states[0].numel(), peak, seconds)


def _random(size: str, device: torch.device) -> WhisperM2MForConditionalGeneration:
    """A Whisper of a size with random weights, made in place."""
    width, above, below, heads, rest = _SIZES[size]
    config = WhisperM2MConfig(
        d_model=width,
        encoder_layers=above,
        decoder_layers=below,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        text_encoder_layers=0,
        kvspn_blocks=0,
        target_languages=[],
        **rest,
    )
    with torch.device("meta"):
        model = WhisperM2MForConditionalGeneration(config)
    model.to_empty(device=device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02)
    model.tie_weights()
    model.generation_config = GenerationConfig()
    return model.eval()
