"""Decoding: the loop around an engine's step, its stops, streaming and statistics."""

from kvspn.decoding.loop import DecodeResult, Streamer, decode, parse_k
from kvspn.decoding.statistics import DecodeStats

__all__ = ["DecodeResult", "DecodeStats", "Streamer", "decode", "parse_k"]
