"""Guessing ahead by `halve.load`: where guesses come from, and that answers stay the same."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace

import pytest

import halve
from halve.checkpoint import open_checkpoint
from halve.compress import apply_plan, uniform_plan
from halve.core.errors import CheckpointError, ConfigError
from halve.core.plan import Plan, Speculation
from halve.engine import EngineConfig
from halve.engine.sequence import Sequence
from halve.engine.speculative import Speculator
from halve.formats import FORMATS
from halve.kernels import native_library
from halve.models import load_config
from halve.models.embedded import embedded_model_path
from tests.api.tiny import make_model

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ kernels are not built")

STORY = "Once upon a time there was a little girl. There was a little girl, and"
LIST = "One cat, two cats, three cats. One dog, two dogs, three dogs. One bird, two"


def smaller(model, out):
    """The same model in int4, as a bundle."""
    out.mkdir()
    with open_checkpoint(model) as checkpoint:
        config = load_config(checkpoint)
        plan = uniform_plan(config, FORMATS["int4-g32"], "rtn", portable=False, source_bits=16)
        apply_plan(checkpoint, config, plan, out, energies=None)
    (out / "halve").mkdir(exist_ok=True)
    (out / "halve" / "plan.json").write_text(plan.to_json())
    return out


@pytest.fixture(scope="module")
def story_draft(tmp_path_factory):
    return smaller(embedded_model_path(), tmp_path_factory.mktemp("draft") / "smaller")


class Eager(Speculator):
    """Takes every guess, whether it pays or not."""

    def plan(self, sequences: Iterable[Sequence]) -> None:
        for one in sequences:
            most = min(self.max_tokens, one.max_tokens - one.num_tokens - 1)
            if one.num_pending == 1 and most > 0 and (guess := self.proposer.look(one, most)):
                one.num_drafts = guess.most


def answers(speculation, *, eager=True):
    """Greedy and sampled answers of the model that ships, told with what was guessed for them."""
    model = halve.load(embedded_model_path(), speculation=speculation, keep=False)
    core = model.engine._worker.core
    if eager and core.speculator:
        core.speculator = Eager(core.speculator.proposer, max_tokens=5)
    greedy = model.generate_all([STORY, LIST], max_tokens=40, ignore_eos=True)
    ways = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.05, "logprobs": 1}
    sampled = model.generate_all([STORY, LIST], max_tokens=40, n=2, seed=5, ignore_eos=True, **ways)
    core.check_invariants()
    model.close()
    return [*greedy, *sampled]


@pytest.fixture(scope="module")
def expected():
    return answers("off")


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_a_trained_model_says_the_same_token_for_token(method, expected, story_draft):
    found = answers(str(story_draft) if method == "draft" else method)
    assert [(one.token_ids, one.logprobs, one.text) for one in found] == [
        (one.token_ids, one.logprobs, one.text) for one in expected
    ]
    guessed, right = (sum(getattr(one, f"num_{what}_tokens") for one in found) for what in ("draft", "accepted"))
    assert guessed > 50
    assert right > (0.3 if method == "draft" else 0.1) * guessed


def test_nothing_is_guessed_unless_asked_for(expected):
    assert all(one.num_draft_tokens == 0 for one in expected)


def test_a_bundles_plan_says_where_guesses_come_from_and_a_word_says_otherwise(tiny, tmp_path):
    bundle = smaller(tiny, tmp_path / "bundle")
    draft = smaller(tiny, bundle / "draft")
    plan = Plan.from_json((bundle / "halve" / "plan.json").read_text())
    for speculation in (Speculation(method="ngram", max_tokens=3), Speculation(method="draft", path="draft")):
        raw = json.loads(plan.to_json())
        raw["speculation"] = {"method": speculation.method, "max_tokens": speculation.max_tokens}
        raw["speculation"] |= {"path": speculation.path, "version": 1}
        (bundle / "halve" / "plan.json").write_text(json.dumps(raw))
        chosen = halve.load(bundle, keep=False).engine.config.speculation
        assert (chosen.method, chosen.max_tokens) == (speculation.method, speculation.max_tokens)
        assert chosen.path == (str(draft) if speculation.path else None)
        assert halve.load(bundle, speculation="off", keep=False).engine.config.speculation == Speculation()
    given = Speculation(method="ngram", max_tokens=2)
    assert halve.load(tiny, speculation=given, keep=False).engine.config.speculation == given
    engine = EngineConfig(speculation=given)
    assert halve.load(bundle, engine=engine, keep=False).engine.config.speculation == given


def test_the_caches_of_both_models_share_the_memory(tiny, tmp_path):
    draft = str(smaller(tiny, tmp_path / "draft"))
    alone, together = (halve.load(tiny, speculation=s, cache_bytes=10**6, keep=False) for s in ("off", draft))
    assert together._num_blocks < alone._num_blocks < 2.1 * together._num_blocks
    prompt = list(range(5, 30))
    assert together.generate(prompt, max_tokens=9).token_ids == alone.generate(prompt, max_tokens=9).token_ids


def test_a_draft_with_another_vocabulary_or_other_tokens_is_refused_by_name(tiny, tmp_path):
    wider = make_model(tmp_path / "wider", vocab_size=320)
    with pytest.raises(
        ConfigError, match=r"draft .*wider: its vocabulary has 320 tokens, the model's 300; take a draft"
    ):
        halve.load(tiny, speculation=str(wider))
    other = shutil.copytree(tiny, tmp_path / "other")
    raw = json.loads((other / "tokenizer.json").read_text())
    pieces = raw["model"]["vocab"]
    first, second = sorted(pieces, key=pieces.get)[10:12]
    pieces[first], pieces[second] = pieces[second], pieces[first]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    where = f"where token 10 is {second!r}, not {first!r}"
    with pytest.raises(ConfigError, match=r"draft .*other: it has another tokenizer") as error:
        halve.load(tiny, speculation=str(other))
    assert where in str(error.value)


def test_a_draft_that_is_not_there_is_refused(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        halve.load(tiny, speculation=str(tmp_path / "nowhere"))


def test_a_bundle_that_lost_its_draft_says_so_and_how_to_go_on(tiny, tmp_path):
    out = smaller(tiny, tmp_path / "bundle")
    plan = Plan.from_json((out / "halve/plan.json").read_text())
    plan = replace(plan, speculation=Speculation(method="draft", path="draft"))
    (out / "halve/plan.json").write_text(plan.to_json())
    with pytest.raises(ConfigError, match=r"guesses by the draft 'draft', which is not there.*--speculate off"):
        halve.load(out, keep=False)
    assert halve.load(out, keep=False, speculation="off").generate("a", max_tokens=2).token_ids
