import gzip
import json
import lzma
import math
import random
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from train_tiny import checkpoint, text
from train_tiny.cli import main, make_parser
from train_tiny.evaluate import round_to_nearest
from train_tiny.loss import LinearCrossEntropy
from train_tiny.model import Llama, ModelConfig, SparseMlp
from train_tiny.optimizer import Muon, lr_factor, orthogonalise
from train_tiny.tokenizer import open_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.api.sparse import upcycle

SIZES = {"hidden": 32, "intermediate": 64, "layers": 2, "heads": 4, "kv-heads": 2, "context": 32}
SHAPE = [word for name, size in SIZES.items() for word in (f"--{name}", size)]
QUICK = ["--batch", "4", "--log-every", "1", "--dtype", "fp32", "--warmup", "0.1", "--decay", "0.4"]


@dataclass(frozen=True)
class Work:
    folder: Path
    text: Path
    short: Path  # text of the valid stream
    tokenizer: Path
    data: Path
    valid: Path

    def train(self, out, *args, shape=SHAPE):
        words = ["train", "--data", self.data, "--tokenizer", self.tokenizer, "--out", out, *shape, *QUICK, *args]
        return main([str(word) for word in words])


def story(rng):
    who = rng.choice(["the king", "a girl", "the old man", "a fox", "the sea"])
    what = rng.choice(["walked to the wood", "said nothing at all", "found a golden ring", "went home again"])
    return f"Once upon a time {who} {what}, and {rng.choice(['it rained', 'the sun shone'])} all day long."


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    rng = random.Random(0)
    books = ["\n\n\n".join("\n\n".join(story(rng) for _ in range(20)) for _ in range(4)) for _ in range(6)]
    (folder / "books.txt").write_text("\n\f\n".join(books))
    (folder / "short.txt").write_text("\n\n".join(story(rng) for _ in range(9)) + "\n\f\n" + story(rng))
    names = ("books.txt", "short.txt", "tok", "data.bin", "valid.bin")
    run = Work(folder, *(folder / name for name in names))
    assert main(f"tokenizer --text {run.text} --out {run.tokenizer} --vocab 320 --context 32".split()) == 0
    assert main(f"pack --text {run.text} --tokenizer {run.tokenizer} --out {run.data}".split()) == 0
    assert main(f"pack --text {run.short} --tokenizer {run.tokenizer} --out {run.valid} --keep-order".split()) == 0
    return run


@pytest.fixture(scope="module")
def dense(work):
    out = work.folder / "dense"
    assert work.train(out, "--max-steps", 24, "--valid", work.valid) == 0
    return out


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in log_of(folder) if "loss" in row]


def weights(folder):
    return load_file(folder / "model.safetensors")


# ---- text


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.xz"])
def test_documents_stand_between_form_feeds_whatever_the_packing(tmp_path, suffix):
    path = tmp_path / f"two{suffix}"
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.write("one\n\nmore\n\f\ntwo\n")
    assert text.documents(path) == ["one\n\nmore", "two"]


