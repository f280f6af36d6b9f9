"""The sparse model that ships: trained, so that answers mean something and near ties are rare."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

import halve
from halve.engine import SamplingParams
from halve.models.embedded import SPARSE, embedded_model_path

PROMPTS = (
    "Once upon a time there was a little girl named",
    "The king looked at the old man and said,",
    "It was a dark night, and the ship",
    '"Where have you been?" asked her mother.',
)
STEPS = 64
ERROR = 1e-4  # of a logit, ours against transformers' in float32; checked below


@pytest.fixture(scope="module")
def theirs():
    return AutoModelForCausalLM.from_pretrained(embedded_model_path(SPARSE), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours():
    model = halve.load(embedded_model_path(SPARSE), device="cpu", keep=False)
    yield model
    model.close()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_path(SPARSE))


def test_its_folder_holds_what_must_travel_in_less_than_twenty_megabytes():
    folder = embedded_model_path(SPARSE)
    assert {path.name for path in folder.iterdir()} == {path.name for path in embedded_model_path().iterdir()}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20_000_000
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (embedded_model_path() / name).read_bytes()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 - not a dict


def test_it_is_a_mixtral_that_runs_as_many_parameters_for_a_token_as_the_dense_model(theirs):
    assert isinstance(theirs, MixtralForCausalLM)
    assert (theirs.config.num_local_experts, theirs.config.num_experts_per_tok) == (8, 2)
    assert json.loads((embedded_model_path(SPARSE) / "training.json").read_text())["num_params"] == sum(
        parameter.numel() for parameter in theirs.parameters()
    )
    facts = halve.inspect(embedded_model_path(SPARSE))
    dense = halve.inspect(embedded_model_path())
    routers = 4 * 8 * 256
    assert facts.active_parameters - routers == dense.parameters


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_answers_are_those_of_transformers(prompt, ours, theirs, tokenizer):
    ids = tokenizer(prompt).input_ids
    answer = list(ours.generate(ids, SamplingParams(max_tokens=STEPS, ignore_eos=True)).token_ids)
    assert len(answer) == STEPS
    with torch.no_grad():
        logits = theirs(torch.tensor([ids + answer])).logits[0].numpy()
    np.testing.assert_allclose(ours.logits(ids + answer), logits, atol=ERROR)
    for chosen, row in zip(answer, logits[len(ids) - 1 : -1], strict=True):
        best, second = np.sort(row)[[-1, -2]]
        if best - second > 2 * ERROR:  # else both may be right, and answers part from there
            assert chosen == row.argmax()
        elif chosen != row.argmax():
            break


def test_every_expert_is_asked(theirs, tokenizer):
    ids = tokenizer("\n\n".join(PROMPTS) * 4, return_tensors="pt").input_ids
    with torch.no_grad():
        layers = theirs(ids, output_router_logits=True).router_logits
    for layer in layers:
        asked = torch.bincount(layer.topk(2, dim=-1).indices.flatten(), minlength=8) / (2 * len(layer))
        assert asked.min() > 0.02
        assert asked.max() < 0.35
