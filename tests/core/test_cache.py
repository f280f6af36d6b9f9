"""Where what can be made again is kept."""

from pathlib import Path

import pytest

from halve.core.cache import cache_folder


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HALVE_CACHE": "/a"}, Path("/a/search")),
        ({"HALVE_CACHE": "off"}, None),
        ({"HALVE_CACHE": "OFF", "XDG_CACHE_HOME": "/x"}, None),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/halve/search")),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache/halve/search"),
        ({}, Path.home() / ".cache/halve/search"),
    ],
)
def test_the_environment_says_where(monkeypatch, environment, expected):
    for name in ("HALVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder("search") == expected


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    monkeypatch.delenv("HALVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder("search") is None
