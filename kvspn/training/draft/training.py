"""A draft network for a Whisper, trained on what that Whisper itself says of speech without labels."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kvspn.atomic import atomic
from kvspn.decoding import DecodeStats
from kvspn.models import WhisperM2MForConditionalGeneration, WhisperM2MProcessor
from kvspn.models.configuration import WhisperM2MConfig
from kvspn.models.conversion import fitting_groups
from kvspn.models.draft_folder import fingerprint, save_draft
from kvspn.models.folder import open_whisper
from kvspn.models.kvspn_network import KVSPN
from kvspn.training.data import IGNORE, ClipDataset, pad
from kvspn.training.draft.outputs import SHARD, Output, Shards, Speaker, make_shard, shard_folders
from kvspn.training.draft.recipe import DraftRecipe
from kvspn.training.draft.windows import Clip, Load, plan_windows, split_clips
from kvspn.training.trainer import fit

Log = Callable[[str], object]


def train_draft(
    name: str | Path,
    clips: Sequence[Clip],
    load: Load,
    out: Path,
    cache: Path,
    recipe: DraftRecipe,
    log: Log = print,
) -> list[Judged]:
    """Trains a draft network for a Whisper and writes it to the folder `out`, for `open_model(draft=out)`.

    Run again after an interruption it goes on where it was. Under `accelerate launch` or `torchrun` several
    processes, with a GPU each, share the work.

    Args:
        name: as `kvspn.models.folder.open_whisper` takes it.
        clips, load: what there is to hear, and how to have the samples of a clip by its number.
        cache: the folder of encoder states, outputs and checkpoints, of one model and these clips.
        log: called with a line of progress.

    Returns: how well it guesses what is held out, by kind of output.

    Raises:
        ModelError: as `open_whisper`, or a whisperM2M, whose own recipe trains its draft network.
        ValueError: naming the argument: a cache of something else, clips that leave nothing to hold out.
    """
    process = PartialState(cpu=not torch.cuda.is_available())
    log = log if process.is_main_process else lambda line: None
    model, processor = open_whisper(name, torch.float32)
    model.to(process.device)
    training, held_out = _listen(model, processor, clips, load, cache, recipe, process, log)
    if not len(training) or not len(held_out):
        raise ValueError("audio must hold speech: of its windows none has a text that does not repeat itself")
    add_network(model, recipe, training.outputs)
    network = model.kvspn
    log(
        f"draft network: {sum(p.numel() for p in network.parameters()):,} parameters, "
        f"a vocabulary of {len(network.head_weight(model.proj_out.weight)):,} tokens, "
        f"with {_covered(network, held_out.outputs):.1%} of those held out"
    )
    learner = Learner(model, recipe.loss)
    collator, judges = (WindowCollator(each, recipe.targets, recipe.seed) for each in (training, held_out))
    numbers = range(len(held_out))
    fit(
        learner,
        cache / "checkpoints" / _network_name(model.config),
        ClipDataset([max(len(each.tokens) for each in said) for said in training.outputs]),
        collator,
        lambda learner, batch: learner(**batch),
        [
            judges([{"clip": clip} for clip in numbers[first : first + recipe.batch]])
            for first in range(0, len(numbers), recipe.batch)
        ],
        steps=recipe.steps,
        batch=recipe.batch,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        every=recipe.evaluate_every,
        sampling="random",
        told=_Told(log),
    )
    judged: list[Judged] = []
    if process.is_main_process:
        network.half().float().eval()  # as it is saved
        model.config.kvspn_draft_trained = True
        judged = judge(model, processor, held_out, recipe)
        heard = {"windows": len(training), "held_out_windows": len(held_out)}
        figures = [asdict(each) for each in judged]
        save_draft(model, out, {"recipe": asdict(recipe), **heard, "held_out": figures})
    process.wait_for_everyone()
    return judged


def _listen(
    model: WhisperM2MForConditionalGeneration,
    processor: WhisperM2MProcessor,
    clips: Sequence[Clip],
    load: Load,
    cache: Path,
    recipe: DraftRecipe,
    process: PartialState,
    log: Log,
) -> tuple[Shards, Shards]:
    """States and outputs of the windows for training, and of those held out."""
    seconds = processor.feature_extractor.chunk_length
    train, held_out = split_clips(clips, recipe.held_out, recipe.seed)
    planned = [plan_windows(clips, numbers, seconds, recipe) for numbers in (held_out, train)]
    _bind_cache(cache / "plan.json", model, clips, recipe, process)
    speaker = Speaker(model, processor, recipe)
    found = []
    for what, windows, most in zip(
        ("held-out", "train"), planned, (recipe.held_out_windows, recipe.windows), strict=True
    ):
        # Shards are whole, or a later run that wants more windows would meet half of one.
        count = len(windows) if most is None else min(len(windows), -(-most // SHARD) * SHARD)
        shards = list(shard_folders(cache / what, windows[:count]))
        log(f"{what}: {count} of {len(windows)} windows of {len(clips)} clips")
        for number, (folder, part) in enumerate(shards):
            if number % process.num_processes == process.process_index:
                made = not folder.exists()
                make_shard(folder, part, clips, load, speaker)
                if made:
                    log(f"{what}: heard {min(count, SHARD * (number + 1))} of {count} windows")
        process.wait_for_everyone()
        found.append(Shards([folder for folder, _ in shards]))
        if found[-1].left_out:
            log(
                f"{what}: {found[-1].left_out} windows are left out: unreadable, or their text repeats itself"
            )
    return found[1], found[0]


def _bind_cache(
    file: Path,
    model: WhisperM2MForConditionalGeneration,
    clips: Sequence[Clip],
    recipe: DraftRecipe,
    process: PartialState,
) -> None:
    """Raises ValueError where a cache holds what another model says, or what is said of other clips."""
    heard = hashlib.sha256(json.dumps([asdict(clip) for clip in clips]).encode()).hexdigest()
    wanted = {"model": fingerprint(model), "audio": heard}
    wanted |= {
        name: getattr(recipe, name)
        for name in ("seed", "joined", "held_out", "translate", "timestamps", "weights")
    }
    with process.main_process_first():
        if not file.exists():
            with atomic(file) as part:
                part.write_text(json.dumps(wanted, indent=1))
    known = json.loads(file.read_text())
    for name, value in wanted.items():
        if known.get(name) != value:
            raise ValueError(
                f"cache must be of the same {name}, got {file.parent}, which was made with another: "
                "give another folder"
            )


def add_network(
    model: WhisperM2MForConditionalGeneration, recipe: DraftRecipe, said: Sequence[Sequence[Output]]
) -> None:
    """Gives the model an untrained draft network, each block a copy of a layer of the base as far as it fits.

    Args:
        said: outputs, whose most frequent tokens are its draft vocabulary.
    """
    config = model.config
    groups = recipe.groups or fitting_groups(config.decoder_layers, recipe.blocks)
    wanted = recipe.draft_vocabulary
    vocabulary = None if wanted is None or wanted >= config.vocab_size else wanted
    chosen = {
        "kvspn_blocks": recipe.blocks or groups,
        "kvspn_groups": groups,
        "kvspn_ffn_dim": recipe.ffn_dim or config.decoder_ffn_dim,
        "kvspn_encoder_attention": recipe.encoder_attention,
        "kvspn_encoder_stride": recipe.encoder_stride,
        "kvspn_draft_vocab_size": vocabulary,
    }
    torch.manual_seed(recipe.seed)
    network = KVSPN(WhisperM2MConfig.from_dict(config.to_dict() | chosen))
    network.start_from(model.model.decoder)
    if vocabulary is not None:
        counts = Counter(token for window in said for output in window for token in output.tokens)
        counts[config.eos_token_id] += 1
        order = sorted(range(config.vocab_size), key=lambda token: (-counts[token], token))
        network.draft_ids.copy_(torch.tensor(sorted(order[:vocabulary])))
    for field, value in chosen.items():
        setattr(config, field, value)
    model.kvspn = network.to(model.device)
    model.requires_grad_(False)
    network.requires_grad_(True)


def _network_name(config: WhisperM2MConfig) -> str:
    """Networks whose checkpoints do not fit each other have other names."""
    return (
        f"blocks{config.kvspn_blocks}-groups{config.kvspn_groups}-ffn{config.kvspn_ffn_dim}"
        f"-stride{config.kvspn_encoder_stride if config.kvspn_encoder_attention else 0}"
        f"-vocabulary{config.kvspn_draft_vocab_size or config.vocab_size}"
    )


def _covered(network: KVSPN, said: Sequence[Sequence[Output]]) -> float:
    """Share of the tokens of outputs that the draft network can guess."""
    if network.draft_ids is None:
        return 1.0
    known = set(network.draft_ids.tolist())
    tokens = [token for window in said for output in window for token in output.tokens]
    return sum(token in known for token in tokens) / len(tokens)


class Learner(nn.Module):
    """The draft network beside its frozen base, whose weights are no part of a checkpoint."""

    def __init__(self, model: WhisperM2MForConditionalGeneration, loss: str):
        super().__init__()
        self.draft = model.kvspn
        self._base = [model]  # in a list, or it would be a part
        self._loss = loss
        suppressed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        suppressed[list(model.generation_config.suppress_tokens or ())] = True
        self._suppressed = suppressed.to(model.device)

    def forward(self, states: Tensor, decoder_input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses and figures of a batch.

        states float16 [B, E, d]; decoder_input_ids and labels int64 [B * n, T], IGNORE before the tokens that
        are guessed -> the loss by its name and "_agreement", the share of the tokens that are guessed; when
        judging also "_acceptance" and "_tokens_per_step", as decoding one guess a step would have them.
        """
        (model,), draft = self._base, self.draft
        assert draft is not None
        model.model.eval()  # no dropout in the frozen base
        base, hidden = model.draft_hidden(decoder_input_ids, states.to(model.dtype))
        kept = labels != IGNORE
        head = draft.head_weight(model.proj_out.weight)
        guesses = F.linear(hidden[kept], head).float()
        ids = torch.arange(len(head), device=head.device) if draft.draft_ids is None else draft.draft_ids
        if self._loss == "distillation":
            with torch.no_grad():
                target = F.log_softmax(F.linear(base[kept], head).float(), dim=-1)
            scores = F.log_softmax(guesses, dim=-1)
            loss = F.kl_div(scores, target, reduction="none", log_target=True).sum(-1).mean()
        else:
            places = torch.full((model.config.vocab_size,), IGNORE, device=ids.device)
            places[ids] = torch.arange(len(ids), device=ids.device)
            loss = F.cross_entropy(guesses, places[labels[kept]], ignore_index=IGNORE)
        allowed = guesses.detach().masked_fill(self._suppressed[ids], -torch.inf)
        right = torch.zeros_like(kept)
        right[kept] = ids[allowed.argmax(-1)] == labels[kept]
        figures = {self._loss: loss, "_agreement": right[kept].float().mean()}
        if not self.training:
            steps, accepted = simulate([row[k].tolist() for row, k in zip(right, kept, strict=True)])
            figures["_acceptance"] = torch.tensor(accepted / steps)
            figures["_tokens_per_step"] = kept.sum() / steps
        return figures


