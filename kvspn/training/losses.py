"""The losses of the recipe (arXiv 2508.11189, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvspn.training.data import IGNORE


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the labelled positions. logits [B, T, V], labels [B, T]."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, label_smoothing=smoothing
    )


def distillation(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher || student) over the labelled positions; no gradient flows to the teacher. Logits [B, T, V]."""
    kept = labels != IGNORE
    target = F.log_softmax(teacher.detach()[kept].float(), dim=-1)
    return F.kl_div(F.log_softmax(student[kept].float(), dim=-1), target, reduction="batchmean", log_target=True)


def ctc(states: Tensor, lengths: Tensor, labels: Tensor, head: torch.nn.Linear, blank: int) -> Tensor:
    """Connectionist temporal classification of the encoder's states, at half their rate.

    Teaches a small encoder trained from nothing where the words are, long before cross-attention finds out.
    states [B, E, d], lengths [B] (valid states), labels [B, T] (the text tokens only, else IGNORE).
    """
    pooled = F.avg_pool1d(states.transpose(1, 2), 2).transpose(1, 2)
    log_probs = F.log_softmax(head(pooled).float(), dim=-1).transpose(0, 1)
    targets = [row[row != IGNORE] for row in labels]
    return F.ctc_loss(
        log_probs,
        torch.cat(targets),
        (lengths // 2).clamp(1, pooled.shape[1]),
        torch.tensor([len(row) for row in targets]),
        blank=blank,
        zero_infinity=True,
    )


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the labelled positions whose most likely token is right."""
    kept = labels != IGNORE
    return (logits[kept].argmax(-1) == labels[kept]).float().mean()
