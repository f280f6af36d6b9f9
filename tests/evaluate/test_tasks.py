"""Files of questions: what each kind asks, and what is wrong with a line, by name."""

import gzip
import json

import pytest

from halve.core.errors import DataError
from halve.evaluate.tasks import Question, number_in, read_task
from tests.docs.pages import ROOT

SHARED = next((p / "shared/data/tasks" for p in ROOT.parents if (p / "shared/data").is_dir()), ROOT / "no-shared")


def write(path, *lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


KINDS = {
    "own choices": (
        {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1, "id": "a"},
        Question(prompt="2 + 2 =", choices=(" 3", " 4"), answer=1),
    ),
    "a joiner": (
        {"prompt": "答え：", "choices": ["三", "四"], "answer": 1, "joiner": ""},
        Question(prompt="答え：", choices=("三", "四"), answer=1),
    ),
    "a prompt that ends in space": (
        {"prompt": "2 + 2 = ", "choices": ["3", "4"], "answer": 0},
        Question(prompt="2 + 2 = ", choices=("3", "4"), answer=0),
    ),
    "own answer": ({"prompt": "2 + 2 =", "answer": "4"}, Question(prompt="2 + 2 =", choices=(), answer="4")),
    "last word": ({"text": "I see the sea"}, Question(prompt="I see the", choices=(" sea",), answer=0)),
    "arc": (
        {"query": "Question: Why?", "choices": ["So.", "No."], "gold": 1},
        Question(prompt="Question: Why?\nAnswer:", choices=(" So.", " No."), answer=1),
    ),
    "hellaswag": (
        {"ctx": "A man. he", "endings": ["sits.", "flies."], "label": 0},
        Question(prompt="A man. he", choices=(" sits.", " flies."), answer=0),
    ),
    "jcommonsenseqa": (
        {"q_id": 3, "question": "何？", "choice0": "犬", "choice1": "猫", "label": 1},
        Question(prompt="質問：何？\n回答：", choices=("犬", "猫"), answer=1),
    ),
    "mmlu": (
        {"subject": "x", "question": "Two?", "choices": ["1", "2", "3"], "answer": "B"},
        Question(prompt="Question: Two?\nAnswer:", choices=(" 1", " 2", " 3"), answer=1),
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "9 * 2 = 18\n#### 1,018"},
        Question(prompt="Question: How many?\nAnswer:", choices=(), answer="1,018"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_of_each_kind_becomes_a_question(tmp_path, kind):
    line, question = KINDS[kind]
    task = read_task(write(tmp_path / "mine.jsonl", line))
    assert task.questions == (question,)
    assert task.name == "mine"
    assert (task.chance is not None) == (task.kind == "choice")


@pytest.mark.parametrize(
    ("name", "count", "chance"),
    [
        ("arc_easy.jsonl.gz", 2376, 0.25),
        ("hellaswag_val.jsonl.gz", 10042, 0.25),
        ("lambada_test.jsonl.gz", 5153, None),
        ("jmmlu.jsonl.gz", 7096, 0.25),
        ("jglue/jcommonsenseqa_valid.json.gz", 1119, 0.2),
        ("gsm8k/test.jsonl.gz", 1319, None),
    ],
)
def test_published_files_are_read(name, count, chance):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    task = read_task(path)
    assert len(task.questions) == count
    assert task.chance == (None if chance is None else pytest.approx(chance, abs=0.002))


def test_a_sample_does_not_depend_on_the_order_of_the_file(tmp_path):
    lines = [{"prompt": f"{i} =", "choices": [str(i), str(i + 1)], "answer": 0} for i in range(30)]
    one = read_task(write(tmp_path / "a.jsonl", *lines)).first(7)
    other = read_task(write(tmp_path / "a.jsonl", *reversed(lines))).first(7)
    assert one == other
    assert len(one.questions) == 7


def test_packed_files_have_the_name_of_what_is_in_them(tmp_path):
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a b"}\n'))
    assert read_task(tmp_path / "t.jsonl.gz").name == "t"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([1], "a question is a JSON object"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, r"the answer is 2; it is the number of a choice, 0 to 1"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "the answer is True"),
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "a list of two or more texts"),
        ({"prompt": "a", "choices": ["b", " "], "answer": 0}, "none empty"),
        ({"prompt": " ", "choices": ["b", "c"], "answer": 0}, "`prompt` is ' '; it is text, not empty"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 0, "joiner": 1}, "`joiner` is 1"),
        ({"prompt": "a", "answer": "b", "weight": 2}, r"keys \['answer', 'prompt', 'weight'\] are of no kind"),
        ({"text": "word"}, "`text` is one word"),
        ({"question": "a", "choices": ["b", "c"], "answer": "D"}, "it is one letter, A to B"),
        ({"question": "a", "answer": "#### none"}, "no number behind `####`"),
        ({"question": "a", "choice0": "b", "choice2": "c", "label": 0}, r"numbered \[0, 2\]"),
    ],
)
def test_a_line_that_is_not_by_the_rules_is_named(tmp_path, line, message):
    with pytest.raises(DataError, match=message) as error:
        read_task(write(tmp_path / "t.jsonl", line))
    assert "t.jsonl:1" in str(error.value)


def test_kinds_are_not_mixed(tmp_path):
    path = write(tmp_path / "t.jsonl", {"text": "a b"}, {"prompt": "a", "answer": "b"})
    with pytest.raises(DataError, match=r"t\.jsonl:2: a question of another kind"):
        read_task(path)


def test_broken_json_missing_and_empty_files_are_named(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a b"}\n{"text": ')
    with pytest.raises(DataError, match=r"t\.jsonl:2: not JSON"):
        read_task(tmp_path / "t.jsonl")
    with pytest.raises(DataError, match="does not exist; give a file of questions"):
        read_task(tmp_path / "no.jsonl")
    (tmp_path / "t.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no questions"):
        read_task(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $18 every day.", 18),
        ("#### 18", 18),
        ("so 5, then\n#### -1,234.5 and 7", -1234.5),
        ("The answer is .5", 0.5),
        ("none", None),
        ("3 apples and 4 pears", 4),
        ("####", None),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert number_in(text) == number


def test_written_answers_are_compared_by_what_they_say(tmp_path):
    task = read_task(write(tmp_path / "t.jsonl", {"prompt": "capital of France?", "answer": "Paris."}))
    (question,) = task.questions
    assert task.is_right(question, "  paris\n")
    assert not task.is_right(question, "Paris, France")
    numbers = read_task(write(tmp_path / "n.jsonl", {"question": "?", "answer": "#### 1,018"}))
    assert numbers.is_right(numbers.questions[0], "That is $1018.00 in all.")
    assert not numbers.is_right(numbers.questions[0], "I do not know.")


def test_a_question_whose_choices_are_all_the_same_is_left_out(tmp_path, caplog):
    same = {"prompt": "a", "choices": ["b", "b"], "answer": 0}
    task = read_task(write(tmp_path / "t.jsonl", same, {"prompt": "a", "choices": ["b", "c", "b"], "answer": 2}))
    assert len(task.questions) == 1
    assert "left out 1 questions" in caplog.text
    with pytest.raises(DataError, match="nothing is asked"):
        read_task(write(tmp_path / "t.jsonl", same))
