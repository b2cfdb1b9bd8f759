"""The model, native to Hugging Face transformers; this package imports nothing else of apollo.

`register()` makes the Auto classes know it; it is also SGLang's plugin, and `register_with_vllm()`
is vLLM's (docs/engines.md). Names are imported on first use, so that importing the package costs
nothing. Read next: `modeling.py`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration import ApolloConfig, InternVideo2Config
    from .conversion import ConversionError, convert, converted
    from .internvideo2 import InternVideo2Model
    from .modeling import ApolloForConditionalGeneration, ApolloModel
    from .processing import ApolloProcessor, new_special_tokens

_MODULES = {
    "ApolloConfig": "configuration",
    "InternVideo2Config": "configuration",
    "InternVideo2Model": "internvideo2",
    "ApolloModel": "modeling",
    "ApolloForConditionalGeneration": "modeling",
    "ApolloProcessor": "processing",
    "ConversionError": "conversion",
    "convert": "conversion",
    "converted": "conversion",
    "new_special_tokens": "processing",
}

__all__ = [
    "ApolloConfig",
    "ApolloForConditionalGeneration",
    "ApolloModel",
    "ApolloProcessor",
    "ConversionError",
    "InternVideo2Config",
    "InternVideo2Model",
    "convert",
    "converted",
    "new_special_tokens",
    "register",
    "register_with_vllm",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def register() -> None:
    """Make the Auto classes of transformers know the model; to do it again is no harm."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from .configuration import ApolloConfig, InternVideo2Config
    from .internvideo2 import InternVideo2Model
    from .modeling import ApolloForConditionalGeneration, ApolloModel
    from .processing import ApolloProcessor

    AutoConfig.register("internvideo2", InternVideo2Config, exist_ok=True)
    AutoModel.register(InternVideo2Config, InternVideo2Model, exist_ok=True)
    AutoConfig.register("apollo_vlm", ApolloConfig, exist_ok=True)
    AutoModel.register(ApolloConfig, ApolloModel, exist_ok=True)
    AutoModelForImageTextToText.register(
        ApolloConfig, ApolloForConditionalGeneration, exist_ok=True
    )
    AutoProcessor.register(ApolloConfig, ApolloProcessor, exist_ok=True)


def register_with_vllm() -> None:
    """Make vLLM serve the model by its backend for transformers' models."""
    from vllm import ModelRegistry

    register()
    backend = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"
    ModelRegistry.register_model("ApolloForConditionalGeneration", backend)
