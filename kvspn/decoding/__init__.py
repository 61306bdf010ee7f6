"""Decoding: the loop around an engine's step, its stops, streaming and statistics."""

from kvspn.decoding.loop import DecodeResult, Streamer, decode, parse_k
from kvspn.decoding.statistics import DecodeStats, compression_ratio

__all__ = ["DecodeResult", "DecodeStats", "Streamer", "compression_ratio", "decode", "parse_k"]
