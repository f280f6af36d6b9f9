"""What each method leaves of a trained model's predictions, on text that calibration did not see."""

import pytest

from halve.checkpoint import open_checkpoint
from halve.compress import Hessians, apply_plan, calibrate, uniform_plan
from halve.data import encode, read_documents
from halve.data.mixed import KINDS, mixed_text_paths
from halve.evaluate import compare
from halve.evaluate.scorer import DecoderScorer
from halve.formats import FORMATS
from halve.kernels.reference import TorchOps
from halve.models import CheckpointSource, load_config, load_decoder
from halve.models.embedded import embedded_model_path
from halve.text import Tokenizer

WINDOW = 256


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory):
    """A function from format and method to KL in nats per token."""
    with open_checkpoint(embedded_model_path()) as checkpoint:
        config = load_config(checkpoint).with_kv_format("fp32")
        documents = read_documents(mixed_text_paths()[KINDS.index("english")])
        tokens = encode(documents[:80], Tokenizer.from_directory(checkpoint.path), vocab_size=config.vocab_size)
        seen, unseen = tokens[:60], tokens[60:]
        hessians = Hessians(folder=tmp_path_factory.mktemp("hessians"))
        energies = calibrate(config, CheckpointSource(checkpoint), seen, window_tokens=WINDOW, hessians=hessians)
        original = DecoderScorer(load_decoder(checkpoint, config, TorchOps()), keep_bytes=1 << 26)

        def kl(name, method):
            plan = uniform_plan(
                config, FORMATS[name], method, portable=False, source_bits=16, activations="fp32", kv_cache="fp32"
            )
            out = tmp_path_factory.mktemp("made")
            apply_plan(checkpoint, config, plan, out, energies=energies, hessians=hessians)
            with open_checkpoint(out) as made:
                smaller = DecoderScorer(load_decoder(made, load_config(made, plan), TorchOps(widened=True)))
                return float(compare(original, smaller, unseen, window_tokens=WINDOW).kl.mean())

        yield kl


@pytest.mark.parametrize("name", ["int4-g32", "int3-g32"])
def test_gptq_is_closer_to_the_original_than_clip_and_clip_than_rounding(run, name):
    rtn, clip, gptq = (run(name, method) for method in ("rtn", "clip", "gptq"))
    assert gptq < 0.9 * clip < 0.9 * rtn
