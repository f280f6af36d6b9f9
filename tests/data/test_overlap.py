"""Text that was seen, whole or in part, is found; text that was not is left alone."""

import random

import pytest

from halve.core.errors import DataError
from halve.data import Document, overlap
from halve.data.overlap import Fingerprint, require_unseen, without_seen


def words(seed, count):
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(count))


SEEN = [Document(text=words(seed, 300)) for seed in range(20)]
OTHERS = [Document(text=words(100 + seed, 300)) for seed in range(20)]


def test_other_text_is_not_seen():
    assert without_seen(OTHERS, Fingerprint.of(SEEN)) == OTHERS


@pytest.mark.parametrize(
    "text",
    [
        SEEN[3].text,
        SEEN[3].text.upper().replace(" ", "\n"),  # case and white space don't count
        " ".join(SEEN[3].text.split()[100:]),  # a part of it
        f"{words(999, 4000)} {' '.join(SEEN[3].text.split()[50:190])} {words(998, 4000)}",  # a page in a long document
        " ".join(w if i % 90 else "new" for i, w in enumerate(SEEN[3].text.split())),  # words changed here and there
    ],
    ids=["whole", "other case", "part", "pasted", "edited"],
)
@pytest.mark.parametrize("most", [1 << 16, 2000], ids=["all runs", "thinned"])
def test_text_that_was_seen_is_found(text, most, monkeypatch):
    monkeypatch.setattr(overlap, "MOST_RUNS", most)
    seen = Fingerprint.of(SEEN)
    document = Document(text=text)
    assert seen.holds(document)
    with pytest.raises(DataError, match=r"sealed text: document 2 .* holds text that calibration or search saw"):
        require_unseen([OTHERS[0], document], seen, "sealed text")


def test_a_phrase_that_people_repeat_is_no_leak():
    phrase = " ".join(SEEN[0].text.split()[:30])
    assert not Fingerprint.of(SEEN).holds(Document(text=f"{words(701, 200)} {phrase} {words(801, 200)}"))


def test_short_documents_are_seen_whole_only():
    seen = Fingerprint.of([Document(text="one two three")])
    assert seen.holds(Document(text="One two three"))
    assert not seen.holds(Document(text="one two four"))


def test_a_fingerprint_comes_back_from_its_file():
    seen = Fingerprint.of(SEEN)
    again = Fingerprint.from_json(seen.to_json(), "seen.json")
    assert again.thinning == seen.thinning
    assert (again.runs == seen.runs).all()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_words": 24, "thinning": 1, "runs": "?"}'])
def test_a_file_that_is_no_fingerprint_is_named(text):
    with pytest.raises(DataError, match=r"seen\.json: no fingerprint of text"):
        Fingerprint.from_json(text, "seen.json")


def test_a_fingerprint_of_other_runs_is_refused():
    with pytest.raises(DataError, match="this Halve reads runs of 24"):
        Fingerprint.from_json('{"run_words": 8, "thinning": 1, "runs": ""}', "seen.json")