def test_rows_of_json_lines_are_documents(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert text.documents(path) == ["one", "two"]


def test_short_sections_are_joined_up_to_the_limit():
    assert text.sections("aa\n\n\nbb\n\n\n" + "c" * 30, 10) == ["aa\n\nbb", "c" * 30]


def test_conversations_are_cut_from_neighbouring_paragraphs():
    paragraphs = [f"Paragraph {i}: " + "word " * 20 for i in range(60)]
    found = text.chats("\n\n".join(paragraphs), random.Random(1))
    assert found
    for turns in found:
        said = [turn for turn in turns if turn[0] != "system"]
        assert [role for role, _ in said] == ["user", "assistant"] * (len(said) // 2)
        ask, reply = said[0][1], said[1][1]
        first = int(ask.split("Paragraph ")[1].split(":")[0])
        assert reply.startswith(f"Paragraph {first + 1}:")


def test_a_story_request_asks_for_the_commonest_noun():
    turns = text.story_request("There was a cat. It saw a dog, and the dog ran.", random.Random(1))
    assert "dog" in turns[0][1]
    assert text.story_request("Nothing here.", random.Random(1)) is None


# ---- tokenizer and pack


def test_the_tokenizer_opens_in_transformers_with_specials_and_chat_template(work):
    tokenizer = AutoTokenizer.from_pretrained(work.tokenizer)
    assert tokenizer.convert_tokens_to_ids(text.SPECIALS) == list(range(16))
    assert tokenizer("day").input_ids[0] == tokenizer.bos_token_id == text.BOS
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Go on."}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|bos|>" + text.render([("user", "Go on.")]) + "<|assistant|>"


def test_any_text_survives_the_tokenizer(work):
    tokenizer = open_tokenizer(work.tokenizer)
    words = "naïve 日本語 123\n\n\t(x)"
    assert tokenizer.decode(tokenizer.encode(words, add_special_tokens=False).ids) == words


def test_a_text_too_small_for_the_vocabulary_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("tiny")
    assert main(f"tokenizer --text {tmp_path / 'a.txt'} --out {tmp_path / 'tok'} --vocab 1000".split()) == 0
    assert "of the 1000 entries asked for" in capsys.readouterr().out


def test_a_stream_in_order_decodes_to_the_documents(work):
    ids = np.fromfile(work.valid, dtype=np.uint16)
    tokenizer = open_tokenizer(work.tokenizer)
    pieces = "".join(tokenizer.decode(ids, skip_special_tokens=False)).split("<|bos|>")[1:]
    assert [piece.removesuffix("<|eos|>") for piece in pieces] == text.documents(work.short)
    counts = json.loads(work.valid.with_suffix(".json").read_text())
    assert counts == {"num_tokens": len(ids), "num_bytes": len("".join(text.documents(work.short))), "vocab_size": 320}


def test_a_file_may_be_taken_three_times(work, tmp_path):
    for name, spec in (("once", work.text), ("thrice", f"{work.text}*3")):
        assert (
            main(["pack", "--text", str(spec), "--tokenizer", str(work.tokenizer), "--out", f"{tmp_path}/{name}"]) == 0
        )
    assert (tmp_path / "thrice").stat().st_size == 3 * (tmp_path / "once").stat().st_size


def test_chat_adds_conversations_and_the_seed_repeats_them(work, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": story(random.Random(i))}) + "\n" for i in range(9)))
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        words = f"pack --text {work.text} {rows} --tokenizer {work.tokenizer} --out {tmp_path / name} --chat 1"
        assert main([*words.split(), "--seed", str(seed)]) == 0
    a, b, c = (np.fromfile(tmp_path / name, dtype=np.uint16) for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    user, assistant, end = 4, 5, text.END
    assert (a == user).sum() == (a == assistant).sum() > 9
    assert (a == end).sum() >= 2 * (a == user).sum()


# ---- parts of training


@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_chunked_loss_and_gradients_agree_with_torch(chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets = torch.randint(11, (8,))
    ours = LinearCrossEntropy.apply(hidden, weight, targets, chunk)
    ours.backward()
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    theirs = functional.cross_entropy(hidden @ weight.T, targets)
    theirs.backward()
    torch.testing.assert_close(ours, theirs)  # the default tolerance is a few float32 roundings
    torch.testing.assert_close(got, (hidden.grad, weight.grad))


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, *shape)))
    assert values.min() > 0.3  # five steps of this iteration end between about 0.7 and 1.2 but for the smallest
    assert values.max() < 1.3


def test_muon_moves_a_matrix_by_its_learning_rate():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    weight.grad = torch.eye(4)
    Muon([weight], lr=0.5).step()
    assert torch.allclose(weight.data / weight.data[0, 0], torch.eye(4), atol=1e-5)
    assert -0.65 < weight.data[0, 0] < -0.3


def test_the_schedule_warms_up_stays_and_ends_at_zero():
    assert lr_factor(0.0, 0.1, 0.5) == 0.02
    assert lr_factor(0.05, 0.1, 0.5) == 0.5
    assert lr_factor(0.3, 0.1, 0.5) == 1.0
    assert lr_factor(0.75, 0.1, 0.5) == 0.5
    assert lr_factor(1.0, 0.1, 0.5) == 0.0
    assert lr_factor(0.0, 0.0, 0.0) == 1.0


def test_rounding_errs_by_at_most_half_a_scale():
    torch.manual_seed(0)
    weight = torch.randn(4, 64)
    for bits, group in ((8, 0), (4, 32), (3, 16)):
        groups = weight.view(-1, group or 64)
        scale = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        error = (round_to_nearest(weight, bits, group).view_as(groups) - groups).abs()
        assert (error <= scale * 0.5001).all()


# ---- train


def test_the_loss_falls_and_the_log_says_so(dense):
    found = losses(dense)
    assert len(found) == 24
    assert found[0] == pytest.approx(math.log(320), abs=0.3)
    assert found[-1] < found[0] - 1.5
    record = json.loads((dense / "training.json").read_text())
    assert record["valid_loss"] < found[0] - 1.5
    assert record["tokens_seen"] == 24 * 4 * 32
    assert log_of(dense)[-1]["finished"] is True
    assert not (dense / "state.pt").exists()


def test_a_dense_model_opens_in_transformers_and_says_the_same(dense, work):
    theirs = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert len(AutoTokenizer.from_pretrained(dense)) == 320
    assert_same_logits(checkpoint.load_model(dense), theirs, work)


def test_a_sparse_model_opens_in_transformers_and_says_the_same(work):
    out = work.folder / "sparse"
    assert work.train(out, "--max-steps", 12, "--experts", 4, "--top-k", 2) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "MixtralForCausalLM"
    assert losses(out)[-1] < losses(out)[0] - 0.5
    assert all(row["aux"] >= 0.99 for row in log_of(out) if "aux" in row)  # 1.0 is an even load, the least there is
    assert_same_logits(checkpoint.load_model(out), theirs, work)


def assert_same_logits(ours, theirs, work):
    ids = torch.from_numpy(np.fromfile(work.valid, dtype=np.uint16)[:64].astype(np.int64)).view(2, 32)
    with torch.inference_mode():
        hidden, _ = ours.model(ids, torch.float32)
        logits = hidden @ ours.model.embed_tokens.weight.T
        torch.testing.assert_close(logits, theirs(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [[], ["--experts", 2, "--top-k", 1], ["--optimizer", "adamw", "--accumulate", 2]])
def test_a_resumed_run_equals_an_unbroken_one(work, tmp_path, more):
    clock = ["--tokens", 12 * 4 * 32, *more]
    assert work.train(tmp_path / "whole", *clock) == 0
    assert work.train(tmp_path / "parts", *clock, "--max-steps", 4) == 0
    assert (tmp_path / "parts/state.pt").exists()
    assert log_of(tmp_path / "parts")[-1]["finished"] is False
    # A run that was killed has logged what its state does not know.
    with (tmp_path / "parts/log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 99.0}\n')
    assert work.train(tmp_path / "parts", *clock, "--resume") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole.keys() | parts.keys())
    assert not (tmp_path / "parts/state.pt").exists()


def test_a_checkpoint_is_saved_on_the_way(work, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("train_tiny.train.save_state", lambda folder, state: saved.append(state["step"]))
    assert work.train(tmp_path / "out", "--max-steps", 3, "--save-minutes", 0, "--valid", work.valid) == 0
    assert saved == [1, 2, 3]
    assert [row["whole"] for row in log_of(tmp_path / "out") if "whole" in row] == [False, False, False, True]


def test_minutes_are_a_clock_too(work, tmp_path):
    assert work.train(tmp_path / "out", "--minutes", 0.001) == 0
    assert log_of(tmp_path / "out")[-1]["finished"] is True


def test_the_seed_decides_the_weights(work, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert work.train(tmp_path / name, "--max-steps", 2, "--seed", seed) == 0
    a, b, c = (weights(tmp_path / name)["model.embed_tokens.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_training_goes_on_from_a_checkpoint(dense, work, tmp_path):
    assert work.train(tmp_path / "out", "--init-from", dense, "--max-steps", 2, shape=[]) == 0
    assert losses(tmp_path / "out")[0] < losses(dense)[0] - 1.0


@pytest.mark.parametrize("divisor", [1, 2])
def test_an_upcycled_model_starts_equal_to_the_dense_one(dense, work, tmp_path, divisor):
    upcycle(dense, tmp_path / "up", experts=4, active=2, width_divisor=divisor)
    sparse = checkpoint.load_model(tmp_path / "up")
    ids = torch.from_numpy(np.fromfile(work.valid, dtype=np.uint16)[:32].astype(np.int64))[None]
    with torch.inference_mode():
        before, _ = checkpoint.load_model(dense).model(ids, torch.float32)
        after, _ = sparse.model(ids, torch.float32)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_an_upcycled_model_trains_and_keeps_its_routing(dense, work, tmp_path):
    upcycle(dense, tmp_path / "up", experts=4, active=2)
    out = tmp_path / "moe"
    more = ["--init-from", tmp_path / "up", "--top-k", 1, "--aux-coef", 0.05, "--max-steps", 2]
    assert work.train(out, *more, shape=[]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 1)
    assert config["router_aux_loss_coef"] == 0.05
    assert work.train(tmp_path / "again", "--init-from", out, "--top-k", 2, "--max-steps", 1, shape=[]) == 0
    assert json.loads((tmp_path / "again/config.json").read_text())["num_experts_per_tok"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's compiler uses its own past
def test_a_compiled_model_learns_the_same(work, tmp_path, dense):
    assert work.train(tmp_path / "out", "--max-steps", 24, "--compile", "--valid", work.valid) == 0
    assert losses(tmp_path / "out")[-1] == pytest.approx(losses(dense)[-1], abs=0.05)


@pytest.mark.gpu
def test_a_gpu_learns_about_the_same(work, tmp_path, dense):
    assert work.train(tmp_path / "out", "--max-steps", 24, "--device", "cuda", "--valid", work.valid) == 0
    assert losses(tmp_path / "out")[-1] == pytest.approx(losses(dense)[-1], abs=0.2)


# ---- evaluate


def test_evaluate_prints_loss_perplexity_and_bits(dense, work, capsys):
    capsys.readouterr()
    words = f"evaluate --model {dense} --text {work.short} --dtype fp32 --rtn --rtn-tokens 500 --loss-chunk 100"
    assert main(words.split()) == 0
    result = json.loads(capsys.readouterr().out)
    row = result["short.txt"]
    assert row["loss"] == pytest.approx(json.loads((dense / "training.json").read_text())["valid_loss"], abs=0.01)
    assert row["ppl"] == pytest.approx(math.exp(row["loss"]))
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / math.log(2) / row["bytes"])
    damage = result["rtn_ppl"]
    assert damage.keys() == {"none"} | {f"w{bits}_{scale}" for bits in (8, 4, 3) for scale in ("row", "group32")}
    assert damage["w8_group32"] == pytest.approx(damage["none"], rel=0.01)


def test_windows_of_any_length_add_up_to_the_whole_stream(dense, work, capsys):
    capsys.readouterr()
    seen = []
    for batch in (1, 5, 64):
        assert main(f"evaluate --model {dense} --text {work.short} --dtype fp32 --eval-batch {batch}".split()) == 0
        seen.append(json.loads(capsys.readouterr().out)["short.txt"])
    assert [row["tokens"] for row in seen] == [len(np.fromfile(work.valid, dtype=np.uint16)) - 1] * 3
    assert [row["loss"] for row in seen] == pytest.approx([seen[0]["loss"]] * 3)


# ---- what the user can mend


def fails(capsys, code):
    assert code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", b" \n", "holds no text"),
        ("empty.jsonl", b'{"text": " "}\n', "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("broken.txt.gz", b"no gzip", "cannot be read"),
        ("broken.txt.xz", b"no xz", "cannot be read"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "broken.jsonl:2: not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', 'other.jsonl:1: has no "text"'),
    ],
)
def test_text_that_cannot_be_used_is_named(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    err = fails(capsys, main(["tokenizer", "--text", str(tmp_path / name), "--out", str(tmp_path / "tok")]))
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--vocab 100", "--vocab 100: must be 272"),
        ("--vocab 70000", "--vocab 70000: must be 272"),
        ("--context 0", "--context 0"),
    ],
)
def test_an_impossible_tokenizer_is_refused(work, tmp_path, capsys, words, message):
    err = fails(capsys, main(["tokenizer", "--text", str(work.text), "--out", str(tmp_path / "t"), *words.split()]))
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--chat 2", "--chat 2.0: is a share"),
        ("--chat 0.5 --keep-order", "exclude each other"),
        ("--tokenizer nowhere", "nowhere/tokenizer.json does not exist"),
        ("--text books.txt*no", "'no' is not a count"),
        ("--out books.txt/sub/x.bin", "cannot be made"),
    ],
)
def test_an_impossible_pack_is_refused(work, capsys, monkeypatch, words, message):
    monkeypatch.chdir(work.folder)
    base = f"pack --text {work.text} --tokenizer {work.tokenizer} --out x.bin".split()
    assert message in fails(capsys, main([*base, *words.split()]))


def test_a_tokenizer_that_is_none_or_not_ours_is_refused(work, tmp_path, capsys):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    words = f"pack --text {work.text} --tokenizer {tmp_path} --out {tmp_path / 'x.bin'}".split()
    assert "is not a tokenizer" in fails(capsys, main(words))
    path.write_text((work.tokenizer / "tokenizer.json").read_text().replace("<|eos|>", "<|other|>"))
    assert "special tokens have the ids" in fails(capsys, main(words))


def test_a_tokenizer_with_ids_beyond_16_bits_is_refused(work, monkeypatch, capsys):
    monkeypatch.setattr("train_tiny.tokenizer.MAX_VOCAB", 300)
    words = f"pack --text {work.text} --tokenizer {work.tokenizer} --out {work.folder / 'x.bin'}"
    assert "do not fit 16-bit ids" in fails(capsys, main(words.split()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hidden 30", "multiple of 8"),
        ("--hidden 36", "multiple of 8"),
        ("--kv-heads 3", "3 KV heads do not divide 4 heads; allowed: [1, 2, 4]"),
        ("--layers 0", "num_layers 0: must be 1 or more"),
        ("--experts 2 --top-k 3", "top-k 3 of 2 experts"),
        ("--vocab 400", "the model has 400 vocabulary entries"),
        ("--max-steps 0", "else the run never stops"),
        ("--tokens -1", "--tokens -1.0: must be 0 or more"),
        ("--batch 0", "--batch 0: must be 1 or more"),
        ("--muon-lr 0", "--muon-lr 0.0: must be more than 0"),
        ("--warmup 0.7 --decay 0.6", "together at most 1"),
        ("--loss-chunk 0", "--loss-chunk 0"),
        ("--batch 100000", "give more text, a smaller --batch"),
        ("--data none.bin", "none.bin does not exist"),
        ("--data odd.bin", "is not a stream of 16-bit ids"),
        ("--data high.bin", "holds id 9999, the vocabulary has 320"),
        ("--valid one.bin", "holds no two tokens"),
        ("--tokenizer none", "none/tokenizer.json does not exist"),
        ("--init-from none", "none: not a checkpoint"),
        ("--resume", "there is no unfinished run to --resume"),
        ("--out books.txt/run", "cannot be made"),
        ("--adam-lr 1e30 --clip 1e30", "lower --muon-lr or --adam-lr"),
    ],
)
def test_an_impossible_run_is_refused(work, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(work.folder)
    Path("odd.bin").write_bytes(b"123")
    np.full(5000, 9999, dtype=np.uint16).tofile("high.bin")
    np.zeros(1, dtype=np.uint16).tofile("one.bin")
    shape = [] if "--init-from" in words else SHAPE
    assert message in fails(capsys, work.train(tmp_path / "out", "--max-steps", 3, *words.split(), shape=shape))


def test_a_folder_that_holds_a_run_is_not_overwritten(work, dense, tmp_path, capsys):
    assert "holds a finished checkpoint" in fails(capsys, work.train(dense, "--max-steps", 1))
    clock = ["--tokens", 5000, "--max-steps", 1]
    assert work.train(tmp_path / "out", *clock) == 0
    assert "holds an unfinished run" in fails(capsys, work.train(tmp_path / "out", *clock))


def test_a_run_resumed_with_other_settings_is_refused(work, tmp_path, capsys):
    clock = ["--tokens", 5000, "--max-steps", 1]
    assert work.train(tmp_path / "out", *clock) == 0
    err = fails(capsys, work.train(tmp_path / "out", *clock, "--resume", "--batch", 5, "--muon-lr", 0.5))
    assert "batch was 4, is 5" in err
    assert "muon_lr was 0.02, is 0.5" in err


def test_a_broken_or_foreign_state_is_refused(work, tmp_path, capsys):
    (tmp_path / "state.pt").write_bytes(b"nothing")
    assert "cannot be read" in fails(capsys, work.train(tmp_path, "--max-steps", 1, "--resume"))
    torch.save({"version": 0}, tmp_path / "state.pt")
    assert "version 0 is not 1" in fails(capsys, work.train(tmp_path, "--max-steps", 1, "--resume"))


def test_a_checkpoint_has_its_own_shape(work, dense, tmp_path, capsys):
    more = ["--init-from", dense, "--max-steps", 1]
    err = fails(capsys, work.train(tmp_path / "out", *more, "--layers", 3, shape=[]))
    assert "['num_layers']: the checkpoint of --init-from has its own" in err


def test_experts_come_from_upcycling_and_not_from_a_flag(work, dense, tmp_path, capsys):
    more = ["--init-from", dense, "--max-steps", 1, "--experts", 4]
    err = fails(capsys, work.train(tmp_path / "out", *more, shape=[]))
    assert "['num_experts']: the checkpoint of --init-from has its own" in err
    assert "`halve upcycle`" in err


def test_the_losses_of_a_router_are_those_of_their_papers():
    config = ModelConfig(hidden_size=8, intermediate_size=8, num_heads=1, num_kv_heads=1, num_experts=4, top_k=1)
    layer = SparseMlp(config)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    _, (balance, z) = layer(x)
    logits = x.reshape(-1, 8) @ layer.gate.weight.T
    probs = logits.softmax(-1)
    shares = torch.bincount(logits.argmax(-1), minlength=4) / 10
    torch.testing.assert_close(balance, 4 * (shares * probs.mean(0)).sum())
    torch.testing.assert_close(z, torch.log(logits.exp().sum(-1)).square().mean())


def test_routers_learn_at_a_rate_of_their_own(dense, work, tmp_path):
    upcycle(dense, tmp_path / "up", experts=4, active=2, width_divisor=2)
    for name, rate in (("slow", 1e-9), ("fast", 1e-2)):
        more = ["--init-from", tmp_path / "up", "--router-lr", rate, "--max-steps", 2]
        assert work.train(tmp_path / name, *more, shape=[]) == 0
    key = "model.layers.0.block_sparse_moe.gate.weight"
    up, slow, fast = (weights(tmp_path / name)[key] for name in ("up", "slow", "fast"))
    assert torch.equal(up.bfloat16(), slow)
    assert not torch.equal(up.bfloat16(), fast)


def test_the_z_loss_pulls_logits_together(dense, work, tmp_path):
    upcycle(dense, tmp_path / "up", experts=4, active=2)
    found = {}
    for weight in (0, 10):
        more = ["--init-from", tmp_path / "up", "--z-coef", weight, "--router-lr", 0.01, "--max-steps", 8]
        assert work.train(tmp_path / str(weight), *more, shape=[]) == 0
        found[weight] = [row["z"] for row in log_of(tmp_path / str(weight)) if "z" in row][-1]
    assert found[10] < found[0]


def test_files_that_contradict_each_other_are_refused(dense, tmp_path):
    save_file(weights(dense), tmp_path / "model.safetensors")
    config = json.loads((dense / "config.json").read_text())
    for change, message in (
        ({"num_hidden_layers": 3}, "disagree"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vocab_size"}))
    with pytest.raises(checkpoint.CheckpointError, match="has no 'vocab_size'"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--text books.txt ./books.txt", "are named twice"),
        ("--rtn --rtn-tokens 0", "--rtn-tokens 0"),
        ("--model none", "none/tokenizer.json does not exist"),
        ("--model mixed", "the tokenizer has 320 entries, the model 400"),
        ("--model narrow --rtn", "inputs, no multiple of 32"),
    ],
)
def test_an_impossible_evaluation_is_refused(work, dense, capsys, monkeypatch, words, message):
    monkeypatch.chdir(work.folder)
    sizes = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "context": 32, "intermediate_size": 32}
    for name, vocab, hidden in (("mixed", 400, 32), ("narrow", 320, 16)):
        model = Llama(ModelConfig(vocab_size=vocab, hidden_size=hidden, **sizes))
        checkpoint.save_model(model, Path(name), work.tokenizer, {})
    base = f"evaluate --model {dense} --text {work.text}".split()
    assert message in fails(capsys, main([*base, *words.split()]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_gpu_is_said(work, tmp_path, capsys):
    assert "no CUDA device here" in fails(capsys, work.train(tmp_path, "--max-steps", 1, "--device", "cuda"))


def test_wrong_usage_is_told_from_what_the_user_can_mend(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--no-such-flag"])
    assert stop.value.code == 2


def test_the_script_runs_as_a_folder():
    folder = Path(__file__).resolve().parents[2]
    command = [sys.executable, "scripts/train_tiny", "evaluate", "--help"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout


def test_every_command_in_the_docs_is_accepted():
    page = Path(__file__).resolve().parents[2] / "docs/TRAINING.md"
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    commands = [line.split("python $T ")[1] for line in lines if line.startswith("    python $T ")]
    assert len(commands) == 9
    for command in commands:
        make_parser().parse_args(shlex.split(command))
