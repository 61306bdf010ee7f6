import dataclasses

import pytest
import torch

from kvspn.weights import DecoderWeights, Linear
from kvspn.weights.random import random_decoder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": 0},
        {"layers": 4, "blocks": 2, "encoder_attention": False},
        {"layers": 4, "blocks": 2, "groups": 4, "short_list": 5, "last_layer_only": True},
        {"quantised": "int8", "draft_heads": 4},
        {"encoder_stride": 2},
    ],
)
def test_flatten_and_back(options):
    weights = random_decoder(**options)
    flat = weights.flatten()
    again = DecoderWeights.unflatten(
        flat,
        heads=weights.heads,
        num_layers=len(weights.layers),
        groups=weights.groups,
        last_layer_only=weights.last_layer_only,
        encoder_stride=weights.encoder_stride,
    )
    assert [tensor.data_ptr() for tensor in again.flatten()] == [tensor.data_ptr() for tensor in flat]
    for field in dataclasses.fields(DecoderWeights):
        before, after = getattr(weights, field.name), getattr(again, field.name)
        assert before is after or repr(before) == repr(after), field.name
    assert len(again.blocks) == len(weights.blocks)


@pytest.mark.parametrize(
    ("layers", "blocks", "groups", "last_layer_only", "expected"),
    [
        (12, 3, 0, False, [(0, 4), (4, 8), (8, 12)]),
        (12, 3, 3, True, [(3, 4), (7, 8), (11, 12)]),
        (6, 2, 3, False, [(0, 2), (2, 4)]),
        (4, 4, 2, False, [(0, 2), (0, 2), (2, 4), (2, 4)]),
    ],
)
def test_groups(layers, blocks, groups, last_layer_only, expected):
    weights = random_decoder(layers=layers, blocks=blocks, groups=groups, last_layer_only=last_layer_only)
    slices = [weights.group(i) for i in range(blocks)]
    assert [(layers.start, layers.stop) for layers in slices] == expected


def replace_layer(**changes):
    return lambda w: {"layers": (w.layers[0], w.layers[1]._replace(**changes))}


def replace_block(**changes):
    return lambda w: {"blocks": (w.blocks[0]._replace(**changes),)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("heads", lambda w: {"heads": 3}),
        ("heads", lambda w: {"heads": 2.0}),
        ("embed_tokens", lambda w: {"embed_tokens": None}),
        ("embed_positions", lambda w: {"embed_positions": w.embed_positions[:, :8]}),
        ("embed_positions", lambda w: {"embed_positions": w.embed_positions.half()}),
        ("layers", lambda w: {"layers": ()}),
        ("layers[1].self_qkv.weight", replace_layer(self_qkv=Linear(torch.zeros(16, 16)))),
        ("layers[1].self_norm", replace_layer(self_norm=None)),
        ("layers[1].fc2", replace_layer(fc2=torch.zeros(16, 32))),
        ("layers[1].fc2.scale", replace_layer(fc2=Linear(torch.zeros(16, 32, dtype=torch.int8)))),
        ("layers[1].cross_q.bias", replace_layer(cross_q=Linear(torch.zeros(16, 16), torch.zeros(8)))),
        ("norm", lambda w: {"norm": w.head}),
        ("head.weight", lambda w: {"head": Linear(torch.zeros(28, 16))}),
        ("head.bias", lambda w: {"head": Linear(torch.zeros(29, 16), torch.zeros(29))}),
        ("blocks[0].kv_q.weight", replace_block(kv_q=Linear(torch.zeros(24, 16)))),
        ("blocks[0].kv_out.weight", replace_block(kv_out=Linear(torch.zeros(16, 32)))),
        ("blocks[0].cross_q", replace_block(cross_q=None)),
        ("draft_norm", lambda w: {"draft_norm": None}),
        ("draft_head.weight", lambda w: {"draft_ids": torch.zeros(3, dtype=torch.int32)}),
        ("draft_ids", lambda w: {"draft_ids": torch.zeros(3)}),
        ("groups", lambda w: {"groups": 3}),
    ],
)
def test_errors_name_the_field(name, changes):
    weights = random_decoder()
    with pytest.raises((TypeError, ValueError)) as caught:
        dataclasses.replace(weights, **changes(weights))
    assert str(caught.value).startswith(f"{name} must ")
