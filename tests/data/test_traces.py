"""Trace files of requests to workloads."""

import gzip
import json

import pytest

from halve.core.errors import DataError
from halve.core.workload import ServiceLevel
from halve.data import read_trace


def test_an_azure_trace_gives_lengths_and_seconds_between_its_dates(tmp_path):
    path = tmp_path / "AzureLLM.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    there = read_trace(path, service_level=ServiceLevel(ttft_s=1.0))
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in there.requests] == [
        (0.0, 374, 44),
        (pytest.approx(4.314579, abs=1e-6), 396, 109),
    ]
    assert there.name == "azurellm"
    assert there.service_level.ttft_s == 1.0


def test_a_mooncake_trace_gives_milliseconds_and_the_names_of_its_blocks(tmp_path):
    rows = [
        {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 9]},
        {"timestamp": 1000, "input_length": 7, "output_length": 1, "hash_ids": [0]},
    ]
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    there = read_trace(path)
    assert [(r.arrival_s, r.prompt_tokens, r.prefix_blocks) for r in there.requests] == [
        (0.0, 7, (0,)),
        (2.0, 600, (0, 9)),
    ]
    assert there.block_tokens == 512


def test_rows_in_our_own_words_may_leave_arrivals_and_blocks_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt_tokens,output_tokens\n3,4\n5,6\n")
    assert [(r.arrival_s, r.prompt_tokens) for r in read_trace(path).requests] == [(0.0, 3), (0.0, 5)]
    path = tmp_path / "a.jsonl"
    path.write_text('{"arrival_s": 1.5, "prompt_tokens": 3, "output_tokens": 4, "prefix_blocks": [2]}\n\n')
    assert read_trace(path).requests[0].prefix_blocks == (2,)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("TIMESTAMP,ContextTokens\n2023-11-16,1\n", r"a.csv:2: columns \['ContextTokens', 'TIMESTAMP'\] are of no"),
        ("arrival_s,prompt_tokens,output_tokens,user\n0,1,1,x\n", r"a.csv:2: columns .*'user'\] are of no trace"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1\n", "a.csv:2: as many values as the header has names"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1,1\n", "a.csv:2: as many values as the header has names"),
        ("arrival_s,prompt_tokens,output_tokens\n0,many,1\n", "a.csv:2: prompt_tokens: 'many' must be a whole number"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,-2\n", "a.csv:2: output_tokens: '-2' must be a whole number"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,0\n", "a.csv:2: .*0 output_tokens; both must be 1 or more"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,1,1\n", "a.csv:2: arrival_s: 'nan' must be a finite number"),
        ("arrival_s,prompt_tokens,output_tokens\nsoon,1,1\n", "a.csv:2: arrival_s: 'soon' must be a finite number"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n12:00,1,1\n", "a.csv:2: TIMESTAMP: '12:00' must be a date"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no requests in it"),
        ('arrival_s,prompt_tokens,output_tokens\n"0,1,1\n', "a.csv:1: not CSV"),
    ],
)
def test_a_csv_that_is_no_trace_is_refused_by_line_and_column(tmp_path, text, what):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=what):
        read_trace(path)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("[1]", r"a.jsonl:1: each line is an object, this is \[1\]"),
        ("{", "a.jsonl:1: not JSON"),
        ('{"timestamp": 1, "input_length": 1}', "a.jsonl:1: columns"),
        ('{"timestamp": true, "input_length": 1, "output_length": 1}', "timestamp: True must be a finite number"),
        ('{"timestamp": 1, "input_length": 1.5, "output_length": 1}', "input_length: 1.5 must be a whole number"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": 3}', "hash_ids: 3 must be a list"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}', "hash_ids: 'a' must be a whole"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1, 2]}', "names 2 blocks"),
    ],
)
def test_a_jsonl_that_is_no_trace_is_refused_by_line_and_key(tmp_path, line, what):
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=what):
        read_trace(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a trace is a .csv or .jsonl file"):
        read_trace(tmp_path / "trace.parquet")
    with pytest.raises(DataError, match="not a file"):
        read_trace(tmp_path / "absent.csv")
