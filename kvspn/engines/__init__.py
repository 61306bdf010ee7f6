"""The decoder step as an object, on a chosen backend."""

from kvspn.engines.base import CachedEngine, Engine
from kvspn.engines.registry import backends, default_backend, engine

__all__ = ["CachedEngine", "Engine", "backends", "default_backend", "engine"]
