"""Records to JSON and back: what is refused is named with its path."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.core.errors import ConfigError
from halve.core.record import from_dict, from_json, parse_json, to_dict, to_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    name: str
    size: int = 0
    share: float = 0.5
    kind: Literal["a", "b", 1] = "a"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    leaves: tuple[Leaf, ...]
    flag: bool = False
    limit: float | None = None
    either: int | str = 0
    best: Leaf | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    anything: Any = None
    version: int = 1


TREE = Tree(
    leaves=(Leaf(name="x", size=3), Leaf(name="ü", kind=1)),
    flag=True,
    limit=1.5,
    either="word",
    best=Leaf(name="y"),
    counts={"a": 1},
    anything=[1, {"deep": None}],
)


def test_a_record_survives_json():
    assert from_json(Tree, to_json(TREE)) == TREE
    assert from_dict(Tree, to_dict(TREE)) == TREE


def test_json_text_is_indented_and_keeps_letters_as_they_are():
    text = to_json(Leaf(name="naïve 日本"))
    assert text.startswith('{\n  "name": "naïve 日本"')
    assert text.endswith("}\n")


def test_keys_that_have_defaults_may_be_left_out():
    assert from_json(Tree, '{"leaves": [{"name": "x"}]}') == Tree(leaves=(Leaf(name="x"),))


finite = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.builds(
    Leaf, name=st.text(), size=st.integers(), share=finite, kind=st.sampled_from(["a", "b", 1])
)  # whole numbers of any size are exact in JSON
trees = st.builds(
    Tree,
    leaves=st.lists(leaves, max_size=3).map(tuple),
    flag=st.booleans(),
    limit=st.none() | finite,
    either=st.integers() | st.text(),
    best=st.none() | leaves,
    counts=st.dictionaries(st.text(), st.integers(), max_size=3),
)


@given(trees)
def test_every_record_survives_json(tree):
    assert from_json(Tree, to_json(tree)) == tree


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, r"^tree: missing keys \['leaves'\]$"),
        ({"leaves": [], "leafs": 1, "flags": 2}, r"^tree: unknown keys \['flags', 'leafs'\]; known keys are \['any"),
        ({"leaves": [{"name": "x"}, {"name": "y", "siz": 1}]}, r"^tree\.leaves\[1\]: unknown keys \['siz'\]"),
        ({"leaves": [{}]}, r"^tree\.leaves\[0\]: missing keys \['name'\]"),
        ({"leaves": [], "best": {"size": 1}}, r"^tree\.best: missing keys \['name'\]"),
        ([], r"^tree: expected an object, got \[\]"),
        (None, r"^tree: expected an object, got None"),
        ({"leaves": {}}, r"^tree\.leaves: expected a list, got \{\}"),
        ({"leaves": "abc"}, r"^tree\.leaves: expected a list, got 'abc'"),
        ({"leaves": [3]}, r"^tree\.leaves\[0\]: expected an object, got 3"),
        ({"leaves": [{"name": 3}]}, r"^tree\.leaves\[0\]\.name: expected str, got 3"),
        ({"leaves": [{"name": "x", "size": True}]}, r"leaves\[0\]\.size: expected int, got True"),
        ({"leaves": [{"name": "x", "size": 1.0}]}, r"leaves\[0\]\.size: expected int, got 1\.0"),
        ({"leaves": [{"name": "x", "share": True}]}, r"leaves\[0\]\.share: expected float, got True"),
        ({"leaves": [{"name": "x", "share": "1"}]}, r"leaves\[0\]\.share: expected float, got '1'"),
        ({"leaves": [{"name": "x", "share": None}]}, r"leaves\[0\]\.share: expected float, got None"),
        ({"leaves": [{"name": "x", "kind": "c"}]}, r"leaves\[0\]\.kind: 'c' is not one of \['a', 'b', 1\]"),
        ({"leaves": [{"name": "x", "kind": True}]}, r"leaves\[0\]\.kind: True is not one of"),
        ({"leaves": [{"name": "x", "kind": 1.0}]}, r"leaves\[0\]\.kind: 1\.0 is not one of"),
        ({"leaves": [{"name": "x", "kind": []}]}, r"leaves\[0\]\.kind: \[\] is not one of"),
        ({"leaves": [], "flag": 1}, r"^tree\.flag: expected bool, got 1"),
        ({"leaves": [], "limit": "x"}, r"^tree\.limit: expected float, got 'x'"),
        ({"leaves": [], "either": 1.5}, r"^tree\.either: expected str, got 1\.5"),
        ({"leaves": [], "counts": []}, r"^tree\.counts: expected an object, got \[\]"),
        ({"leaves": [], "counts": {"a": "1"}}, r"^tree\.counts\.a: expected int, got '1'"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(raw, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Tree, raw)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)])
def test_a_float_that_is_not_finite_or_too_large_is_refused(value):
    with pytest.raises(ConfigError, match=r"^tree\.limit: expected a finite number, got"):
        from_dict(Tree, {"leaves": [], "limit": value})


def test_a_whole_number_stands_for_a_float_and_becomes_one():
    limit = from_dict(Tree, {"leaves": [], "limit": 2}).limit
    assert limit == 2
    assert isinstance(limit, float)


def test_a_union_takes_the_first_kind_that_reads():
    assert from_dict(Tree, {"leaves": [], "either": 3}).either == 3
    assert from_dict(Tree, {"leaves": [], "either": "3"}).either == "3"


def test_where_a_record_comes_from_can_be_named():
    with pytest.raises(ConfigError, match=r"^bundle/plan\.json\.leaves: expected a list"):
        from_json(Tree, '{"leaves": 1}', "bundle/plan.json")


def test_what_a_record_itself_refuses_passes_through():
    @dataclass(frozen=True)
    class Even:
        value: int

        def __post_init__(self):
            if self.value % 2:
                raise ConfigError("value is odd")

    with pytest.raises(ConfigError, match=r"^value is odd$"):
        from_dict(Even, {"value": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "^here: not JSON: "),
        ("{", "^here: not JSON: "),
        ("{} {}", "^here: not JSON: "),
        ('{"a": NaN}', "^here: NaN is not a JSON number$"),
        ("[-Infinity]", "^here: -Infinity is not a JSON number$"),
        ("[1e999]", "^here: '1e999' is larger than a float from JSON can hold$"),
        ("[" + "9" * 5000 + "]", "^here: not JSON: .* digits"),
        ("[" * 100_000 + "]" * 100_000, "^here: not JSON: .*recursion"),
        ('{"a": 1, "b": 2, "a": 3}', r"^here: duplicate keys \['a'\]$"),
        ('[{"x": {"c": 1, "c": 1, "b": 0, "b": 1}}]', r"^here: duplicate keys \['b', 'c'\]$"),
    ],
)
def test_text_that_is_not_strict_json_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_json(text, "here")


def test_duplicates_among_very_many_keys_are_found_in_one_pass():
    # 10^5 keys counted one by one, each over all of them, would take many minutes.
    keys = ",".join(f'"{i}":0' for i in range(100_000))
    with pytest.raises(ConfigError, match=r"duplicate keys \['7'\]$"):
        parse_json(f'{{{keys},"7":1}}', "here")


@pytest.mark.parametrize("depth", [10, 400, 900])
def test_deep_nesting_where_a_record_was_expected_is_refused_in_a_short_message(depth):
    with pytest.raises(ConfigError) as caught:
        from_json(Tree, '{"leaves": ' + '{"a":' * depth + "1" + "}" * depth + "}")
    assert len(str(caught.value)) < 200


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ConfigError, match=r"size: expected int, got 'a+\.\.\.a+'$") as caught:
        from_dict(Leaf, {"name": "x", "size": "a" * 100_000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_text_is_never_written_with_values_that_are_not_json(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(Leaf(name="x", share=value))


def test_what_has_no_json_form_is_refused():
    with pytest.raises(TypeError, match="set has no JSON form"):
        to_dict({"a": {1, 2}})
    with pytest.raises(TypeError, match="type has no JSON form"):
        to_dict(Leaf)
