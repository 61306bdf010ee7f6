"""The decoder's weights by name, and the flat list of tensors that crosses an op's schema.

``d = H * D`` is the model's width, ``F`` a feed-forward width, ``V`` the vocabulary, ``P`` the number of
positions. Names and shapes are shared by every backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvspn.checks import FLOATS, INT32, INT32_MAX, Shapes, integer, same_dtype
from kvspn.weights.architecture import WHISPER, Architecture
from kvspn.weights.linear import Linear, check_weight


class Norm(NamedTuple):
    """Weight [d], bias [d]: a LayerNorm, or without a bias an RMSNorm."""

    weight: Tensor
    bias: Tensor | None = None


class LayerWeights(NamedTuple):
    """One decoder layer, each part with its norm in front. Projections of one input are fused.

    The four ``cross_*`` are None in a decoder without an encoder.
    """

    self_norm: Norm
    self_qkv: Linear  # [d + 2 * KVH * D, d]: q, k, v; Whisper's k has no bias: zeros
    self_out: Linear  # [d, d]
    cross_norm: Norm | None
    cross_q: Linear | None  # [d, d]
    cross_kv: Linear | None  # [2d, d]: k, v; bias[:d] is zero; used once per utterance
    cross_out: Linear | None  # [d, d]
    ffn_norm: Norm
    fc1: Linear  # [F, d]; gated: [2F, d]
    fc2: Linear  # [d, F]

    @property
    def cross(self) -> tuple[Norm, Linear, Linear, Linear]:
        """The four ``cross_*``, where there are some."""
        norm, q, kv, out = self.cross_norm, self.cross_q, self.cross_kv, self.cross_out
        assert norm is not None and q is not None and kv is not None and out is not None
        return norm, q, kv, out


class DraftBlockWeights(NamedTuple):
    """A block of KVSPN: ``kv_*`` attends to the base model's cache, ``cross_*`` to the encoder's output.

    ``Hq`` query heads, a multiple of the base model's H. The three ``cross_*`` are given together or not at
    all.
    """

    kv_norm: Norm
    kv_q: Linear  # [Hq * D, d]
    kv_out: Linear  # [d, Hq * D]
    ffn_norm: Norm
    fc1: Linear  # [F, d]; gated: [2F, d]
    fc2: Linear  # [d, F]
    cross_norm: Norm | None = None
    cross_q: Linear | None = None  # [Hq * D, d]
    cross_out: Linear | None = None  # [d, Hq * D]


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """A decoder and its draft network (arXiv 2508.11189); shapes, dtypes and devices are checked when made.

    Attributes:
        heads: the base model's attention heads H.
        embed_tokens: [V, d], embed_positions: [P, d]. Their dtype is that of activations and cache. There are
            no embed_positions where the architecture's are rotary.
        layers: the decoder layers.
        norm: the final norm.
        head: the output embedding [V, d]; ``Linear(embed_tokens)`` when tied. No bias.
        blocks: the draft network's blocks; none means that there is no draft network.
        draft_norm: the draft network's final norm, given if ``blocks`` are.
        draft_head: [V, d], or [Vd, d] with ``draft_ids``; None uses ``head``. No bias.
        draft_ids: int32 [Vd]: row i of ``draft_head`` scores token draft_ids[i], of a short list.
        groups: groups of consecutive layers, len(layers) / groups each; block i reads group
            i * groups // len(blocks). 0 means one group per block.
        last_layer_only: an ablation: a block reads the last layer of its group alone.
        encoder_stride: a block attends to every n-th of the encoder's positions alone: the first of the
            cross-attention cache, where :func:`kvspn.engines.cache.draft_first` puts them.
        architecture: what layers and blocks are made of.

    Raises:
        TypeError, ValueError: naming the field.
    """

    heads: int
    embed_tokens: Tensor
    embed_positions: Tensor | None
    layers: tuple[LayerWeights, ...]
    norm: Norm
    head: Linear
    blocks: tuple[DraftBlockWeights, ...] = ()
    draft_norm: Norm | None = None
    draft_head: Linear | None = None
    draft_ids: Tensor | None = None
    groups: int = 0
    last_layer_only: bool = False
    encoder_stride: int = 1
    architecture: Architecture = WHISPER

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", self.groups or len(self.blocks))
        _check(self)

    @property
    def draft_output(self) -> Linear:
        """The output embedding that the draft network uses."""
        return self.head if self.draft_head is None else self.draft_head

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.architecture.key_heads or self.heads

    @property
    def position_rows(self) -> Tensor:
        """embed_positions, where there are some."""
        assert self.embed_positions is not None
        return self.embed_positions

    @property
    def positions(self) -> int:
        """Tokens of a row at most."""
        return INT32_MAX if self.embed_positions is None else len(self.embed_positions)

    def group(self, block: int) -> slice:
        """The layers whose cache a draft block reads."""
        size = len(self.layers) // self.groups
        end = (block * self.groups // len(self.blocks) + 1) * size
        return slice(end - (1 if self.last_layer_only else size), end)

    def to(self, device: torch.device | str) -> DecoderWeights:
        """The same on another device."""
        return DecoderWeights.unflatten(
            [tensor.to(device) for tensor in self.flatten()],
            heads=self.heads,
            num_layers=len(self.layers),
            groups=self.groups,
            last_layer_only=self.last_layer_only,
            encoder_stride=self.encoder_stride,
            architecture=self.architecture,
        )

    def flatten(self) -> list[Tensor]:
        """Every tensor, in the order that :meth:`unflatten` reads; an empty tensor stands for None."""
        absent = self.embed_tokens.new_empty(0)
        return [absent if tensor is None else tensor for tensor in self._tensors()]

    def _tensors(self) -> Iterator[Tensor | None]:
        yield from (self.embed_tokens, self.embed_positions, self.draft_ids)
        yield from _spread((self.norm, self.head, self.draft_norm, self.draft_head), _ENDS)
        for layer in self.layers:
            yield from _spread(layer, _LAYER)
        for block in self.blocks:
            yield from _spread(block, _BLOCK)

    @classmethod
    def unflatten(
        cls,
        tensors: Sequence[Tensor],
        *,
        heads: int,
        num_layers: int,
        groups: int = 0,
        last_layer_only: bool = False,
        encoder_stride: int = 1,
        architecture: Architecture = WHISPER,
    ) -> DecoderWeights:
        """The inverse of :meth:`flatten`; the number of tensors tells the number of blocks.

        Raises:
            TypeError, ValueError: naming the field, or "weights" when the number of tensors cannot be right.
        """
        base = 3 + _size(_ENDS) + num_layers * _size(_LAYER)
        extra = len(tensors) - base
        num_blocks = extra // _size(_BLOCK)
        if extra < 0 or extra % _size(_BLOCK):
            raise ValueError(
                f"weights must hold {base} tensors for {num_layers} layers and {_size(_BLOCK)} more for each "
                f"draft block, got {len(tensors)}"
            )
        rest: Iterator[Any] = (tensor if tensor.numel() else None for tensor in tensors)
        embed_tokens, embed_positions, draft_ids = (next(rest) for _ in range(3))
        norm, head, draft_norm, draft_head = _gather(rest, _ENDS)
        return cls(
            heads=heads,
            embed_tokens=embed_tokens,
            embed_positions=embed_positions,
            norm=norm,
            head=head,
            layers=tuple(LayerWeights(*_gather(rest, _LAYER)) for _ in range(num_layers)),
            blocks=tuple(DraftBlockWeights(*_gather(rest, _BLOCK)) for _ in range(num_blocks)),
            draft_norm=draft_norm,
            draft_head=draft_head,
            draft_ids=draft_ids,
            groups=groups,
            last_layer_only=last_layer_only,
            encoder_stride=encoder_stride,
            architecture=architecture,
        )


# The kinds of the fields, in order.
_ENDS = (Norm, Linear, Norm, Linear)
_LAYER = (Norm, Linear, Linear, Norm, Linear, Linear, Linear, Norm, Linear, Linear)
_BLOCK = (Norm, Linear, Linear, Norm, Linear, Linear, Norm, Linear, Linear)


def named_tensors(weights: DecoderWeights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the name that csrc knows: "embed_tokens", "layers.0.self_qkv.weight", ..."""
    yield "embed_tokens", weights.embed_tokens.detach()
    if weights.embed_positions is not None:
        yield "embed_positions", weights.embed_positions.detach()
    if weights.draft_ids is not None:
        yield "draft_ids", weights.draft_ids
    parts: dict[str, Any] = {  # a Norm or a Linear each, or None
        name: getattr(weights, name) for name in ("norm", "head", "draft_norm", "draft_head")
    }
    for i, layer in enumerate(weights.layers):
        parts |= {f"layers.{i}.{field}": part for field, part in layer._asdict().items()}
    for i, block in enumerate(weights.blocks):
        parts |= {f"blocks.{i}.{field}": part for field, part in block._asdict().items()}
    for name, part in parts.items():
        for field, tensor in () if part is None else part._asdict().items():
            if tensor is not None:
                yield f"{name}.{field}", tensor.detach()


