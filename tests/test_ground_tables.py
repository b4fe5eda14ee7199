"""Tables: rows of the accepted shapes are read whole, every fault has its file and line."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crashpoints import crash_at_each_call, old_then_new
from hypothesis import given, settings
from hypothesis import strategies as st

from ground import jsonl
from ground.config import Data
from ground.errors import DataError
from ground.records import Demonstration, Difficulty, Message, Prompt
from ground.tables import (
    ROW_SCHEMA,
    read_demonstrations,
    read_prompts,
    read_rows,
    read_table,
    write_jsonl,
    write_records,
    write_rows,
)

from ground.rows import demonstration_of, prompt_of, row_of  # isort: skip

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
GOOD = b'{"prompt": "2+2=", "reward": "exact", "answer": "4"}\n'
QUESTION = Message("user", "2+2=")


def table(tmp_path: Path, content: bytes | str, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def prompts_error(path: Path, data: Data | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_prompts(path, data or Data())
    assert caught.value.exit_code == 3
    return f"{caught.value.where.removeprefix(str(path.parent) + '/')}: {caught.value.what}"


# --- accepted shapes --------------------------------------------------------------------------


def test_a_prompt_is_text_or_messages(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2+2=", "reward": "exact", "answer": "4"},
        {"prompt": [{"role": "user", "content": "3+3="}], "reward": "exact", "answer": "6"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}],
         "reward": "exact", "answer": "", "capability": "talk", "id": "own", "meta_x": [1],
         "difficulty": {"label": "hard", "score": 1, "successes": 1, "trials": 4}},
    ]  # fmt: skip
    path = table(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = read_prompts(path, Data())
    assert first == Prompt.make((QUESTION,), capability="general", reward="exact", answer="4")
    assert second.messages == (Message("user", "3+3="),)
    assert third == Prompt(
        id="own",
        messages=(Message("system", "Be brief."), Message("user", "?")),
        capability="talk",
        reward="exact",
        answer="",
        difficulty=Difficulty("hard", 1.0, "", 1, 4, 0),
    )


def test_a_demonstration_is_messages_or_prompt_and_completion(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    rows = [
        {"id": "a", "messages": turns},
        {"id": "b", "prompt": "2+2=", "completion": "4"},
        {"id": "c", "prompt": turns[:1], "completion": turns[1:]},
        {"id": "d", "messages": turns, "prompt": None, "completion": None},
    ]
    path = table(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    expected = (QUESTION, Message("assistant", "4"))
    found = read_demonstrations(path, Data())
    assert [(row.id, row.messages, row.question) for row in found] == [
        (name, expected, (QUESTION,)) for name in "abcd"
    ]


def test_columns_are_renamed_and_defaults_fill_what_is_missing(tmp_path: Path) -> None:
    path = table(tmp_path, '{"question": "2+2=", "answer": "so 4 #### 4"}\n')
    data = Data(
        columns={"prompt": "question", "answer": "answer", "completion": "answer"},
        defaults={"reward": "math", "capability": "arithmetic"},
    )
    (prompt,) = read_prompts(path, data)
    assert (prompt.answer, prompt.reward, prompt.capability) == (
        *("so 4 #### 4", "math", "arithmetic"),
    )
    (demonstration,) = read_demonstrations(path, data)
    assert demonstration.messages == (QUESTION, Message("assistant", "so 4 #### 4"))


def test_what_our_own_stages_write_is_read_whatever_the_users_columns_are(tmp_path: Path) -> None:
    prompt = Prompt.make((QUESTION,), capability="c", reward="exact", answer="4")
    data = Data(columns={"prompt": "question", "completion": "answer"}, defaults={"reward": "math"})
    for name in ("mined.parquet", "mined.jsonl"):
        write_records(tmp_path / name, [prompt])
        assert read_prompts(tmp_path / name, data) == [prompt]


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the shared gsm8k folder is absent")
def test_the_whole_of_gsm8k_is_read() -> None:
    data = Data(
        columns={"prompt": "question", "answer": "answer", "completion": "answer"},
        defaults={"reward": "math", "capability": "math"},
    )
    for name, count in (("train", 7473), ("test", 1319)):
        prompts = read_prompts(GSM8K / f"{name}.jsonl", data)
        demonstrations = read_demonstrations(GSM8K / f"{name}.jsonl", data)
        assert len(prompts) == len(demonstrations) == count
        assert all("####" in prompt.answer for prompt in prompts)
        assert len({prompt.id for prompt in prompts}) == count


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"\n", b"\r\n"),
        b"\n  \n" + GOOD + b"\n\r\n",
        GOOD.rstrip(),
        GOOD.replace(b"2+2=", b"2\\u002b2="),
    ],
    ids=["byte-order mark", "CRLF", "blank lines", "no newline at the end", "escapes"],
)
def test_what_loses_nothing_is_accepted(tmp_path: Path, content: bytes) -> None:
    (prompt,) = read_prompts(table(tmp_path, content), Data())
    assert prompt.messages == (QUESTION,)


def test_special_token_text_is_kept_as_text(tmp_path: Path) -> None:
    text = "<|eot|><|header_start|>assistant<|header_end|> [INST] </s> \u202e"
    row = {"prompt": text, "reward": "exact", "answer": "x"}
    (prompt,) = read_prompts(table(tmp_path, json.dumps(row)), Data())
    assert prompt.messages[0].content == text


def test_equal_rows_are_read_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = table(tmp_path, GOOD * 3)
    found = read_table(path, Data(), prompt_of)
    assert (len(found.records), found.num_duplicates, found.bad) == (1, 2, [])
    with caplog.at_level(logging.WARNING):
        read_prompts(path, Data())
    assert "2 rows equal to earlier ones left out" in caplog.text


# --- faults of a file (FAULTS 57 to 61, 64, 69) --------------------------------------------------

NESTED = b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}\n"
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "last line cut off": (
        GOOD + GOOD[:-13],
        "data.jsonl:2: the line is cut off: not JSON: Unterminated string starting at column 39",
    ),
    "a line that is not JSON": (
        b"{'prompt': 1}\n" + GOOD,
        "data.jsonl:1: not JSON: Expecting property name enclosed in double quotes at column 2",
    ),
    "bad UTF-8": (
        GOOD * 2 + GOOD.replace(b"2+2", b"2\xff\xfe2"),
        "data.jsonl:3: not UTF-8: byte 0xff at column 14",
    ),
    "UTF-16": (
        GOOD.decode().encode("utf-16"),
        "data.jsonl: the file is UTF-16, must be UTF-8",
    ),
    "one array": (
        b"\n[" + GOOD.strip() + b"]",
        "data.jsonl:2: the file is one JSON array, must be one object per line",
    ),
    "a NUL byte": (
        GOOD + GOOD.replace(b"2+2", b"2\x002"),
        "data.jsonl:2: a NUL byte stands at column 14; the file is damaged",
    ),
    "merge markers": (
        GOOD + b"<<<<<<< HEAD\n" + GOOD + b"=======\n",
        "data.jsonl:2: a merge marker: the file has an unresolved merge conflict",
    ),
    "gzip": (
        gzip.compress(GOOD),
        "data.jsonl: the file is gzip-compressed, must be plain text",
    ),
    "parquet by another name": (
        b"PAR1xxxx",
        "data.jsonl: the file is parquet, named like JSON lines",
    ),
    "a row that is no object": (
        GOOD + b'"text"\n',
        "data.jsonl:2: a row must be an object, got the text 'text'",
    ),
    "no rows": (b"\n\n", "data.jsonl: the file holds no rows"),
    "nested 2000 deep": (GOOD + NESTED, "data.jsonl:2: nested too deep"),
    "a number of 31 digits": (
        GOOD + GOOD.replace(b'"4"', b"1" + b"0" * 30),
        "data.jsonl:2: the number 100000000000000000000… does not fit in 64 bits",
    ),
    "NaN": (GOOD.replace(b'"4"', b"NaN"), "data.jsonl:1: NaN is not a number in JSON"),
    "infinity": (
        GOOD.replace(b'"4"', b"-Infinity"),
        "data.jsonl:1: -Infinity is not a number in JSON",
    ),
    "an overflowing number": (
        GOOD.replace(b'"4"', b"1e999"),
        "data.jsonl:1: the number 1e999 is not finite",
    ),
    "the same key twice": (
        b'{"prompt": "a", "prompt": "b"}\n',
        "data.jsonl:1: the key 'prompt' stands there twice",
    ),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_fault_of_the_file_has_its_line(tmp_path: Path, fault: str) -> None:
    content, expected = BAD_FILES[fault]
    assert prompts_error(table(tmp_path, content)) == expected


# --- faults of a row (FAULTS 61 to 63, 68) -------------------------------------------------------

ROW = {"prompt": "2+2=", "reward": "exact", "answer": "4"}
USER = {"role": "user", "content": "hi"}
BAD_ROWS: dict[str, tuple[dict[str, object], str]] = {
    "misspelt column": (
        {**ROW, "anwser": "4"},
        "'anwser' is not a column; did you mean 'answer'?",
    ),
    "unknown column": (
        {**ROW, "source": "web"},
        "'source' is not a column; prefix it with meta_ or rename it in data.columns",
    ),
    "no prompt": (
        {"reward": "exact", "answer": "4"},
        "prompt is missing; a row has messages, or a prompt",
    ),
    "null prompt": ({**ROW, "prompt": None}, "prompt is null"),
    "empty prompt": ({**ROW, "prompt": " \n"}, "prompt is empty"),
    "prompt of another type": (
        {**ROW, "prompt": 5},
        "prompt must be text or a list of messages, got the number 5",
    ),
    "no messages in the list": ({**ROW, "prompt": []}, "prompt is an empty list"),
    "prompt and messages": (
        {**ROW, "messages": [USER]},
        "a row has either messages or prompt, this one has both",
    ),
    "no reward": (
        {"prompt": "a", "answer": "4"},
        "reward is missing; add the column, or set data.defaults.reward",
    ),
    "no answer": ({"prompt": "a", "reward": "exact"}, "answer is missing"),
    "null answer": ({**ROW, "answer": None}, "answer is null"),
    "number among texts": ({**ROW, "answer": 4}, "answer must be text, got the number 4"),
    "number as id": ({**ROW, "id": 4}, "id must be text, got the number 4"),
    "true as capability": ({**ROW, "capability": True}, "capability must be text, got true"),
    "half a surrogate": (
        {**ROW, "prompt": "\ud83d"},
        "prompt holds half a surrogate pair (\\ud83d), which is no text",
    ),
    "unknown role": (
        {**ROW, "prompt": [{"role": "usr", "content": "a"}]},
        "prompt[0].role must be one of system, user, assistant, tool, got the text 'usr'"
        "; did you mean 'user'?",
    ),
    "message without content": (
        {**ROW, "prompt": [{"role": "user"}]},
        "prompt[0].content is missing",
    ),
    "message with null content": (
        {**ROW, "prompt": [{"role": "user", "content": None}]},
        "prompt[0].content is null",
    ),
    "content in parts": (
        {**ROW, "prompt": [{"role": "user", "content": [{"type": "text"}]}]},
        "prompt[0].content must be text, got a list",
    ),
    "message with another key": (
        {**ROW, "prompt": [{**USER, "contents": "b"}]},
        "prompt[0]: 'contents' is not a key; did you mean 'content'?",
    ),
    "message that is text": (
        {**ROW, "prompt": ["hi"]},
        "prompt[0] must be an object with role and content, got the text 'hi'",
    ),
    "late system message": (
        {**ROW, "prompt": [USER, {"role": "system", "content": "x"}]},
        "prompt[1]: a system message must be the first",
    ),
    "prompt that ends with an answer": (
        {**ROW, "prompt": [USER, {"role": "assistant", "content": "x"}]},
        "a prompt must end with the user's message, it ends with the assistant's",
    ),
    "prompt without a user": (
        {**ROW, "prompt": [{"role": "system", "content": "x"}]},
        "prompt holds no message of the user",
    ),
    "difficulty as text": (
        {**ROW, "difficulty": "hard"},
        "difficulty must be an object, got the text 'hard'",
    ),
    "unknown label": (
        {**ROW, "difficulty": {"label": "harder"}},
        "difficulty.label must be one of easy, medium, hard, got the text 'harder'"
        "; did you mean 'hard'?",
    ),
    "score out of range": (
        {**ROW, "difficulty": {"score": 1.5}},
        "difficulty.score must be a number from 0 to 1, got the number 1.5",
    ),
    "negative count": (
        {**ROW, "difficulty": {"trials": -1}},
        "difficulty.trials must be a count, got the number -1",
    ),
    "more successes than trials": (
        {**ROW, "difficulty": {"successes": 3, "trials": 2}},
        "difficulty: 3 successes in 2 trials",
    ),
    "misspelt key of difficulty": (
        {**ROW, "difficulty": {"lable": "hard"}},
        "difficulty: 'lable' is not a key; did you mean 'label'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_fault_of_a_row_has_its_line_and_sentence(tmp_path: Path, fault: str) -> None:
    row, expected = BAD_ROWS[fault]
    path = table(tmp_path, GOOD + b"\n" + json.dumps(row).encode())
    assert prompts_error(path) == f"data.jsonl:3: {expected}"


@pytest.mark.parametrize("fault", ["null prompt", "number among texts", "unknown role"])
def test_parquet_rows_are_held_to_the_same(tmp_path: Path, fault: str) -> None:
    row, expected = BAD_ROWS[fault]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "data.parquet")
    assert prompts_error(tmp_path / "data.parquet") == f"data.parquet:row 1: {expected}"


DEMONSTRATION_FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "no completion": ({"prompt": "a"}, "completion is missing"),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion is empty"),
    "ends with the user": (
        {"messages": [USER]},
        "a demonstration must end with the assistant's message, not the user's",
    ),
}


@pytest.mark.parametrize("fault", DEMONSTRATION_FAULTS)
def test_a_fault_of_a_demonstration(tmp_path: Path, fault: str) -> None:
    row, expected = DEMONSTRATION_FAULTS[fault]
    with pytest.raises(DataError) as caught:
        read_demonstrations(table(tmp_path, json.dumps(row)), Data())
    assert caught.value.what == expected


def test_an_id_with_two_contents_is_refused(tmp_path: Path) -> None:
    rows = [{**ROW, "id": "a"}, {**ROW, "id": "b"}, {**ROW, "id": "a", "answer": "5"}]
    path = table(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    assert prompts_error(path) == "data.jsonl:3: id 'a' has another content than in line 1"


def test_a_renamed_column_that_is_absent_is_named_as_it_stands_in_the_recipe(
    tmp_path: Path,
) -> None:
    data = Data(columns={"prompt": "question"})
    path = table(tmp_path, '{"quest": "a"}\n')
    assert prompts_error(path, data) == (
        "data.jsonl:1: 'quest' is not a column; prefix it with meta_ or rename it in data.columns"
    )
    path = table(tmp_path, '{"answer": "a"}\n')
    assert prompts_error(path, data) == (
        "data.jsonl:1: prompt is missing (data.columns reads it from 'question')"
        "; a row has messages, or a prompt"
    )


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    assert prompts_error(tmp_path / "gone.jsonl") == "gone.jsonl: the file does not exist"
    assert prompts_error(tmp_path / "gone.parquet") == "gone.parquet: the file does not exist"
    path = table(tmp_path, "a,b", "data.csv")
    assert prompts_error(path) == "data.csv: a table is a .jsonl or .parquet file, got '.csv'"
    path = table(tmp_path, b"PAR1 no", "data.parquet")
    assert prompts_error(path).startswith("data.parquet: not a whole parquet file: ")


# --- the budget of bad rows -------------------------------------------------------------------


def test_bad_rows_within_the_budget_go_to_quarantine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = table(tmp_path, GOOD + b"\xff\n" + GOOD.replace(b"4", b"5") + b'{"prompt": 3\n')
    (tmp_path / "run").mkdir()
    with caplog.at_level(logging.WARNING):
        found = read_prompts(path, Data(max_bad_rows=2), tmp_path / "run")
    assert [prompt.answer for prompt in found] == ["4", "5"]
    assert "2 bad rows left out (lines 2, 4)" in caplog.text
    assert read_rows(tmp_path / "run" / "data.jsonl.quarantine.jsonl") == [
        {"file": str(path), "line": 2, "error": "not UTF-8: byte 0xff at column 1", "raw": "\\xff"},
        {"file": str(path), "line": 4, "error": "not JSON: Expecting ',' delimiter at column 13",
         "raw": '{"prompt": 3'},
    ]  # fmt: skip


def test_bad_rows_beyond_the_budget_are_refused_with_all_their_lines(tmp_path: Path) -> None:
    path = table(tmp_path, b"x\n" + GOOD + b"y\nz\n")
    with pytest.raises(DataError) as caught:
        read_prompts(path, Data(max_bad_rows=2))
    assert str(caught.value) == (
        f"{path}:1: not JSON: Expecting value at column 1\n"
        "  why: bad rows: 1, 3, 4; data.max_bad_rows allows 2\n"
        "  fix: mend the row, or allow some to be set aside with data.max_bad_rows"
    )


def test_reading_stops_soon_in_a_file_of_nothing_but_bad_rows(tmp_path: Path) -> None:
    found = read_table(table(tmp_path, b"x\n" * 10_000), Data(max_bad_rows=3), prompt_of)
    assert len(found.bad) == 24


def test_a_line_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1 << 20)
    path = table(tmp_path, b'{"prompt": "' + b"x" * (5 << 20) + b'"}\n' + GOOD)
    lines = list(jsonl.read_lines(path))
    assert [(line.number, line.error) for line in lines] == [
        (1, "the line is longer than 1 MB"),
        (2, ""),
    ]
    assert len(lines[0].raw) == 1 << 20


# --- writing ----------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
DIFFICULTIES = st.none() | st.builds(
    Difficulty,
    label=st.sampled_from([None, "easy", "hard"]),
    score=st.none() | st.floats(0, 1),
    judged_by=st.text(st.characters(exclude_categories=["Cs"])),
    successes=st.integers(0, 3),
    trials=st.integers(3, 2**62),
)


@settings(max_examples=30)
@given(texts=st.lists(TEXT, min_size=1, max_size=4), difficulty=DIFFICULTIES)
def test_records_survive_parquet_and_json_lines(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], difficulty: Difficulty | None
) -> None:
    folder = tmp_path_factory.mktemp("t")
    prompts = {
        text: Prompt.make(
            (Message("user", text),), capability="c", reward="r", answer=text, difficulty=difficulty
        )
        for text in texts
    }
    for name in ("p.parquet", "p.jsonl"):
        write_records(folder / name, list(prompts.values()))
        assert read_prompts(folder / name, Data()) == list(prompts.values())


def test_a_demonstration_survives_with_its_extra_columns_left_alone(tmp_path: Path) -> None:
    record = Demonstration("d", (QUESTION, Message("assistant", "4")), "sums", "exact", "4")
    schema = ROW_SCHEMA.append(pa.field("meta_rule", pa.string()))
    write_rows(tmp_path / "k.parquet", [row_of(record) | {"meta_rule": "kept"}], schema)
    assert read_demonstrations(tmp_path / "k.parquet", Data()) == [record]
    assert read_rows(tmp_path / "k.parquet")[0]["meta_rule"] == "kept"
    assert demonstration_of(row_of(record), Data()) == record


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"id": str(number), "score": number / 7} for number in range(1000)]
    schema = pa.schema([("id", pa.string()), ("score", pa.float64())])
    for name in ("a.parquet", "b.parquet"):
        write_rows(tmp_path / name, rows, schema)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_row_that_does_not_fit_the_schema_is_refused_and_the_old_file_stays(
    tmp_path: Path,
) -> None:
    schema = pa.schema([pa.field("id", pa.string(), nullable=False), ("n", pa.int64())])
    path = tmp_path / "t.parquet"
    write_rows(path, [{"id": "a", "n": 1}], schema)
    for row, expected in (
        ({"id": "b"}, "cannot write row 1: n is missing"),
        ({"id": "b", "n": 1, "m": 2}, "cannot write row 1: m is not in the schema"),
        ({"id": 5, "n": 1}, "cannot write row 1: id must be string, got the number 5"),
        ({"id": None, "n": 1}, "cannot write row 1: id must not be null"),
        ({"id": "b", "n": 1.5}, "cannot write row 1: n must be int64, got the number 1.5"),
        ({"id": "b", "n": True}, "cannot write row 1: n must be int64, got true"),
        ({"id": "b", "n": 10**30}, "a value does not fit its column: "),
    ):
        with pytest.raises(DataError) as caught:
            write_rows(path, [row], schema)
        assert caught.value.what.startswith(expected)
    assert read_rows(path) == [{"id": "a", "n": 1}]


def test_a_nested_value_that_does_not_fit_is_named_by_its_place(tmp_path: Path) -> None:
    row = row_of(Demonstration("d", (QUESTION, Message("assistant", "4")), "sums"))
    for messages, expected in (
        ([{"role": "user"}], "messages[0].content is missing"),
        ([{"role": "user", "content": None}], "messages[0].content must not be null"),
        ([{**USER, "name": "x"}], "messages[0].name is not in the schema"),
        ("hello", "messages must be a list, got the text 'hello'"),
        (["hello"], "messages[0] must be an object, got the text 'hello'"),
    ):
        with pytest.raises(DataError) as caught:
            write_rows(tmp_path / "t.parquet", [row | {"messages": messages}], ROW_SCHEMA)
        assert caught.value.what == f"cannot write row 1: {expected}"


def test_crash_points_of_a_parquet_file(ram_path: Path) -> None:
    schema = pa.schema([("text", pa.string())])
    seen = crash_at_each_call(
        ram_path,
        lambda place: write_rows(place / "t.parquet", [{"text": "old"}], schema),
        lambda place: write_rows(place / "t.parquet", [{"text": "new"}], schema),
        lambda place: str(read_rows(place / "t.parquet")[0]["text"]),
    )
    old_then_new(seen, "old", "new")
    assert seen[-1][0].done.count("write") > 1


def test_crash_points_of_json_lines(ram_path: Path) -> None:
    seen = crash_at_each_call(
        ram_path,
        lambda place: write_jsonl(place / "t.jsonl", [{"text": "old"}]),
        lambda place: write_jsonl(place / "t.jsonl", [{"text": "new"}] * 3),
        lambda place: len(read_rows(place / "t.jsonl")),
    )
    old_then_new(seen, 1, 3)