def simulate(rows: Sequence[Sequence[bool]]) -> tuple[int, int]:
    """Steps, and guesses accepted, where a step guesses one token and behind a right one knows another.

    rows: of each output, for each of its tokens, whether the guess of it would be right.
    """
    steps = accepted = 0
    for row in rows:
        place = 0
        while place < len(row):
            steps += 1
            accepted += row[place]
            place += 1 + row[place]
    return steps, accepted


@dataclass
class WindowCollator:
    """Windows -> encoder states, decoder input and labels of `targets` of the outputs of each.

    Which are drawn depends on the seed and the batch's windows alone, so that a run which goes on after an
    interruption gives what one without it gives.
    """

    shards: Shards
    targets: int
    seed: int

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns: what `Learner.forward` takes."""
        windows = [item["clip"] for item in items]
        rng = random.Random(f"{self.seed} {windows}")
        inputs, labels = [], []
        for window in windows:
            outputs = list(self.shards.outputs[window])
            rng.shuffle(outputs)
            for each in [outputs[i % len(outputs)] for i in range(self.targets)]:
                inputs.append([*each.prompt, *each.tokens[:-1]])
                labels.append([IGNORE] * (len(each.prompt) - 1) + each.tokens)
        return {
            "states": torch.from_numpy(np.stack([self.shards.states(window) for window in windows])),
            "decoder_input_ids": pad(inputs, 0),
            "labels": pad(labels, IGNORE),
        }


class _Told(TrainerCallback):
    """A line for what is logged."""

    def __init__(self, log: Log):
        self._log = log
        self._judged = 0  # step, for Trainer judges twice where an epoch ends

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        said = logs or {}
        where = f"step {state.global_step} of {state.max_steps}"
        if "eval_acceptance" in said and self._judged != state.global_step:
            self._judged = state.global_step
            self._log(
                f"{where}: held out {said['eval_acceptance']:.1%} accepted, "
                f"{said['eval_tokens_per_step']:.2f} tokens a step"
            )
        elif "agreement" in said:
            self._log(f"{where}: loss {said['loss']:.3f}, {said['agreement']:.1%} of the tokens guessed")


@dataclass(frozen=True)
class Judged:
    """How outputs of one kind were decoded with the draft network at k = 1.

    identical: the outputs that are those of plain decoding, of `outputs` in all. The other figures: as in
    `kvspn.decoding.DecodeStats`.
    """

    language: str
    task: str
    timed: bool
    outputs: int
    identical: int
    tokens: int
    steps: int
    drafted: int
    accepted: int

    @property
    def stats(self) -> DecodeStats:
        """The same counts, with their ratios."""
        return DecodeStats(self.tokens, self.steps, self.drafted, self.accepted, 0.0)


_COUNTS = ("outputs", "identical", "tokens", "steps", "drafted", "accepted")


def judge(
    model: WhisperM2MForConditionalGeneration,
    processor: WhisperM2MProcessor,
    held_out: Shards,
    recipe: DraftRecipe,
) -> list[Judged]:
    """Decodes what is held out once more, with the draft network."""
    speaker = Speaker(model, processor, recipe)
    counts: dict[tuple[str, str, bool], dict[str, int]] = defaultdict(lambda: dict.fromkeys(_COUNTS, 0))
    for window, outputs in enumerate(held_out.outputs):
        states = torch.from_numpy(held_out.states(window).copy()).to(model.device, model.dtype)
        plain = {(each.task, each.timed): each.tokens for each in outputs}
        for output, stats in speaker.say(states, outputs[0].language, draft=True):
            count = counts[output.language, output.task, output.timed]
            count["outputs"] += 1
            count["identical"] += output.tokens == plain.get((output.task, output.timed))
            for name in _COUNTS[2:]:
                count[name] += getattr(stats, name)
    return [Judged(*kind, *count.values()) for kind, count in sorted(counts.items())]
