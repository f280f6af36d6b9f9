"""`halve.load(..., device="cuda")` from the files to tokens; without a card by Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import halve
from halve.api import model as api
from halve.kernels.cuda import ops as cuda_ops
from halve.kernels.reference import TorchOps
from tests.api.tiny import make_model

HERE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(name="tiny", scope="module")
def _tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_model_loads_onto_cuda_and_answers_as_on_torch(tiny, monkeypatch):
    real = cuda_ops.CudaOps
    monkeypatch.setattr(api.cuda_rows, "refusal", lambda device: None)
    monkeypatch.setattr(cuda_ops, "CudaOps", lambda device, activations: real(HERE, activations=activations))
    monkeypatch.setattr(real, "spare_bytes", lambda self: 1_000_000)
    model = halve.load(tiny, device="cuda")
    assert model.ops.name == "cuda"
    assert model.decoder.runs_ahead
    assert {kernel for what, kernel in model.kernels.items() if what.startswith("linear")} == {"triton_bf16"}
    assert (model._engine_config.max_num_seqs, model._engine_config.max_tokens_per_step) == (256, 8192)
    size = model.config.kv_cache_bytes_per_token * api.BLOCK_SIZE
    assert model._num_blocks == 1_000_000 // size
    prompt = list(range(5, 20))
    monkeypatch.setattr(api, "make_ops", lambda *_: TorchOps())
    expected = halve.load(tiny, device="torch").logits(prompt)
    found = model.logits(prompt)
    assert abs(found - expected).mean() < 0.02 * expected.std()
    answer = model.generate(prompt, max_tokens=2, ignore_eos=True)
    assert answer.completion_tokens == 2
    assert answer.token_ids[0] in expected[-1].argsort()[-3:]
    model.close()
