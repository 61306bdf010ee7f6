"""The step against formulas that share no code with it: transformers' Whisper, and KVSPN written densely."""

import importlib

import pytest
import torch
from torch.nn import functional as F
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from kvspn.decoding import decode
from kvspn.engines import engine
from kvspn.engines.cache import StepCache
from kvspn.weights import DecoderWeights, LayerWeights, Linear, Norm
from kvspn.weights.random import random_decoder

step_module = importlib.import_module("kvspn.ops.decoder_step")  # the package's name for it is the op


def whisper_decoder():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=41,
        d_model=24,
        decoder_layers=3,
        decoder_attention_heads=3,
        decoder_ffn_dim=40,
        max_target_positions=30,
        attn_implementation="eager",
        init_std=0.3,
        pad_token_id=0,
    )
    decoder = WhisperDecoder(config).eval()
    with torch.no_grad():  # what Whisper initialises to zeros and ones must count too
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def extract(decoder):
    def fuse(*parts):
        biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts]
        return Linear(torch.cat([p.weight for p in parts]), torch.cat(biases))

    def norm(part):
        return Norm(part.weight, part.bias)

    def layer(part):
        attn, cross = part.self_attn, part.encoder_attn
        return LayerWeights(
            self_norm=norm(part.self_attn_layer_norm),
            self_qkv=fuse(attn.q_proj, attn.k_proj, attn.v_proj),
            self_out=fuse(attn.out_proj),
            cross_norm=norm(part.encoder_attn_layer_norm),
            cross_q=fuse(cross.q_proj),
            cross_kv=fuse(cross.k_proj, cross.v_proj),
            cross_out=fuse(cross.out_proj),
            ffn_norm=norm(part.final_layer_norm),
            fc1=fuse(part.fc1),
            fc2=fuse(part.fc2),
        )

    return DecoderWeights(
        heads=decoder.config.decoder_attention_heads,
        embed_tokens=decoder.embed_tokens.weight,
        embed_positions=decoder.embed_positions.weight,
        layers=tuple(layer(part) for part in decoder.layers),
        norm=norm(decoder.layer_norm),
        head=Linear(decoder.embed_tokens.weight),
    )


