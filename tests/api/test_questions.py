"""Tasks beside the text: the same questions to both models."""

import json
import shutil

import pytest

import halve
from halve.core.errors import CheckpointError, ConfigError, DataError, QualityError
from tests.api.tiny import words
from tests.tools import not_of_time


def write(path, count, numbers=range(2)):
    """Questions over the words of the tiny model; which choice is right goes round."""
    lines = [
        {"prompt": words(i, 3 + i % 5), "choices": [words(100 + i, 2), words(200 + i, 3)],
         "answer": numbers[i % len(numbers)]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))
    return f"tasks={path}"


def test_both_models_are_asked_and_the_certificate_says_what_changed(tiny, text, tmp_path):
    asked = write(tmp_path / "mine.jsonl", 60)
    made = halve.optimize(tiny, tmp_path / "out", format="int8", calibration=text, quality=[asked], task_margin="30%")
    [task] = made.certificate.tasks
    assert (task.name, task.kind, task.num_items, task.chance) == ("mine", "choice", 60, 0.5)
    assert task.non_inferior is True
    assert task.difference.value == pytest.approx(task.accuracy.value - task.original_accuracy.value)
    assert made.certificate.quality.tasks == {"mine": task.accuracy}
    assert f"--quality {asked} --task-margin 30%" in made.certificate.inputs.command
    raw = json.loads((made.path / "halve/certificate.json").read_text())
    assert raw["tasks"][0]["sha256"] == task.sha256


def test_a_margin_that_is_not_held_leaves_nothing_behind(tiny, text, tmp_path):
    asked = write(tmp_path / "mine.jsonl", 60)
    with pytest.raises(QualityError, match=r"more than the margin of 5\.0%"):
        halve.optimize(tiny, tmp_path / "out", format="int2-g32", calibration=text, quality=[asked], task_margin="5%")
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_asked_is_refused_before_anything_runs(tiny, text, tmp_path):
    few = write(tmp_path / "few.jsonl", 10)
    for quality, margin, error, message in (
        ([few], "1%", DataError, r"10 questions can't show a loss of at most 0\.01.*needed"),
        (["bleu"], None, ConfigError, "'bleu' is not known"),
        (["tasks=/nowhere.jsonl"], None, DataError, "does not exist"),
        ([few, few], None, ConfigError, "rename a file"),
        ([], "1%", ConfigError, "there are no tasks"),
    ):
        with pytest.raises(error, match=message):
            halve.optimize(tiny, tmp_path / "out", format="int8", calibration=text, quality=quality, task_margin=margin)


@pytest.fixture(scope="module")
def asked(tiny, text, tmp_path_factory):
    """A bundle with sixty questions, and their file."""
    folder = tmp_path_factory.mktemp("asked")
    word = write(folder / "mine.jsonl", 60)
    made = halve.optimize(tiny, folder / "out", format="int8", calibration=text, quality=[word], task_margin="30%")
    return made, folder / "mine.jsonl"


def test_verify_asks_the_questions_again_that_the_bundle_keeps(asked, tiny):
    made, _ = asked
    result = halve.verify(made.path, against=tiny)
    assert not_of_time(result.differences) == []
    assert result.certificate.tasks == made.certificate.tasks
    assert result.certificate.quality.tasks.keys() == {"mine"}


def test_questions_that_are_gone_or_others_are_told(asked, tiny, tmp_path):
    made, file = asked
    bundle = shutil.copytree(made.path, tmp_path / "bundle")
    (bundle / "halve/tasks/mine.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"task 'mine' are not in the bundle; give their file by --tasks"):
        halve.verify(bundle, against=tiny)
    write(tmp_path / "mine.jsonl", 61)
    with pytest.raises(CheckpointError, match="not the questions that were asked"):
        halve.verify(bundle, against=tiny, tasks=[tmp_path / "mine.jsonl"])
    write(tmp_path / "other.jsonl", 60)
    with pytest.raises(ConfigError, match="'other' was not asked"):
        halve.verify(bundle, against=tiny, tasks=[tmp_path / "other.jsonl"])
    assert not_of_time(halve.verify(bundle, against=tiny, tasks=[file]).differences) == []


def test_an_accuracy_that_was_edited_is_said(asked, tiny, tmp_path):
    made, _ = asked
    bundle = shutil.copytree(made.path, tmp_path / "bundle")
    path = bundle / "halve/certificate.json"
    raw = json.loads(path.read_text())
    raw["tasks"][0]["accuracy"]["value"] = 1.0
    path.write_text(json.dumps(raw))
    found = halve.verify(bundle, against=tiny).differences
    assert any(line.startswith("tasks.mine.accuracy: recorded 1, now 0.") for line in found)
    assert "tasks.mine.accuracy: does not follow from its 60 questions" in found


def test_without_kept_text_questions_are_not_kept_either(tiny, text, tmp_path):
    word = write(tmp_path / "mine.jsonl", 20)
    made = halve.optimize(
        tiny, tmp_path / "out", format="int8", method="rtn", calibration=text, quality=[word], keep_text=False
    )
    assert not (made.path / "halve/tasks").exists()
