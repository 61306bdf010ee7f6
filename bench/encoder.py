"""The speech encoder in C++ beside torch's: ``python -m bench.encoder [--model FOLDER] [--json FILE]``.

One encodes a window of noise, then the next, round after round, so that what else the machine does meets them
alike; ratios are of the same round. Beside the elapsed time stands the processor's, which others that are
waited for do not lengthen. States are held against those of torch in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import WhisperConfig

from bench.machine import machine
from kvspn.engines.encoder import FORMATS
from kvspn.models import WhisperM2MConfig, WhisperM2MForConditionalGeneration
from kvspn.models.folder import open_model

BASE = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}


def gflop(config: WhisperConfig) -> float:
    """Of a window: matrices, attention and convolutions."""
    d, positions = config.d_model, config.max_source_positions
    layer = 2 * positions * (4 * d * d + 2 * d * config.encoder_ffn_dim) + 4 * positions**2 * d
    convolutions = 2 * positions * (2 * 3 * config.num_mel_bins * d + 3 * d * d)
    return (config.encoder_layers * layer + convolutions) / 1e9


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@torch.no_grad()
def measure(model: WhisperM2MForConditionalGeneration, threads: int, rounds: int) -> list[dict[str, object]]:
    """A row for each encoder, on so many threads."""
    torch.set_num_threads(threads)
    features = torch.randn(
        model.config.num_mel_bins,
        2 * model.config.max_source_positions,
        generator=torch.Generator().manual_seed(0),
    )
    ours = {f"native {name}": model.speech_encoder(name) for name in FORMATS}
    half = copy.deepcopy(model.model.encoder).bfloat16()
    calls: dict[str, Callable[[], Tensor]] = {
        "torch fp32": lambda: model.encode(features[None])[0],
        "torch bf16": lambda: half(features[None].bfloat16()).last_hidden_state[0],
        **{name: lambda encoder=encoder: encoder(features) for name, encoder in ours.items()},  # type: ignore[misc]
    }
    wanted = calls["torch fp32"]()
    errors = {name: relative(call(), wanted) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    busy: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, begun = time.perf_counter(), time.process_time()
            call()
            seconds[name].append(time.perf_counter() - begin)
            busy[name].append(time.process_time() - begun)

    def over(times: dict[str, list[float]], name: str) -> float:
        return median(a / b for a, b in zip(times["torch fp32"], times[name], strict=True))

    return [
        {
            "encoder": name,
            "instruction_set": ours[name].instruction_set if name in ours else None,
            "threads": threads,
            "ms": round(1e3 * median(seconds[name]), 1),
            "ms_spread": [round(1e3 * min(seconds[name]), 1), round(1e3 * max(seconds[name]), 1)],
            "cpu_ms": round(1e3 * median(busy[name]), 1),
            "gflop_per_cpu_s": round(gflop(model.config) / median(busy[name]), 1),
            "over_torch_fp32": round(over(seconds, name), 2),
            "over_torch_fp32_cpu": round(over(busy, name), 2),
            "relative_error": float(f"{errors[name]:.2g}"),
        }
        for name in calls
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model's folder; by default random weights of Whisper base's shape")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rounds < 1 or min(options.threads) < 1:
        parser.error(f"--rounds and --threads must be at least 1, got {options.rounds}, {options.threads}")
    if options.model:
        model, _ = open_model(options.model, torch.float32)
    else:
        torch.manual_seed(0)
        small = {"decoder_layers": 1, "decoder_attention_heads": 8, "decoder_ffn_dim": 64, "vocab_size": 64}
        ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
        without = {"text_encoder_layers": 0, "kvspn_blocks": 0, "suppress_tokens": None}
        config = WhisperM2MConfig(**BASE, **small, **ids, **without, begin_suppress_tokens=None)
        model = WhisperM2MForConditionalGeneration(config).eval()
    rows = [row for threads in options.threads for row in measure(model, threads, options.rounds)]
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items()))
    if options.json:
        fields = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins")
        record = {
            "machine": machine("cpu"),
            "model": Path(options.model).name if options.model else "random",
            "shape": {name: getattr(model.config, name) for name in fields},
            "positions": model.config.max_source_positions,
            "gflop": round(gflop(model.config), 1),
            "rounds": options.rounds,
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
