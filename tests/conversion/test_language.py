import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_sources import internvl_vision, language_model
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2ForCausalLM

from hydra_hf import HydraConfig, HydraForConditionalGeneration, VisionHeadConfig
from hydra_hf.conversion.convert import convert, targets_of
from hydra_hf.conversion.language import convert_language, text_config, vision_head_config


@pytest.fixture
def vit(tmp_path) -> str:
    internvl_vision(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
@torch.no_grad()
def test_logits_and_hidden_states_are_the_published_models(
    model_type, tie_word_embeddings, vit, tiny_tokenizer, tmp_path
):
    reference = language_model(tmp_path / "text", tiny_tokenizer, model_type, tie_word_embeddings=tie_word_embeddings)
    out = convert(vit, tmp_path / "out", str(tmp_path / "text"))
    model = AutoModelForImageTextToText.from_pretrained(out / "model").eval()
    assert isinstance(model, HydraForConditionalGeneration)
    assert model.config.tie_word_embeddings == tie_word_embeddings
    input_ids = torch.tensor([[8, 9, 10, 11, 12], [20, 30, 40, 50, 60]])
    expected = reference(input_ids, output_hidden_states=True)
    actual = model(input_ids, output_hidden_states=True)
    assert expected.logits.std() > 0.1
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_stored_although_it_is_tied_is_ignored(vit, tiny_tokenizer, tmp_path):
    reference = language_model(tmp_path / "text", tiny_tokenizer, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = reference.lm_head.weight.detach().clone()
    save_file(tensors, tmp_path / "text" / "model.safetensors")
    out = convert(vit, tmp_path / "out", str(tmp_path / "text"))
    assert "lm_head.weight" not in load_file(out / "model" / "model.safetensors")


def test_an_untied_head_that_is_missing_is_an_error(vit, tiny_tokenizer, tmp_path):
    language_model(tmp_path / "text", tiny_tokenizer, tie_word_embeddings=True)
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "text" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"1 missing: lm_head.weight"):
        convert(vit, tmp_path / "out", str(tmp_path / "text"))


def test_the_inverse_frequencies_of_old_llama_files_are_ignored():
    assert convert_language("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(2), False) == {}
    translated = convert_language("model.visual.proj", torch.ones(2), False)
    assert set(translated) == {"model.language_model.visual.proj"}  # no target, so it is reported as unexpected
    assert convert_language("visual.proj", torch.ones(2), False) is None


def test_another_kind_of_model_is_an_error():
    with pytest.raises(ValueError, match=r"'qwen2_vl', expected one of \('qwen2', 'qwen3', 'llama'\)"):
        text_config("", {"model_type": "qwen2_vl"})


def test_a_tokenizer_without_vision_tokens_is_an_error_that_names_them(vit, tiny_tokenizer, tmp_path):
    language_model(tmp_path / "text", tiny_tokenizer)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / "text" / file
        path.write_text(
            path.read_text().replace("<|vision_end|>", "<|other|>").replace("<|image_pad|>", "<|another|>")
        )
    with pytest.raises(ValueError, match=r"no \['<\|image_pad\|>', '<\|vision_end\|>'\]"):
        convert(vit, tmp_path / "out", str(tmp_path / "text"))


def test_an_embedding_too_small_for_the_vision_tokens_is_an_error(vit, tiny_tokenizer, tmp_path):
    language_model(tmp_path / "text", tiny_tokenizer)
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "text" / "config.json").write_text(json.dumps({**config, "vocab_size": 4}))
    with pytest.raises(ValueError, match="outside .*vocab_size=4"):
        convert(vit, tmp_path / "out", str(tmp_path / "text"))


# Full size, without allocating


@pytest.mark.parametrize("preset", [HydraConfig.hydra_1_5b, HydraConfig.hydra_7b])
def test_the_table_covers_qwen(preset):
    config = preset()
    with torch.device("meta"):
        source, target = Qwen2ForCausalLM(config.text_config), HydraForConditionalGeneration(config)
    expected = {
        name: value.shape
        for name, value in targets_of(target).items()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    assert ("lm_head.weight" in expected) is not config.tie_word_embeddings
    filled = {}
    for name, value in source.state_dict().items():
        filled |= convert_language(name, value, config.tie_word_embeddings)
    assert {name: value.shape for name, value in filled.items()} == expected


@pytest.mark.parametrize(
    ("width", "head_width", "num_heads"), [(1536, 1536, 12), (3584, 1536, 12), (896, 896, 7), (64, 64, 1)]
)
def test_the_vision_head_is_as_wide_as_the_language_model_up_to_1536(width, head_width, num_heads):
    config = vision_head_config(width)
    assert (config.hidden_size, config.num_attention_heads) == (head_width, num_heads)


def test_the_vision_head_of_qwen_is_the_presets():
    assert vision_head_config(1536).to_dict() == vision_head_config(3584).to_dict() == VisionHeadConfig().to_dict()


def test_any_width_of_a_language_model_gives_a_legal_vision_head():
    for width in (100, 576, 1000, 1400, 2050):
        config = vision_head_config(width)
        assert 0.9 * min(width, 1536) < config.hidden_size <= width


def test_the_text_config_is_the_sources_without_the_name_of_its_folder(tiny_tokenizer, tmp_path):
    language_model(tmp_path / "text", tiny_tokenizer, "qwen3")
    source = AutoConfig.from_pretrained(tmp_path / "text")
    config = text_config(str(tmp_path / "text"), source.to_dict())
    assert config.to_dict() == {**source.to_dict(), "_name_or_path": ""}
    assert str(tmp_path) not in json.dumps(config.to_dict(), default=str)
