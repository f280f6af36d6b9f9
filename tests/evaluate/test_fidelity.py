import itertools
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import DataError, OutputError, QualityError
from halve.evaluate import MINIMUM, PairedScores, compare, fidelity, quality, require_enough, windows


class Table:
    """A model whose logits depend on the last token only, given out in chunks of `rows`."""

    def __init__(self, logits, rows=1000):
        self.table = np.asarray(logits, np.float32)
        self.vocab_size = self.table.shape[1]
        self.rows = rows

    def logits(self, tokens):
        for start in range(0, len(tokens), self.rows):
            yield self.table[tokens[start : start + self.rows]]


def pair(vocab_size=11, noise=0.3, seed=0, rows=(1000, 1000)):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(vocab_size, vocab_size)) * 3
    return Table(logits, rows[0]), Table(logits + noise * random.normal(size=logits.shape), rows[1])


def texts(*lengths, vocab_size=11, seed=1):
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab_size, length).astype(np.int32) for length in lengths]


def direct(original, smaller, document):
    """KL, flip and both nll of one document in float64, from the definitions, one token at a time."""
    rows = []
    for last, token in itertools.pairwise(document):
        p, q = (np.exp(m.table[last].astype(np.float64)) for m in (original, smaller))
        p, q = p / p.sum(), q / q.sum()
        rows.append(((p * np.log(p / q)).sum(), p.argmax() != q.argmax(), -np.log(p[token]), -np.log(q[token])))
    return np.array(rows)


# --- windows ---


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(2, 20))
def test_every_token_but_the_first_is_predicted_exactly_once(length, window_tokens):
    cut = windows(np.arange(length), window_tokens)
    assert all(2 <= len(window) <= window_tokens for window in cut)
    assert [token for window in cut for token in window[1:]] == list(range(1, length))
    assert all((np.diff(window) == 1).all() for window in cut)


def test_a_window_of_one_token_is_refused():
    with pytest.raises(QualityError, match="window_tokens: 1 leaves nothing to predict; take at least 2"):
        windows(np.arange(5), 1)


# --- compare ---


@pytest.mark.parametrize("rows", [(1000, 1000), (1, 7), (5, 3), (7, 2)])
@pytest.mark.parametrize("block_elements", [1, 40, 2**18])
def test_scores_agree_with_a_direct_computation_however_logits_are_chunked(rows, block_elements, monkeypatch):
    monkeypatch.setattr(fidelity, "_BLOCK_ELEMENTS", block_elements)
    models, documents = pair(rows=rows), texts(40, 2, 17)
    scores = compare(*models, documents, window_tokens=8)
    expected = np.concatenate([direct(*models, document) for document in documents])
    # Kept in float32: half a unit in the last of 24 bits.
    np.testing.assert_allclose(scores.kl, expected[:, 0], rtol=1e-7, atol=1e-12)
    np.testing.assert_array_equal(scores.flip, expected[:, 1])
    np.testing.assert_allclose(scores.nll_original, expected[:, 2], rtol=1e-7)
    np.testing.assert_allclose(scores.nll_smaller, expected[:, 3], rtol=1e-7)
    assert scores.document.tolist() == [0] * 39 + [1] + [2] * 16


def test_a_kl_far_below_float32_resolution_of_the_logits_is_still_right():
    logits = np.full((4, 4), 50.0, np.float32)
    logits[:, 0] = 51.0
    moved = logits.copy()
    moved[:, 1] += np.float32(2**-12)
    models = Table(logits), Table(moved)
    expected = direct(*models, np.array([0, 1]))[0, 0]
    assert 0 < expected < 1e-7
    scores = compare(*models, [np.array([0, 1])], window_tokens=4)
    np.testing.assert_allclose(scores.kl, [expected], rtol=1e-4)


def test_logits_of_a_thousand_do_not_overflow():
    logits = np.array([[1000.0, 0.0], [0.0, 1000.0]])
    scores = compare(Table(logits), Table(-logits), [np.array([0, 1])], window_tokens=4)
    assert scores.kl.tolist() == [1000.0]
    assert scores.nll_original.tolist() == [1000.0]
    assert scores.nll_smaller.tolist() == [0.0]


