"""Models: whisperM2M and KVSPN on Hugging Face conventions, known to transformers' Auto classes."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from kvspn.models.configuration import WhisperM2MConfig
from kvspn.models.conversion import convert_whisper, spread_layers
from kvspn.models.modeling import WhisperM2MForConditionalGeneration
from kvspn.models.processing import WhisperM2MFeatureExtractor, WhisperM2MProcessor

AutoConfig.register(WhisperM2MConfig.model_type, WhisperM2MConfig)
AutoModelForSpeechSeq2Seq.register(WhisperM2MConfig, WhisperM2MForConditionalGeneration)
AutoFeatureExtractor.register(WhisperM2MConfig, WhisperM2MFeatureExtractor)
AutoProcessor.register(WhisperM2MConfig, WhisperM2MProcessor)
# The speech recognition pipeline looks here to tell an encoder-decoder from a CTC model.
MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES[WhisperM2MConfig.model_type] = (
    WhisperM2MForConditionalGeneration.__name__
)

__all__ = [
    "WhisperM2MConfig",
    "WhisperM2MFeatureExtractor",
    "WhisperM2MForConditionalGeneration",
    "WhisperM2MProcessor",
    "convert_whisper",
    "spread_layers",
]
