"""`packtrain data`: a file of one's own is recognised, its faults named, and a recipe reads it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ground.config import Data
from ground.jsonl import RowError, read_array
from ground.records import Message
from ground.tables import read_demonstrations, read_prompts
from packtrain.cli import main
from packtrain.layouts import take

ROOT = Path(__file__).parents[1]
ASKED, SAID = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = b'{"prompt": "2+2?", "completion": "4"}\n'

ROWS: dict[str, tuple[dict[str, object], str, list[dict[str, str]]]] = {
    "TRL messages": ({"messages": [ASKED, SAID]}, "demonstration", [ASKED, SAID]),
    "TRL messages to answer": ({"messages": [ASKED], "answer": "4"}, "prompt", [ASKED]),
    "TRL prompt and completion": (
        {"prompt": "2+2?", "completion": [SAID]},
        "demonstration",
        [ASKED, SAID],
    ),
    "TRL prompt": ({"prompt": [ASKED], "answer": "4"}, "prompt", [ASKED]),
    "TRL preference": (
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        "demonstration",
        [ASKED, SAID],
    ),
    "TRL preference of conversations": (
        {"chosen": [ASKED, SAID], "rejected": [ASKED, ASKED]},
        "demonstration",
        [ASKED, SAID],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2+2", "output": "4"},
        "demonstration",
        [{"role": "user", "content": "Add.\n\n2+2"}, SAID],
    ),
    "alpaca with history": (
        {"instruction": "2+2?", "output": "4", "system": "Be brief.", "history": [["2+2?", "4"]]},
        "demonstration",
        [SYSTEM, ASKED, SAID, ASKED, SAID],
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
            "system": "Be brief.",
        },
        "demonstration",
        [SYSTEM, ASKED, SAID],
    ),
    "verl": (
        {
            "data_source": "openai/gsm8k",
            "prompt": [ASKED],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": 4},
            "extra_info": {"index": 0},
        },
        "prompt",
        [ASKED],
    ),
    "question and answer": (
        {"question": "2+2?", "answer": "4"},
        "demonstration",
        [ASKED, SAID],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_layout_is_taken_for_what_it_is(name: str) -> None:
    row, kind, messages = ROWS[name]
    taken = take(row)
    record = taken.record(Data(defaults={"reward": "math"}))
    assert (taken.kind, taken.layout.name) == (kind, _layout(name))
    assert record.messages == tuple(Message(**message) for message in messages)  # type: ignore[arg-type]
    if kind == "prompt":
        assert record.answer == "4"
        assert record.capability == ("math" if name == "verl" else "general")


def _layout(name: str) -> str:
    known = ("verl", "ShareGPT", "alpaca", "question and answer", "prompt and completion")
    plain = name.removeprefix("TRL ")
    if "preference" in name:
        return "prompt, chosen and rejected"
    return next((each for each in known if plain.startswith(each)), plain.split()[0])


@pytest.mark.parametrize("name", ROWS)
def test_what_is_converted_reads_as_a_stage_reads_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, kind, messages = ROWS[name]
    source, target = tmp_path / "mine.json", tmp_path / "ours.jsonl"
    source.write_text(json.dumps([row | {"score": 3, "id": 7}]))
    assert main(["data", "convert", str(source), str(target)]) == 0
    read = read_demonstrations if kind == "demonstration" else read_prompts
    (record,) = read(target, Data(defaults={"reward": "math"}))
    assert record.messages == tuple(Message(**message) for message in messages)  # type: ignore[arg-type]
    written = json.loads(target.read_text())
    assert (written["meta_score"], written["meta_id"]) == (3, 7)
    capsys.readouterr()
    assert main(["data", "stats", str(target)]) == 0
    key = "sft" if kind == "demonstration" else "prompts"
    assert f"    {key}: {target}" in capsys.readouterr().out.splitlines()


WRONG_ROWS: dict[str, tuple[dict[str, object], str]] = {
    "misspelt": ({"promt": "a", "completion": "b"}, "column 'promt'; did you mean 'prompt'?"),
    "foreign": ({"x": 1, "y": 2}, "no known layout has these columns: 'x', 'y'"),
    "empty": ({}, "no known layout has these columns: none"),
    "null": ({"prompt": None, "completion": "b"}, "no known layout has these columns"),
    "alpaca input": (
        {"instruction": "a", "input": 3, "output": "b"},
        "input must be text, got the",
    ),
    "alpaca output": ({"instruction": "a", "output": ["b"]}, "content must be text, got a list"),
    "alpaca history": (
        {"instruction": "a", "output": "b", "history": [["q"]]},
        "history[0] must be [question, answer]",
    ),
    "ShareGPT turns": ({"conversations": "hi"}, "conversations must be a list of turns"),
    "ShareGPT speaker": (
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        "conversations[0].from must be one of human",
    ),
    "ShareGPT key": (
        {"conversations": [{"from": "human", "vlaue": "hi"}]},
        "conversations[0]: 'vlaue' is not a key; did you mean 'value'?",
    ),
    "verl answer": (
        {"prompt": [ASKED], "reward_model": {"ground_truth": ["4"]}},
        "reward_model.ground_truth must be text, got a list",
    ),
    "verl without answer": ({"prompt": [ASKED], "reward_model": {}}, "answer is null"),
    "chosen alone": ({"chosen": "a", "rejected": "b"}, "chosen is text without a prompt"),
    "image parts": (
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "../x.png"}]}]},
        "messages[0].content must be text, got a list",
    ),
    "empty prompt": ({"prompt": "  ", "completion": "b"}, "prompt is empty"),
    "no answer": ({"prompt": "2+2?"}, "answer is missing"),
    "half a surrogate": ({"prompt": "\ud800", "completion": "b"}, "half a surrogate pair"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_wrong_row_is_named(name: str) -> None:
    row, message = WRONG_ROWS[name]
    with pytest.raises(RowError) as caught:
        take(row).record(Data(defaults={"reward": "math"}))
    assert message in str(caught.value)


CORPUS: dict[str, tuple[bytes, str]] = {
    "57 cut off": (GOOD + GOOD[:-12], "mine.jsonl:2: the line is cut off"),
    "58 bad UTF-8": (GOOD + GOOD.replace(b"4", b"\xff\xfe"), "mine.jsonl:2: not UTF-8: byte 0xff"),
    "59 UTF-16": (GOOD.decode().encode("utf-16"), "is UTF-16, must be UTF-8"),
    "60 NUL": (GOOD + b'{"prompt": "\0"}\n', "mine.jsonl:2: a NUL byte stands at column 13"),
    "60 merge marker": (GOOD + b"<<<<<<< HEAD\n", "mine.jsonl:2: a merge marker"),
    "60 gzip": (gzip.compress(GOOD), "is gzip-compressed"),
    "61 mixed types": (GOOD + GOOD.replace(b'"4"', b"4"), "mine.jsonl:2: completion must be text"),
    "62 misspelt": (
        GOOD + GOOD.replace(b"completion", b"completoin"),
        "did you mean 'completion'?",
    ),
    "62 null": (GOOD + GOOD.replace(b'"2+2?"', b"null"), "mine.jsonl:2: no known layout"),
    "63 one id, two contents": (
        b'{"id": "a", "prompt": "x", "completion": "y"}\n'
        b'{"id": "a", "prompt": "x", "completion": "z"}\n',
        "mine.jsonl:2: id 'a' has another content than in line 1",
    ),
    "64 empty": (b"\n\n", "the file holds no rows"),
    "67 image": (
        b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n',
        "mine.jsonl:1: messages[0].content must be text, got a list",
    ),
    "68 NaN": (GOOD + b'{"prompt": "a", "completion": "b", "x": NaN}\n', "NaN is not a number"),
    "69 deep": (GOOD + b"[" * 100_000 + b"\n", "mine.jsonl:2: nested too deep"),
    "69 long": (
        b'{"prompt": "' + b"x" * (16 * 2**20) + b'"}\n',
        "mine.jsonl:1: the line is longer than 16 MB",
    ),
    "69 large": (
        GOOD + b'{"prompt": "a", "completion": "b", "x": 1' + b"0" * 30 + b"}\n",
        "does not fit in 64 bits",
    ),
    "array cut off": (b"[" + GOOD, "mine.jsonl:1: the array is cut off or broken here"),
    "array with more": (b"[" + GOOD + b"] x", "something stands behind the array"),
    "array of text": (b'["a"]', "mine.jsonl:1: a row must be an object, got the text 'a'"),
    "array not UTF-8": (b'[\n"\xff"]', "mine.jsonl:2: not UTF-8: byte 0xff"),
    "array not JSON": (b"[\n{]", "mine.jsonl:2: not JSON: Expecting property name"),
    "array with NaN": (b'[\n\n{"a": NaN}]', "mine.jsonl:3: NaN is not a number"),
    "array too deep": (b"[" * 100_000, "mine.jsonl:1: nested too deep"),
}


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.parametrize("action", ["stats", "preview"])
def test_a_damaged_file_gives_a_named_error(
    name: str,
    action: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = CORPUS[name]
    Path("mine.jsonl").write_bytes(content)
    code = main(["data", action, "mine.jsonl"])
    shown = capsys.readouterr()
    if action == "stats":
        assert code == 3
        assert message in shown.out + shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("BOM", b"\xef\xbb\xbf" + GOOD),
        ("CRLF", GOOD.replace(b"\n", b"\r\n")),
        ("blank", b"\n" + GOOD),
    ],
)
def test_what_loses_nothing_is_accepted(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(content)
    assert main(["data", "stats", str(tmp_path / "mine.jsonl")]) == 0


def test_stats_count_rows_lengths_duplicates_and_control_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "x" * n, "completion": "<|eot|>" if n == 3 else "y"} for n in (1, 2, 3, 10)]
    lines = [json.dumps(row) for row in [*rows, rows[0]]]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    assert main(["data", "stats", str(tmp_path / "mine.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "mine.jsonl: jsonl; 4 rows, 0 bad, 1 left out as equal to earlier ones",
        "  laid out as prompt and completion, taken for demonstrations: 4 rows",
        "  capabilities: general 4",
        "  messages: median 2, 95 % 2, largest 2, smallest 2; 8 in all",
        "  characters asked: median 3, 95 % 10, largest 10, smallest 1; 16 in all",
        "  characters answered: median 1, 95 % 7, largest 7, smallest 1; 10 in all",
        "  text like a control token in 1 messages; it is encoded as text",
        "  in tokens: with --model DIR",
        "in a recipe",
        "  data:",
        f"    sft: {tmp_path / 'mine.jsonl'}",
    ]


def test_stats_in_tokens_of_a_model_find_what_is_too_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "2 + 2 =" * n, "completion": "4"} for n in (1, 40)]
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    student = ROOT / "recipes" / "tiny" / "herd" / "student"
    assert main(["data", "stats", str(path), "--model", str(student), "--max-length", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  tokens: median ") for line in lines)
    assert "  1 rows have more than 100 tokens; stages set these aside" in lines


def test_a_recipe_gets_columns_and_defaults_where_they_are_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "qa.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n')
    (tmp_path / "rl.jsonl").write_text('{"prompt": "2+2?", "answer": "4"}\n')
    main(["data", "stats", str(tmp_path / "qa.jsonl")])
    assert "    columns: {prompt: question, completion: answer}" in capsys.readouterr().out
    main(["data", "stats", str(tmp_path / "rl.jsonl")])
    assert "    defaults: {reward: math}" in capsys.readouterr().out
    columns = Data(columns={"prompt": "question", "completion": "answer"})
    (record,) = read_demonstrations(tmp_path / "qa.jsonl", columns)
    assert record.messages == (Message("user", "2+2?"), Message("assistant", "4"))


def test_preview_shows_the_first_rows_and_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"ask\n── {n}\x1b[2J", "output": "4", "tag\x07": 1} for n in range(5)]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rows))
    assert main(["data", "preview", str(path), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:5] == [
        f"── {path}:1: alpaca, taken for demonstrations",
        "  user",
        "    │ ask",
        "    │ ── 0",
        "  assistant",
    ]
    assert out.count("alpaca") == 2 and "  not read: tag" in out
    assert not set(out) & set("\x1b\x07")


def test_conversion_refuses_bad_rows_and_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "mine.jsonl", tmp_path / "ours.jsonl"
    source.write_bytes(GOOD + b'{"x": 1}\n')
    assert main(["data", "convert", str(source), str(target)]) == 3
    assert f"{source}:2: no known layout" in capsys.readouterr().err
    assert not target.exists()
    assert main(["data", "convert", str(source), str(target), "--max-bad", "1"]) == 0
    before = target.read_bytes()
    assert main(["data", "convert", str(source), str(target), "--max-bad", "1"]) == 3
    assert target.read_bytes() == before


def test_lines_of_an_array_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('[\n  {"a": 1},\n\n  {"a":\n 2}, {"a": 3}\n]\n')
    assert [(line.number, line.value) for line in read_array(path)] == [
        (2, {"a": 1}),
        (4, {"a": 2}),
        (5, {"a": 3}),
    ]