def test_equal_largest_logits_are_no_flip():
    tied = Table(np.zeros((3, 3)))
    assert not compare(tied, Table(np.zeros((3, 3))), [np.array([0, 1, 2])], window_tokens=4).flip.any()


def test_a_model_against_itself_is_exactly_equal():
    original, _ = pair()
    figures = quality(compare(original, Table(original.table, rows=3), texts(30, 50, 9), window_tokens=16))
    for figure in (figures.kl_mean, figures.kl_p99, figures.flip_rate):
        assert (figure.low, figure.value, figure.high) == (0.0, 0.0, 0.0)
    assert (figures.ppl_ratio.low, figures.ppl_ratio.value, figures.ppl_ratio.high) == (1.0, 1.0, 1.0)


def test_documents_with_nothing_to_predict_are_said_and_keep_their_number(caplog):
    with caplog.at_level(logging.WARNING, "halve.evaluate"):
        scores = compare(*pair(), texts(3, 1, 0, 4), window_tokens=8)
    assert "2 of 4 documents have fewer than two tokens" in caplog.text
    assert scores.document.tolist() == [0, 0, 3, 3, 3]
    assert quality(scores).num_documents == 2


def test_comparing_no_documents_gives_no_scores():
    scores = compare(*pair(), [], window_tokens=8)
    assert len(scores.kl) == len(scores.document) == 0


def test_progress_counts_predicted_tokens():
    calls = []
    compare(*pair(), texts(9, 3), window_tokens=5, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(4, 10), (8, 10), (10, 10)]


def test_different_vocabularies_are_refused():
    with pytest.raises(QualityError, match="vocabularies differ: 11 in the original, 12 in the smaller"):
        compare(pair()[0], pair(12)[0], texts(5), window_tokens=4)


