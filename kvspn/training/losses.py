"""The losses of the recipe (arXiv 2508.11189, section 2.1)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kvspn.training.data import IGNORE


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the labelled positions. logits [B, T, V], labels [B, T]."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, label_smoothing=smoothing
    )


def distillation(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher || student) over the labelled positions, no gradient to the teacher. Logits [B, T, V]."""
    kept = labels != IGNORE
    target = F.log_softmax(teacher.detach()[kept].float(), dim=-1)
    return F.kl_div(
        F.log_softmax(student[kept].float(), dim=-1), target, reduction="batchmean", log_target=True
    )


def ctc(logits: Tensor, lengths: Tensor, characters: Tensor) -> Tensor:
    """Connectionist temporal classification of the encoder's states into characters; class 0 is the blank.

    Teaches a small encoder trained from nothing where the sounds are, long before cross-attention finds out.
    logits [B, E, characters], lengths [B] (states without padding), characters [B, T] (IGNORE is padding).
    """
    kept = characters != IGNORE
    log_probs = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)
    return F.ctc_loss(log_probs, characters[kept], lengths, kept.sum(1), blank=0, zero_infinity=True)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the labelled positions whose most likely token is right."""
    kept = labels != IGNORE
    return (logits[kept].argmax(-1) == labels[kept]).float().mean()
