from halve.engine.stop import StopText


def test_text_is_held_back_only_while_it_may_become_a_stop():
    stop = StopText(["</s>", "stop"])
    assert [stop.push(piece) for piece in ("a <", "/s", "x st", "o")] == [
        ("a ", False),
        ("", False),
        ("</sx ", False),
        ("", False),
    ]
    assert stop.push("p and more") == ("", True)


def test_what_is_held_back_comes_out_when_nothing_follows():
    stop = StopText(["stop"])
    assert stop.push("sto") == ("", False)
    assert (stop.flush(), stop.flush()) == ("sto", "")


def test_without_stop_strings_nothing_is_held_back():
    assert StopText([]).push("anything") == ("anything", False)


def test_a_stop_string_can_be_part_of_the_text():
    stop = StopText(["stop", "top!"], include=True)
    assert stop.push("a st") == ("a ", False)
    assert stop.push("op!") == ("stop", True)


def test_of_stops_that_end_together_the_longest_counts():
    assert StopText(["b", "ab"]).push("xab") == ("x", True)
    assert StopText(["b", "ab"], include=True).push("xab") == ("xab", True)
