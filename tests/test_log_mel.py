"""Log-mel features in C++ against transformers' extractor: lengths, bands, threads, strides, misuse."""

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from kvspn.assets import read_manifest
from kvspn.engines import backends
from kvspn.speech.audio import load_audio

pytestmark = pytest.mark.skipif(backends()["native"] is not None, reason="the extension is not built")


def encoder(bands: int, threads: int = 1):
    """One without layers, which has the bands."""
    from kvspn import _native

    shapes = {
        "conv1.weight": (16, bands, 3),
        "conv2.weight": (16, 16, 3),
        "embed_positions": (4, 16),
        **dict.fromkeys(("conv1.bias", "conv2.bias", "norm.weight", "norm.bias"), (16,)),
    }
    weights = {f"encoder.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return _native.Encoder(weights, layers=0, heads=1, format="fp32", threads=threads)


def sound(count: int) -> np.ndarray:
    """A tone that rises over noise of another strength every tenth of a second, and silence."""
    random, seconds = np.random.default_rng(count), np.arange(count) / 16000
    loud = 10.0 ** random.uniform(-4, -1, count // 1600 + 1).repeat(1600)[:count]
    samples = 0.5 * np.sin(2 * np.pi * (100 + 1000 * seconds) * seconds) + loud * random.standard_normal(
        count
    )
    samples[count // 2 : count * 2 // 3] = 0
    return samples.astype(np.float32)


def log_mel(samples: np.ndarray, bands: int, threads: int = 1) -> np.ndarray:
    features = np.full((bands, -(-len(samples) // 160)), np.nan, np.float32)
    encoder(bands, threads).log_mel(samples, features)
    return features


@pytest.mark.parametrize("bands", [80, 128])
def test_speech_as_transformers_has_it(bands):
    samples = load_audio(read_manifest("demo")[0].audio)
    extractor = WhisperFeatureExtractor(feature_size=bands)
    expected = extractor(samples, sampling_rate=16000, padding="do_not_pad", return_tensors="np")
    frames = len(samples) // 160
    found = log_mel(samples[: frames * 160], bands)
    assert np.abs(found - expected.input_features[0][:, :frames])[:, :-2].max() < 1e-4


@pytest.mark.parametrize(
    ("count", "bands"), [(1, 80), (159, 80), (200, 128), (201, 80), (3200, 128), (5001, 80), (480_000, 128)]
)
def test_any_length(count, bands):
    """What transformers' are of the samples with zeros up to whole frames, and to half a window.

    Its spectra in float64: those of torch are 1e-4 off where a sound is as uneven as this one.
    """
    samples = sound(count)
    frames = -(-count // 160)
    padded = np.zeros((1, max(frames * 160, 201)), np.float32)
    padded[0, :count] = samples
    found = log_mel(samples, bands)
    assert found.shape == (bands, frames)
    if frames > 1:
        expected = WhisperFeatureExtractor(feature_size=bands)._np_extract_fbank_features(padded, "cpu")[0]
        assert np.abs(found - expected).max() < 2e-5
    assert np.isfinite(found).all()


@pytest.mark.parametrize("count", [100, 10_000, 33_333])
def test_no_bit_depends_on_threads_or_strides(count):
    samples = sound(count)
    expected = log_mel(samples, 80)
    for threads in (2, 3):
        assert np.array_equal(log_mel(samples, 80, threads), expected)
    turned = np.empty(expected.shape, np.float32, order="F")
    encoder(80).log_mel(np.stack([samples, samples], 1)[:, 0], turned)
    assert np.array_equal(turned, expected)


def test_silence_is_the_floor():
    assert np.array_equal(log_mel(np.zeros(1000, np.float32), 80), np.full((80, 7), -1.5, np.float32))
    assert log_mel(np.zeros(0, np.float32), 80).shape == (80, 0)


def test_errors_name_the_argument():
    made, features = encoder(80), np.zeros((80, 3), np.float32)
    damaged = sound(400)
    damaged[17] = np.nan
    for samples, out, message in (
        (damaged, features, "samples must be finite, got nan at 17"),
        (np.full(400, -np.inf, np.float32), features, "samples must be finite, got -inf at 0"),
        (sound(400).astype(np.float16), features, "samples must be fp32, got fp16"),
        (sound(400)[None], features, r"samples must have shape \[any\], got \[1, 400\]"),
        (sound(160), features, r"features must have shape \[80, 1\], got \[80, 3\]"),
        (sound(400), np.zeros((128, 3), np.float32), r"features must have shape \[80, 3\], got \[128, 3\]"),
        (sound(400), np.broadcast_to(np.float32(0), (80, 3)), "features must be writable"),
    ):
        with pytest.raises(ValueError, match=message):
            made.log_mel(samples, out)
    assert not features.any()
