"""What the tests of the verbs work on: a random model with a tokenizer, a text file, and the command as a process."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from halve.api import verify as verb
from halve.api.bundle import read_certificate
from halve.api.trial import Trial
from halve.checkpoint import open_checkpoint
from halve.core.certificate import Served

SOURCE = Path(__file__).resolve().parents[2] / "src"
CONTEXT = 128
VOCABULARY = 300
BOS, EOS = "<s>", "</s>"
CARRIED = {
    "README.md": b"---\nlicense: apache-2.0\n---\n# Tiny\r\n",
    "LICENSE": b"A licence\n",
    "NOTICE": b"A notice \xff\n",
    "chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}",
}
SERVED = Served(
    ops="native",
    batch=32,
    step_tokens=512,
    activations="int8",
    kv_cache="bf16",
    decoded_share=0.5,
    reference_kl=0.0,
)


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def words(seed, count):
    """Words of a made-up language, so that no two documents are alike."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "or")]
    return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count))


def documents(count=80, seed=0):
    return [words(seed * 1000 + i, 30).capitalize() + "." for i in range(count)]


def write_text(path, count=80, seed=0):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(count, seed)))
    return path


def tokenizer(bos=True):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents(), trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return backend


def make_model(path, **changes):
    """A random Llama of 2 layers in bf16, its norms not all ones, with every file that travels."""
    torch.manual_seed(0)
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig(**config))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "bos_token_id": 0}) + "\n\n")
    for name, content in CARRIED.items():
        (path / name).write_bytes(content)
    return path


def environment():
    """Threads that sleep while they wait, and one of them: the models are tiny."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))}
    return inherited | {"PYTHONPATH": str(SOURCE), "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def command(*args):
    return [sys.executable, "-m", "halve.cli", *map(str, args)]


def halve(*args, stdin=None):
    """Run the command in a process of its own."""
    result = subprocess.run(command(*args), capture_output=True, text=True, check=False, env=environment(), input=stdin)
    return Ran(result.returncode, result.stdout, result.stderr)


def python(code, *args):
    """Run Python code in a process of its own."""
    argv = [sys.executable, "-c", code, *map(str, args)]
    result = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment())
    return Ran(result.returncode, result.stdout, result.stderr)


def run_as_recorded(monkeypatch):
    """Have `verify` find both models as the certificate says that they ran: what it says hangs on no clock then."""

    def as_recorded(original, smaller, *_):
        with open_checkpoint(smaller) as opened:
            recorded = read_certificate(opened)
        return Trial(
            speeds=(recorded.original_speed, recorded.speed),
            answers=(),
            agreement=0.0,
            kernels={},
            served=recorded.served or SERVED,
            ratios=recorded.speed_ratios,
            parted=(48, 48),
            answer_tokens=48,
            disturbed=False,
        )

    monkeypatch.setattr(verb, "run_trial", as_recorded)
    monkeypatch.setattr(verb, "rooflines", lambda speeds, **_: ())
    monkeypatch.setattr(verb, "canary_differences", lambda recorded, again: [])
