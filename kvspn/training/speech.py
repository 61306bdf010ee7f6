"""Synthetic speech: espeak-ng voices, and noise and gain augmentation.

Every clip is drawn at random: a voice variant, speed, pitch, gain and noise. The test voices are never drawn
for training.
"""

from __future__ import annotations

import io
import random
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 16_000

# espeak-ng's name of each language's voices; accents where it has them
_BASES = {
    "en": ("en-us", "en-gb", "en-gb-x-rp"),
    "zh": ("cmn-latn-pinyin",),
    "de": ("de",),
    "es": ("es", "es-419"),
    "fr": ("fr-fr", "fr-be"),
    "it": ("it",),
}
# What espeak-ng writes beside phonemes and tones: spaces, stress, pauses, ties, "(en)" for another language
_NO_PHONEME = re.compile(r"\([a-z-]+\)|[\s.\u02c8\u02cc_|'\u0361-]")
_TRAIN = """
m1 m2 m3 m4 m5 m6 m8 f1 f2 f3 f5 Alex Alicia Andrea Andy Annie AnxiousAndy Denis Diogo Gene Gene2
Henrique Hugo Jacky Lee Marco Mario Michael Mike Nguyen adam anika announcer antonio aunty belinda
benjamin boris caleb david ed edward edward2 grandma grandpa gustave iven iven2 iven3 iven4 john
kaukovalta linda marcelo max michel miguel norbert pablo paul pedro quincy rob robert sandro shelby
steph steph2 steph3 travis victor zac
"""
TRAIN_VARIANTS = tuple(_TRAIN.split())
TEST_VARIANTS = ("m7", "f4")


@dataclass(frozen=True)
class Voice:
    """How a sentence is spoken. `speed` in words a minute, `pitch` from 0 to 99 (espeak-ng's scales)."""

    name: str
    speed: int
    pitch: int

    @classmethod
    def draw(cls, language: str, variants: tuple[str, ...], rng: random.Random) -> Voice:
        """A random voice of a language, its variant among `variants`."""
        name = f"{rng.choice(_BASES[language])}+{rng.choice(variants)}"
        return cls(name, rng.randint(150, 200), rng.randint(35, 65))


class Speech(NamedTuple):
    """float32 mono samples at 16 kHz, in [-1, 1], and the phonemes that they sound, in the IPA."""

    samples: np.ndarray
    phonemes: str


def synthesize(text: str, voice: Voice) -> Speech:
    """Speaks `text` with espeak-ng. Raises RuntimeError where it is missing or fails."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise RuntimeError("espeak-ng is not installed (Debian, Ubuntu: apt-get install espeak-ng)")
    command = [program, "-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch), "--stdout"]
    command += ["--ipa", "--phonout=/dev/stderr", text]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        raise RuntimeError(f"espeak-ng failed on {text!r}: {done.stderr.decode().strip()}")
    # espeak-ng streams: the header's length is not to be trusted, soundfile reads to the end.
    samples, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    samples = soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ")
    return Speech(samples, _NO_PHONEME.sub("", done.stderr.decode()))


def augment(samples: np.ndarray, rng: random.Random) -> np.ndarray:
    """Random lead-in silence (to 0.3 s), gain (-20 to 0 dB of full scale) and white or low-passed noise."""
    lead = np.zeros(rng.randint(0, int(0.3 * SAMPLING_RATE)), np.float32)
    tail = np.zeros(int(0.1 * SAMPLING_RATE), np.float32)
    samples = np.concatenate([lead, samples, tail])
    samples *= 10 ** (rng.uniform(-20, 0) / 20) / max(float(np.abs(samples).max()), 1e-4)
    if rng.random() < 0.7:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(samples), np.float32)
        if rng.random() < 0.5:
            noise = np.convolve(noise, np.full(8, 1 / np.sqrt(8), np.float32), mode="same")
        snr_db = rng.uniform(12, 45)
        noise *= np.sqrt(np.mean(samples**2)) * 10 ** (-snr_db / 20)
        samples = samples + noise
    return np.clip(samples, -1, 1).astype(np.float32)