@pytest.mark.parametrize("token", [-1, 11])
def test_a_token_outside_the_vocabulary_names_the_document(token):
    with pytest.raises(QualityError, match=r"document 2: tokens .* leave the vocabulary of 11"):
        compare(*pair(), [*texts(5), np.array([3, token])], window_tokens=4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("broken", ["original", "smaller"])
def test_logits_that_are_not_finite_name_document_and_model(value, broken):
    models = dict(zip(("original", "smaller"), pair(), strict=True))
    models[broken].table[7, 2] = value
    documents = [np.array([1, 2, 3]), np.array([4, 7, 5])]
    with pytest.raises(QualityError, match=f"document 2, {broken}: logits hold NaN or infinity"):
        compare(**models, documents=documents, window_tokens=4)


class Rows(Table):
    """A source that gives `extra` more (or fewer) rows than there are tokens, in chunks of `rows`."""

    def __init__(self, table, extra, rows):
        super().__init__(table, rows)
        self.extra = extra

    def logits(self, tokens):
        return super().logits(np.resize(tokens, len(tokens) + self.extra))


@pytest.mark.parametrize("extra", [-1, 1, 5])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("first", [True, False])
def test_a_source_must_give_one_row_for_each_token(extra, rows, first):
    good, other = pair()
    wrong = Rows(other.table, extra, rows)
    with pytest.raises(QualityError, match="rows of logits for 6 tokens, expected one each"):
        compare(*([wrong, good] if first else [good, wrong]), texts(6), window_tokens=8)


def test_logits_of_another_width_are_refused():
    good, wrong = pair()
    wrong.vocab_size = 11
    wrong.table = wrong.table[:, :-1]
    with pytest.raises(QualityError, match=r"logits of shape \[6, 10\], expected \[tokens, 11\]"):
        compare(good, wrong, texts(6), window_tokens=8)


# --- scores on disk ---


def test_scores_are_read_back_the_same(tmp_path):
    scores = compare(*pair(), texts(9, 5), window_tokens=8)
    scores.save(tmp_path / "scores.npz")
    again = PairedScores.load(tmp_path / "scores.npz")
    for name in ("kl", "flip", "nll_original", "nll_smaller", "document"):
        one, other = getattr(scores, name), getattr(again, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_scores_that_are_broken_are_refused(tmp_path):
    path = tmp_path / "scores.npz"
    with pytest.raises(QualityError, match="no scores of Halve"):
        PairedScores.load(path)
    for content in (b"", b"text", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(QualityError, match="no scores of Halve"):
            PairedScores.load(path)
    np.savez(path, kl=np.zeros(3, np.float32))
    with pytest.raises(QualityError, match="no scores of Halve"):
        PairedScores.load(path)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(QualityError, match="no scores of Halve"):
        PairedScores.load(tmp_path / "plain.npy")
    good = {"kl": "f4", "flip": "b1", "nll_original": "f4", "nll_smaller": "f4", "document": "i4"}
    np.savez(path, **{name: np.zeros(3 if name != "kl" else 4, kind) for name, kind in good.items()})
    with pytest.raises(QualityError, match=r"kl is float32 \[4\], expected float32 \[3\]"):
        PairedScores.load(path)
    np.savez(path, **{name: np.zeros(3, kind if name != "flip" else "i8") for name, kind in good.items()})
    with pytest.raises(QualityError, match=r"flip is int64 \[3\], expected bool \[3\]"):
        PairedScores.load(path)


def test_scores_are_only_written_where_they_can_be_read_back(tmp_path):
    scores = compare(*pair(), texts(5), window_tokens=8)
    with pytest.raises(OutputError, match=r"give a name that ends in \.npz"):
        scores.save(tmp_path / "scores")
    with pytest.raises(OutputError, match="can't be written"):
        scores.save(tmp_path / "no" / "scores.npz")


# --- quality ---


def test_figures_are_ratios_of_sums_over_all_tokens():
    scores = compare(*pair(), texts(40, 5, 17), window_tokens=16)
    figures = quality(scores, num_resamples=200)
    np.testing.assert_allclose(figures.kl_mean.value, scores.kl.astype(np.float64).mean(), rtol=1e-12)
    np.testing.assert_allclose(figures.flip_rate.value, scores.flip.mean(), rtol=1e-12)
    perplexity = [np.exp(nll.astype(np.float64).mean()) for nll in (scores.nll_smaller, scores.nll_original)]
    np.testing.assert_allclose(figures.ppl_ratio.value, perplexity[0] / perplexity[1], rtol=1e-12)
    assert figures.kl_p99.value == scores.kl.max()  # 1 % of 59 tokens is less than one token
    assert (figures.num_documents, figures.num_tokens, figures.confidence) == (3, 59, 0.95)
    assert {m.n for m in (figures.kl_mean, figures.kl_p99, figures.flip_rate, figures.ppl_ratio)} == {3}


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others():
    scores = compare(*pair(), texts(*[30] * 12), window_tokens=16)
    assert quality(scores, seed=3) == quality(scores, seed=3)
    assert quality(scores, seed=3).kl_mean.high != quality(scores, seed=4).kl_mean.high


def test_one_document_has_no_interval():
    with pytest.raises(QualityError, match="1 documents with tokens to predict; an interval needs at least 2"):
        quality(compare(*pair(), texts(40, 1), window_tokens=16))


# --- enough text ---


@pytest.mark.parametrize("split_name", ["calibration", "selection", "sealed"])
def test_a_split_that_just_holds_enough_passes(split_name):
    least = MINIMUM[split_name]
    lengths = [least.tokens // least.documents + 1] * least.documents
    require_enough([np.zeros(n, np.int32) for n in lengths], split_name)
    with pytest.raises(DataError, match=f"{split_name} text: {least.documents} documents with {least.tokens - 1} tok"):
        require_enough([np.zeros(n, np.int32) for n in [lengths[0] - 1, *lengths[1:]]], split_name)


def test_documents_of_one_token_do_not_count_towards_enough():
    few = [np.zeros(1000, np.int32)] * 19 + [np.zeros(1, np.int32)] * 50
    with pytest.raises(DataError, match=r"sealed text: 19 documents with 18981 .* needed are 20 documents and 2000"):
        require_enough(few, "sealed")
