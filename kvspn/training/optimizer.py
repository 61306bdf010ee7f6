"""Muon for the matrices of the layers, AdamW for all else, as one optimizer.

Muon (Jordan, 2024) takes the momentum's orthogonal part as its step: dearer than AdamW's, and worth more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

_WEIGHT_DECAY = 0.01


class MuonAdamW(Optimizer):
    """Both at one learning rate: Muon's steps are scaled to the RMS of AdamW's.

    Args:
        named: name and parameter; what needs no gradient is left out.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], learning_rate: float):
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        matrices = [parameter for name, parameter in trained if _is_matrix_of_a_layer(name, parameter)]
        others = [parameter for name, parameter in trained if not _is_matrix_of_a_layer(name, parameter)]
        self._parts: list[Optimizer] = []
        if matrices:
            self._parts.append(
                Muon(matrices, learning_rate, _WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
            )
        if others:
            self._parts.append(AdamW(others, learning_rate, (0.9, 0.98), weight_decay=_WEIGHT_DECAY))
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both. `closure` is not supported."""
        if closure is not None:
            raise ValueError("closure must be None: the gradients are there already")
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of both, in order."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def _is_matrix_of_a_layer(name: str, parameter: nn.Parameter) -> bool:
    """`layers.0.fc1.weight` is; embeddings, heads, norms, biases and convolutions are not."""
    return parameter.ndim == 2 and any(part.isdigit() for part in name.split("."))