def _size(kinds: Sequence[Any]) -> int:
    return sum(len(kind._fields) for kind in kinds)


def _spread(parts: Sequence[Any], kinds: Sequence[Any]) -> Iterator[Tensor | None]:
    for part, kind in zip(parts, kinds, strict=True):
        yield from part or (None,) * len(kind._fields)


def _gather(tensors: Iterator[Tensor | None], kinds: Sequence[Any]) -> Iterator[Any]:
    for kind in kinds:
        part = [next(tensors) for _ in kind._fields]
        yield None if part[0] is None else kind(*part)


def _check(w: DecoderWeights) -> None:
    shapes = Shapes()

    def norm(name: str, part: Norm | None) -> None:
        if not isinstance(part, Norm):
            raise TypeError(f"{name} must be a Norm, got {type(part).__name__}")
        shapes.tensor(f"{name}.weight", part.weight, "d", FLOATS)
        if not w.architecture.rms_norm:
            shapes.tensor(f"{name}.bias", part.bias, "d", FLOATS)
        elif part.bias is not None:
            raise ValueError(f"{name}.bias must be None with rms_norm, got a tensor")

    def linear(name: str, part: Linear | None, n: str, k: str) -> None:
        if not isinstance(part, Linear):
            raise TypeError(f"{name} must be a Linear, got {type(part).__name__}")
        check_weight(shapes, f"{name}.weight", f"{name}.scale", part.weight, part.scale, n, k)
        if part.bias is not None:
            shapes.tensor(f"{name}.bias", part.bias, n, FLOATS)

    def head(name: str, part: Linear, n: str) -> None:
        linear(name, part, n, "d")
        if part.bias is not None:
            raise ValueError(f"{name}.bias must be None, got a tensor")

    def feed_forward(at: str, part: LayerWeights | DraftBlockWeights, inner: str) -> None:
        norm(f"{at}.ffn_norm", part.ffn_norm)
        outputs = f"2*{inner}" if w.architecture.gated else inner
        linear(f"{at}.fc1", part.fc1, outputs, "d")
        if w.architecture.gated:
            if shapes[outputs] % 32:
                raise ValueError(
                    f"{at}.fc1.weight must have a multiple of 32 rows with gated, got {shapes[outputs]}"
                )
            shapes.sizes[inner] = shapes[outputs] // 2
        linear(f"{at}.fc2", part.fc2, "d", inner)

    shapes.tensor("embed_tokens", w.embed_tokens, "V d", FLOATS)
    a = w.architecture
    if not isinstance(a, Architecture):
        raise TypeError(f"architecture must be an Architecture, got {type(a).__name__}")
    if not a.rotary_base:
        shapes.tensor("embed_positions", w.embed_positions, "P d", FLOATS)
        assert w.embed_positions is not None
        same_dtype("embed_positions", w.embed_positions, "embed_tokens", w.embed_tokens.dtype)
    elif w.embed_positions is not None:
        raise ValueError("embed_positions must be None with rotary_base, got a tensor")
    d = shapes["d"]
    integer("heads", w.heads, 1, d)
    if d % w.heads:
        raise ValueError(f"heads must divide the width d={d}, got {w.heads}")
    if w.heads % w.key_heads:
        raise ValueError(f"key_heads must divide the {w.heads} heads, got {w.key_heads}")
    if a.rotary_base and d // w.heads % 2:
        raise ValueError(f"rotary_base must be 0 with heads of an odd width, got {a.rotary_base}")
    qkv = "3d" if w.key_heads == w.heads else "(H+2*KVH)*D"
    shapes.sizes |= {"2d": 2 * d, qkv: d + 2 * w.key_heads * (d // w.heads)}
    if not w.layers:
        raise ValueError("layers must hold at least one layer, got 0")
    for i, layer in enumerate(w.layers):
        at = f"layers[{i}]"
        norm(f"{at}.self_norm", layer.self_norm)
        linear(f"{at}.self_qkv", layer.self_qkv, qkv, "d")
        linear(f"{at}.self_out", layer.self_out, "d", "d")
        if a.cross:
            norm(f"{at}.cross_norm", layer.cross_norm)
            linear(f"{at}.cross_q", layer.cross_q, "d", "d")
            linear(f"{at}.cross_kv", layer.cross_kv, "2d", "d")
            linear(f"{at}.cross_out", layer.cross_out, "d", "d")
        elif any((layer.cross_norm, layer.cross_q, layer.cross_kv, layer.cross_out)):
            raise ValueError(f"{at}.cross_* must be None in an architecture without cross, got weights")
        feed_forward(at, layer, "F")
    norm("norm", w.norm)
    head("head", w.head, "V")
    if not w.blocks:
        return
    integer("groups", w.groups, 1, len(w.layers))
    if len(w.layers) % w.groups:
        raise ValueError(f"groups must divide the {len(w.layers)} layers, got {w.groups}")
    integer("encoder_stride", w.encoder_stride, 1, INT32_MAX)
    for i, block in enumerate(w.blocks):
        at = f"blocks[{i}]"
        norm(f"{at}.kv_norm", block.kv_norm)
        linear(f"{at}.kv_q", block.kv_q, "Hq*D", "d")
        if shapes["Hq*D"] % d:
            raise ValueError(f"{at}.kv_q.weight must have a multiple of d={d} rows, got {shapes['Hq*D']}")
        linear(f"{at}.kv_out", block.kv_out, "d", "Hq*D")
        if block.cross_norm or block.cross_q or block.cross_out:
            if not a.cross:
                raise ValueError(f"{at}.cross_* must be None in an architecture without cross, got weights")
            norm(f"{at}.cross_norm", block.cross_norm)
            linear(f"{at}.cross_q", block.cross_q, "Hq*D", "d")
            linear(f"{at}.cross_out", block.cross_out, "d", "Hq*D")
        feed_forward(at, block, "F_draft")
    norm("draft_norm", w.draft_norm)
    if w.draft_ids is not None:
        shapes.tensor("draft_ids", w.draft_ids, "Vd", INT32)
    head("draft_head", w.draft_output, "V" if w.draft_ids is None else "Vd")
