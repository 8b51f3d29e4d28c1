"""The networks and their processors, registered with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)

from .configuration_hydra import (
    HydraConfig,
    HydraTokConfig,
    PixelFlowDecoderConfig,
    PixelViTDecoderConfig,
    VisionHeadConfig,
)


for _config in (VisionHeadConfig, HydraTokConfig, HydraConfig):
    AutoConfig.register(_config.model_type, _config)

from .image_processing_hydra import HydraImageProcessor
from .modeling_hydra import HydraForConditionalGeneration, HydraModel
from .modeling_hydra_tok import HydraTokModel
from .pretraining_hydra_tok import HydraTokForPreTraining
from .processing_hydra import HydraProcessor
from .video_processing_hydra import HydraVideoProcessor


AutoModel.register(HydraTokConfig, HydraTokModel)
AutoModel.register(HydraConfig, HydraModel)
AutoModelForImageTextToText.register(HydraConfig, HydraForConditionalGeneration)
AutoModelForMultimodalLM.register(HydraConfig, HydraForConditionalGeneration)
for _config in (HydraTokConfig, HydraConfig):
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": HydraImageProcessor})
    AutoVideoProcessor.register(_config, HydraVideoProcessor)
AutoProcessor.register(HydraConfig, HydraProcessor)

__all__ = [
    "HydraConfig",
    "HydraForConditionalGeneration",
    "HydraImageProcessor",
    "HydraModel",
    "HydraProcessor",
    "HydraTokConfig",
    "HydraTokForPreTraining",
    "HydraTokModel",
    "HydraVideoProcessor",
    "PixelFlowDecoderConfig",
    "PixelViTDecoderConfig",
    "VisionHeadConfig",
]
