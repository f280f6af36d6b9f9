"""How load lies over a day."""

from decimal import Decimal

import pytest

from halve.core.errors import ConfigError
from halve.core.workload import Workload, WorkloadRequest
from halve.economics.days import DAYS, day_of_trace, read_day

D = Decimal


def test_the_fullest_hour_over_the_mean():
    assert DAYS["flat"].peak == 1
    assert DAYS["office"].peak == 3  # 24 hours over 8
    assert DAYS["waking"].peak == D(300) / D(200)
    assert DAYS["waking"].weights.index(D(300)) == 15
    assert min(DAYS["waking"].weights) * 3 == max(DAYS["waking"].weights)
    stated = read_day("0," * 20 + "1,1,1,3")
    assert stated.peak == 3 * D(24) / 6


@pytest.mark.parametrize("text", ["offce", "1,2,3", "1," * 23 + "x", "0," * 23 + "0", "-1," * 24])
def test_a_day_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="give"):
        read_day(text)


def test_a_trace_of_two_days_has_hours_of_its_own_and_one_of_an_hour_has_none():
    at = [hour * 3600.0 for hour in range(48)]
    requests = [WorkloadRequest(arrival_s=t, prompt_tokens=10 if t % 86400 else 30, output_tokens=10) for t in at]
    requests.append(WorkloadRequest(arrival_s=48 * 3600.0, prompt_tokens=999, output_tokens=1))  # of a third, cut short
    found = day_of_trace(Workload(name="two days", requests=tuple(requests)))
    assert found.weights[0] == 1
    assert set(found.weights[1:]) == {D(1) / 2}
    assert day_of_trace(Workload(name="an hour", requests=tuple(requests[:2]))) is None
