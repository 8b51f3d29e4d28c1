"""Published language models as HYDRA's: Qwen2.5 first, and the decoders that are built like it. HYDRA, section 2.2."""

from torch import Tensor
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from hydra_hf.modeling import HydraConfig, HydraProcessor, HydraTokConfig, VisionHeadConfig


MODEL_TYPES = ("qwen2", "qwen3", "llama")


def text_config(folder: str, source: dict) -> PreTrainedConfig:
    """The config of the language model in `folder`, whose config.json is `source`. Raises ValueError for an unsupported type."""
    if source.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"The language model is of type {source.get('model_type')!r}, expected one of {MODEL_TYPES}.")
    config = AutoConfig.from_pretrained(folder)
    config._name_or_path = ""  # otherwise the folder's name is saved with the model
    return config


def convert_language(name: str, value: Tensor, tie_word_embeddings: bool) -> dict[str, Tensor] | None:
    """A source tensor under this package's name; {} if HYDRA does not need it, None if the name is unknown."""
    if name.endswith("rotary_emb.inv_freq"):
        return {}  # old Llama files store what the config already says
    if name == "lm_head.weight":
        return {} if tie_word_embeddings else {name: value}
    if name.startswith("model."):
        return {f"model.language_model.{name.removeprefix('model.')}": value}
    return None


def hydra_config(text: PreTrainedConfig, vision: HydraTokConfig, processor: HydraProcessor) -> HydraConfig:
    """HYDRA's config from those of its parts, with the ids of the processor's tokenizer.

    Raises ValueError if an id is outside the vocabulary.
    """
    tokenizer = processor.tokenizer
    return HydraConfig(
        text_config=text,
        vision_config=vision,
        vision_head_config=vision_head_config(text.hidden_size),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids(processor.vision_start_token),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(processor.vision_end_token),
        null_prompt_ids=tokenizer(processor.build_image_prompt("")).input_ids,
    )


def vision_head_config(hidden_size: int) -> VisionHeadConfig:
    """As wide as the language model, at most 1536, in heads of about 128 channels (our choice)."""
    num_heads = max(1, min(hidden_size, 1536) // 128)
    width = min(hidden_size, 1536) // (4 * num_heads) * (4 * num_heads)  # 2D RoPE requires heads of 4n channels
    return VisionHeadConfig(hidden_size=width, num_attention_heads=num_heads, intermediate_size=4 * width)
