"""KVSPN: speech translation with a draft network that reads the base model's own KV cache.

The public names below load on first use, so that ``import kvspn`` costs no torch import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvspn.engines import engine
    from kvspn.engines.cache import StepCache
    from kvspn.models import WhisperM2MConfig, WhisperM2MForConditionalGeneration, WhisperM2MProcessor
    from kvspn.speech.whisper_model import BatchedInferencePipeline, WhisperModel

__version__ = "0.1.0"

__all__ = [
    "BatchedInferencePipeline",
    "StepCache",
    "WhisperM2MConfig",
    "WhisperM2MForConditionalGeneration",
    "WhisperM2MProcessor",
    "WhisperModel",
    "__version__",
    "engine",
]

_HOME = {
    "BatchedInferencePipeline": "kvspn.speech.whisper_model",
    "StepCache": "kvspn.engines.cache",
    "WhisperM2MConfig": "kvspn.models",
    "WhisperM2MForConditionalGeneration": "kvspn.models",
    "WhisperM2MProcessor": "kvspn.models",
    "WhisperModel": "kvspn.speech.whisper_model",
    "engine": "kvspn.engines",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
