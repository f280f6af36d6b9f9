import pytest

from halve.checkpoint.files import exists, parse_object, read_object, shown
from halve.core.errors import CheckpointError


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": [1, 2.5, null]}')
    assert read_object(tmp_path / "a.json") == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[]", r"where: expected a JSON object, got \[\]; the file is damaged"),
        (b"{", "where: not JSON"),
        (b"", "where: not JSON"),
        (b'{"a": 1, "a": 1}', "duplicate keys"),
        (b'{"a": Infinity}', "Infinity is not a JSON number"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_what_is_no_object_is_refused(raw, words):
    with pytest.raises(CheckpointError, match=words):
        parse_object(raw, "where")


def test_a_file_that_the_system_refuses_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory; check the path"):
        read_object(tmp_path)


def test_a_path_that_the_system_refuses_is_named(tmp_path):
    assert exists(tmp_path)
    assert not exists(tmp_path / "no")
    for path in (tmp_path / ("x" * 5000), tmp_path / "a\0b"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            exists(path)


def test_long_values_are_cut():
    assert shown("ab") == "'ab'"
    assert len(shown("a" * 10_000)) == 120
