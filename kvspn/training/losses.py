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


def distillation(student: Tensor, teacher: Tensor, labels: Tensor, trust: bool = False) -> Tensor:
    """Mean KL(teacher || student) over the labelled positions, the teacher detached. Logits [B, T, V].

    `trust`: weigh each position by the probability that the teacher gives the label, so that a teacher
    that is still learning, as the text encoder is at first, leads only where it is right (the paper is
    silent).
    """
    kept = labels != IGNORE
    target = F.log_softmax(teacher.detach()[kept].float(), dim=-1)
    scores = F.log_softmax(student[kept].float(), dim=-1)
    divergence = F.kl_div(scores, target, reduction="none", log_target=True).sum(-1)
    if trust:
        divergence = divergence * target.gather(1, labels[kept][:, None])[:, 0].exp()
    return divergence.mean()


def ctc(logits: Tensor, lengths: Tensor, symbols: Tensor, blank: int = 0) -> Tensor:
    """Connectionist temporal classification of the encoder's states; `blank` is the class of no symbol.

    Teaches a small encoder trained from nothing where the sounds are, long before cross-attention finds out.
    logits [B, E, classes], lengths [B] (states without padding), symbols [B, T] (IGNORE is padding).
    """
    kept = symbols != IGNORE
    log_probs = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)
    return F.ctc_loss(log_probs, symbols[kept], lengths, kept.sum(1), blank=blank, zero_infinity=True)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the labelled positions whose most likely token is right."""
    kept = labels != IGNORE
    return (logits[kept].argmax(-1) == labels[kept]).float().mean()