@torch.no_grad()
def test_logits_equal_whisper(ops):
    decoder = whisper_decoder()
    weights = extract(decoder)
    states = torch.randn(2, 13, 24)
    ids = torch.randint(0, 41, (2, 20), dtype=torch.int32)
    reference = engine("reference", weights, batch=2, capacity=30, cross_capacity=13)
    reference.start(states, [[0], [0]], eos=-1, max_length=30)
    cache = reference.cache
    passes = []
    for start, end in ((0, 1), (1, 3), (3, 19), (19, 20)):  # 1, 2 and 16 queries of one pass
        x = step_module.base_pass(weights, ids[:, start:end], cache.tensors)
        passes.append(ops.fused_linear(x, weights.head.weight, None, *weights.norm))
        cache.lengths += end - start
    hidden = decoder(input_ids=ids.long(), encoder_hidden_states=states).last_hidden_state
    torch.testing.assert_close(torch.cat(passes, 1), hidden @ weights.head.weight.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_tokens_equal_whisper():
    decoder = whisper_decoder()
    weights, states, prompt = extract(decoder), torch.randn(1, 9, 24), [3, 1, 4]
    expected = list(prompt)
    while len(expected) < 20:
        hidden = decoder(input_ids=torch.tensor([expected]), encoder_hidden_states=states).last_hidden_state
        expected.append(int((hidden[0, -1] @ weights.head.weight.T).argmax()))
    reference = engine("reference", weights, batch=1, capacity=20, cross_capacity=9)
    result = decode(reference, states, [prompt], eos=-1, max_length=20, draft=False)
    assert result.sequences == [expected]


def dense_draft_logits(w, token, position, kv, cross_kv):
    """KVSPN in float64 for one row: kv [L, 2, H, T, D], cross_kv [L, 2, H, E, D], no padding anywhere."""

    def norm(x, part):
        return F.layer_norm(x, x.shape, part.weight.double(), part.bias.double())

    def linear(x, part):
        return F.linear(x, part.weight.double(), None if part.bias is None else part.bias.double())

    def attend(x, part_norm, q, out, cache):  # cache [n, 2, H, T, D]
        keys, values = cache.double().permute(1, 2, 0, 3, 4).flatten(2, 3)
        queries = linear(norm(x, part_norm), q).view(-1, 1, keys.shape[-1])
        repeat = len(queries) // len(keys)
        keys, values = keys.repeat_interleave(repeat, 0), values.repeat_interleave(repeat, 0)
        weights = (queries @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5).softmax(-1)
        return x + linear((weights @ values).flatten(), out)

    x = (w.embed_tokens[token] + w.embed_positions[position]).double()
    size = len(w.layers) // w.groups
    for i, block in enumerate(w.blocks):
        group = i * w.groups // len(w.blocks)
        first, last = group * size, group * size + size - 1
        x = attend(
            x, block.kv_norm, block.kv_q, block.kv_out, kv[last if w.last_layer_only else first : last + 1]
        )
        if block.cross_norm is not None:
            x = attend(
                x,
                block.cross_norm,
                block.cross_q,
                block.cross_out,
                cross_kv[last : last + 1, :, :, : -(-cross_kv.shape[3] // w.encoder_stride)],
            )
        x = x + linear(F.gelu(linear(norm(x, block.ffn_norm), block.fc1)), block.fc2)
    return linear(norm(x, w.draft_norm), w.draft_output)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 4, "blocks": 2},
        {"layers": 4, "blocks": 2, "encoder_attention": False},
        {"layers": 4, "blocks": 2, "last_layer_only": True},
        {"layers": 4, "blocks": 1, "groups": 2},
        {"layers": 2, "blocks": 4, "groups": 2},
        {"layers": 4, "blocks": 2, "draft_heads": 6},
        {"layers": 4, "blocks": 2, "short_list": 9},
        {"layers": 4, "blocks": 2, "encoder_stride": 2},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_draft_against_a_dense_formula(options):
    w = random_decoder(**options, gain=2.5)
    kv, cross_kv = torch.randn(len(w.layers), 2, 3, 2, 12, 8), torch.randn(len(w.layers), 2, 3, 2, 7, 8)
    lengths, cross_lengths = torch.tensor([3, 1, 11]).int(), torch.tensor([7, 2, 5]).int()
    newest = torch.tensor([[4], [7], [0]], dtype=torch.int32)
    mask = torch.zeros(29)
    mask[::4] = -torch.inf
    caches = step_module.Caches(kv, lengths, cross_kv, cross_lengths)
    state = step_module.StepState(caches, newest, torch.zeros(3).bool(), torch.zeros(3, 3).int())
    guesses = step_module.propose(w, newest, state, step_module.StepRule(mask, 1, -1, 12))
    for b, (length, cross_length) in enumerate(zip(lengths.tolist(), cross_lengths.tolist(), strict=True)):
        logits = dense_draft_logits(
            w, int(newest[b]), length, kv[:, :, b, :, :length], cross_kv[:, :, b, :, :cross_length]
        )
        if w.draft_ids is not None:
            logits = torch.full((29,), -torch.inf).double().index_copy(0, w.draft_ids.long(), logits)
        assert guesses[b, 0] == (logits + mask).argmax()


def test_whole_buffers(ops, dtype):
    """Finished rows stay untouched; of the others, only this step's positions of the cache are written."""
    w = random_decoder(layers=4, blocks=2, dtype=dtype)
    cache = StepCache(4, 3, 2, 8, 12, 5, dtype)
    cache.kv.normal_()
    cache.cross_kv.normal_()
    cache.lengths.copy_(torch.tensor([2, 5, 0]))
    cache.cross_lengths.copy_(torch.tensor([5, 1, 3]))
    tokens = torch.randint(0, 29, (3, 14), dtype=torch.int32)
    finished, stats = torch.tensor([False, True, False]), torch.zeros(3, 3, dtype=torch.int32)
    for b, length in enumerate(cache.lengths.tolist()):
        cache.kv[:, :, b, :, length:] = torch.nan
    cache.cross_kv[:, :, 1, :, 1:], cache.cross_kv[:, :, 2, :, 3:] = torch.nan, torch.nan
    buffers = (cache.kv, cache.lengths, tokens, finished, stats, cache.cross_kv, cache.cross_lengths)
    before, addresses = [buffer.clone() for buffer in buffers], [buffer.data_ptr() for buffer in buffers]
    ops.decoder_step(*buffers, w.flatten(), None, 1, -1, 12)
    assert [buffer.data_ptr() for buffer in buffers] == addresses
    for buffer, old in zip(buffers[1:5], before[1:5], strict=True):
        assert torch.equal(buffer[1], old[1])
    assert stats[[0, 2], :2].tolist() == [[1, 1], [1, 1]]
    assert (cache.lengths - before[1]).tolist() == [1 + int(stats[0, 2]), 0, 1 + int(stats[2, 2])]
    for b, length in ((0, 2), (2, 0)):
        assert not cache.kv[:, :, b, :, length : length + 2].isnan().any()
        cache.kv[:, :, b, :, length : length + 2] = torch.nan
    assert torch.equal(cache.kv.nan_to_num(99), before[0].nan_to_num(99))
    assert torch.equal(cache.cross_kv.nan_to_num(99), before[5].nan_to_num(99))
    assert torch.equal(cache.cross_lengths, before[6])


@pytest.mark.parametrize("use_draft", [False, True])
def test_the_op_is_the_engines_step(ops, use_draft):
    w = random_decoder(layers=4, blocks=2, encoder_attention=False)
    states, prompt = torch.randn(2, 5, 16), [[1, 2, 3], [4]]
    engines = [engine("reference", w, batch=2, capacity=12, cross_capacity=5) for _ in range(2)]
    for e in engines:
        e.start(states, prompt, eos=5, max_length=12)
    first, second = engines
    cache = second.cache
    for _ in range(4):
        first.step(k=2, draft=use_draft)
        ops.decoder_step(
            cache.kv, cache.lengths, second.tokens, second.finished, second.stats, cache.cross_kv,
            cache.cross_lengths, w.flatten(), None, 2, 5, 12, use_draft,
        )  # fmt: skip
        for name in ("tokens", "lengths", "finished", "stats"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_last_positions_with_the_smallest_buffers(ops):
    """max_length = N = S = P: the draft of the last step has room, and a full row just ends."""
    w = random_decoder(positions=6)
    cache = StepCache(2, 2, 2, 8, 6, 3)
    cache.kv.normal_()
    cache.cross_kv.normal_()
    cache.lengths.copy_(torch.tensor([4, 5]))
    cache.cross_lengths.fill_(3)
    tokens, finished = torch.zeros(2, 6, dtype=torch.int32), torch.zeros(2, dtype=torch.bool)
    stats = torch.zeros(2, 3, dtype=torch.int32)
    ops.decoder_step(
        cache.kv, cache.lengths, tokens, finished, stats, cache.cross_kv, cache.cross_lengths, w.flatten(),
        None, 1, -1, 6,
    )  # fmt: skip
    assert finished.tolist() == [True, True]
    assert cache.lengths.tolist() == [5, 5]
