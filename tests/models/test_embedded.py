import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.models.embedded import EMBEDDED, embedded_model_path


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_path())


def test_the_folder_is_named_after_the_model_and_holds_what_must_travel():
    names = {path.name for path in embedded_model_path().iterdir()}
    assert embedded_model_path().name == EMBEDDED
    assert names == {
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }


def test_the_weights_are_nine_megabytes_of_bf16():
    path = embedded_model_path() / "model.safetensors"
    with safe_open(path, "pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    assert dtypes == {"BF16"}
    assert path.stat().st_size == 8_921_600


def test_transformers_opens_it_with_the_stated_number_of_parameters(model):
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_458_752
    assert json.loads((embedded_model_path() / "training.json").read_text())["num_params"] == 4_458_752


def test_the_vocabulary_of_model_and_tokenizer_agree(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 8192
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert model.generation_config.eos_token_id == [1, tokenizer.convert_tokens_to_ids("<|end|>")]


def test_text_survives_the_tokenizer(tokenizer):
    text = "Tell me: 12 dogs, naïve, 日本語\n\n--- 'quoted'"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_it_predicts_a_story_far_better_than_chance(model, tokenizer):
    story = "Once upon a time there was a little girl who lived in a small house near the wood with her mother."
    ids = tokenizer(story, return_tensors="pt").input_ids
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 4.0  # ln 8192 is 9.0


def test_the_chat_template_is_the_one_of_the_card(tokenizer):
    messages = [{"role": "user", "content": "Tell me a story about a dog."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>Tell me a story about a dog.<|end|><|assistant|>"
