"""What a decoder and its draft network are made of, and the formats that their matrices are stored in."""

from kvspn.weights.architecture import QWEN2, WHISPER, Architecture
from kvspn.weights.decoder import DecoderWeights, DraftBlockWeights, LayerWeights, Norm
from kvspn.weights.linear import Linear

__all__ = [
    "QWEN2",
    "WHISPER",
    "Architecture",
    "DecoderWeights",
    "DraftBlockWeights",
    "LayerWeights",
    "Linear",
    "Norm",
]
