"""The `code` reward: what passes, what does not, and that tricks are not paid."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from code_hacks import FUNCTIONS, SCRIPTS
from humaneval_mutants import mutated
from sandboxes import absent, some_sandbox

from ground.config import SandboxSettings
from ground.errors import DataError, InfraError, SetupError
from ground.records import Message, Prompt
from rollout.code_runs import Ran, run_tests
from rollout.code_tests import (
    MAX_PAIRS,
    Calls,
    Check,
    Scripts,
    program_of,
    read_tests,
    same_output,
    same_value,
)
from rollout.reward_pool import RewardPool
from rollout.sandbox import Sandbox
from rollout.sandbox_guest import decode, encode
from rollout.sandbox_probe import sandbox_for

HUMANEVAL = Path(__file__).parents[2] / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"
needs_humaneval = pytest.mark.skipif(not HUMANEVAL.is_file(), reason="HumanEval is not here")

ADD = "def add(a, b):\n    return a + b\n"
PRINT = "a, b = map(int, input().split())\nprint(a + b)\n"
ASKED = {
    "scripts": {"inputs": ["3 4\n", "10 -2"], "outputs": ["7\n", "8\n"]},
    "calls": {"inputs": [[3, 4], [10, -2]], "outputs": [7, 8], "fn_name": "add"},
    "check": {
        "entry_point": "add",
        "test": "def check(f):\n    assert f(3, 4) == 7\n    assert f(10, -2) == 8\n",
    },
}
TESTS = {name: read_tests(json.dumps(asked)) for name, asked in ASKED.items()}
HONEST = {"scripts": PRINT, "calls": ADD, "check": ADD}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return some_sandbox()


@pytest.mark.parametrize("kind", TESTS)
def test_an_honest_program_passes_however_it_is_written(sandbox: Sandbox, kind: str):
    program = HONEST[kind]
    use = "```\n$ run\n```\n" * (kind != "scripts") + "```bash\nls\n```"
    for text in (program, f"Think.\n```python\n{program}```\nIt is used so:\n{use}\nDone."):
        assert run_tests(sandbox, text, TESTS[kind], 20.0).passed


@pytest.mark.parametrize("end", ["exit", "quit"])
def test_a_program_may_end_itself_as_scripts_do(sandbox: Sandbox, end: str):
    assert run_tests(sandbox, f"{PRINT}{end}()\n", TESTS["scripts"], 20.0).passed
    assert run_tests(sandbox, f"{PRINT}{end}(1)\n", TESTS["scripts"], 20.0).outcome == "raised"


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="annotations are not evaluated")
def test_a_program_has_the_language_of_its_python_not_of_ours(sandbox: Sandbox):
    undefined = "def add(a: Missing, b):\n    return a + b"
    for kind in ("calls", "check"):
        assert run_tests(sandbox, undefined, TESTS[kind], 20.0).outcome == "raised"


@pytest.mark.parametrize("kind", TESTS)
def test_a_wrong_program_fails_and_says_where(sandbox: Sandbox, kind: str):
    late = HONEST[kind].replace("a + b", "a + abs(b)")
    num_tests, before = (1, 0) if kind == "check" else (2, 1)
    assert run_tests(sandbox, late, TESTS[kind], 20.0) == Ran(before, num_tests, "wrong")


def hack_results(sandbox: Sandbox, kind: str, hacks: dict[str, str]) -> dict[str, Ran]:
    """Two at a time: half of the time is waiting for processes to come up."""
    with ThreadPoolExecutor(2) as threads:
        ran = threads.map(lambda text: run_tests(sandbox, text, TESTS[kind], 2.0), hacks.values())
        return dict(zip(hacks, ran, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TESTS)
def test_no_hack_is_paid(sandbox: Sandbox, kind: str):
    assert len(SCRIPTS) + len(FUNCTIONS) >= 80
    results = hack_results(sandbox, kind, SCRIPTS if kind == "scripts" else FUNCTIONS)
    assert not {name: ran for name, ran in results.items() if ran.passed}
    assert run_tests(sandbox, HONEST[kind], TESTS[kind], 20.0).passed


@pytest.mark.parametrize("kind", TESTS)
def test_a_sample_of_hacks_is_not_paid(sandbox: Sandbox, kind: str):
    chosen = {
        "scripts": (
            "exits early",
            "says passed as a frame",
            "prints the right answer among others",
        ),
        "calls": (
            "is an int equal to all",
            "forges strange values",
            "forges a number beyond floats",
            "is all answers",
        ),
        "check": ("exits on import", "is equal to all", "forges a verdict", "replaces the speaker"),
    }[kind]
    hacks = SCRIPTS if kind == "scripts" else FUNCTIONS
    results = hack_results(sandbox, kind, {name: hacks[name] for name in chosen})
    assert not [name for name, ran in results.items() if ran.passed]


def test_asserts_and_answers_stay_outside(sandbox: Sandbox):
    """The program searches its whole memory; the numbers of the test are not in it."""
    asked = {"entry_point": "add", "test": "assert add(3, 4) == 987654 - 987647"}
    search = (
        "import gc, sys\n"
        "def add(a, b):\n"
        "    needle, seen, frame = str(493827 * 2), set(), sys._getframe()\n"
        "    left = [sys.modules['__main__'].__dict__]\n"
        "    while frame:\n"
        "        left.append(frame.f_locals)\n"
        "        frame = frame.f_back\n"
        "    left = [o for each in left for o in each.values() if o is not needle]\n"
        "    for _ in range(4):\n"
        "        if any(needle in o for o in left if type(o) is str and o is not needle):\n"
        "            return 0\n"
        "        left = [o for o in left if id(o) not in seen and type(o) in (dict, list, tuple)]\n"
        "        seen.update(map(id, left))\n"
        "        left = gc.get_referents(*left)\n"
        "    return a + b"
    )
    assert run_tests(sandbox, search, read_tests(json.dumps(asked)), 20.0).passed


def test_a_test_may_expect_an_error_and_use_the_prompts_helpers(sandbox: Sandbox):
    asked = {
        "entry_point": "half",
        "prompt": "import math\ndef double(x):\n    return 2 * x\ndef half(x):\n    '''x / 2'''\n",
        "test": "def check(candidate):\n    assert math.isclose(double(candidate(3)), 3)\n"
        "    try:\n        candidate('x')\n    except TypeError:\n        return\n    assert False",
    }
    tests = read_tests(json.dumps(asked))
    assert run_tests(sandbox, "    return x / 2\n", tests, 20.0).passed, "goes on where it stops"
    assert run_tests(sandbox, "def half(x):\n    return double(x) / 4", tests, 20.0).passed
    assert not run_tests(sandbox, "def half(x):\n    return float(x) / 2", tests, 20.0).passed


def test_a_test_that_asks_nothing_is_refused(sandbox: Sandbox):
    tests = read_tests(json.dumps({"entry_point": "f", "test": "def check(f): pass"}))
    with pytest.raises(DataError, match="must call what it tests"):
        run_tests(sandbox, "def f(): return 1", tests, 20.0)


def test_time_is_shared_by_the_tests_of_a_completion(sandbox: Sandbox):
    tests = Scripts((("", ""),) * 5)
    ran = run_tests(sandbox, "import time; time.sleep(1.2)", tests, 3.0)
    assert ran.outcome == "timeout" and 1 <= ran.num_passed <= 2


def test_verdicts_come_through_the_pool(sandbox: Sandbox):
    """A loop costs itself its verdict and nobody else; each has the deadline for itself."""
    prompt = Prompt.make(
        (Message("user", "add"),),
        capability="code",
        reward="code",
        answer=json.dumps(ASKED["scripts"]),
    )
    texts = [PRINT, "while True: pass", f"```python\n{PRINT}```", "print(7)"]
    settings = SandboxSettings(seconds=1.5)
    with RewardPool(1, 30.0, sandbox=settings) as pool:
        scored = pool.score(prompt, texts)
        assert pool.stats()["restarts"] == 0 and not any(each.error for each in scored)
    assert [each.reward for each in scored] == [1, 0, 1, 0]
    assert scored[1].parts == {"tests": 0.0, "timeout": 1.0}
    assert scored[3].parts == {"tests": 0.5, "timeout": 0.0}


def test_a_sandbox_that_no_longer_starts_fails_the_group_and_not_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = shutil.which("bwrap")
    if missing := absent("bubblewrap"):
        pytest.skip(missing)
    assert program is not None
    (tmp_path / "bwrap").symlink_to(program)
    monkeypatch.setenv("PATH", str(tmp_path))
    prompt = Prompt.make(
        (Message("user", "add"),),
        capability="code",
        reward="code",
        answer=json.dumps(ASKED["scripts"]),
    )
    with RewardPool(1, 30.0, sandbox=SandboxSettings(tier="bubblewrap")) as pool:
        assert [each.reward for each in pool.score(prompt, [PRINT])] == [1]
        (tmp_path / "bwrap").unlink()
        with pytest.raises(InfraError, match="a sandbox must start, got: FileNotFoundError"):
            pool.score(prompt, [PRINT])
        assert pool.pids == [] and pool.stats()["texts"] == 1


@pytest.mark.parametrize(
    "answer",
    [
        "7",
        "{}",
        "[1]",
        '{"inputs": [], "outputs": []}',
        '{"inputs": ["1"], "outputs": []}',
        '{"inputs": [1], "outputs": [1]}',
        '{"inputs": [3], "outputs": [7], "fn_name": "add"}',
        '{"inputs": [[3]], "outputs": [7], "fn_name": "os.system"}',
        '{"entry_point": "f", "test": ""}',
        '{"entry_point": "f", "test": "assert ("}',
        '{"test": "assert f(1)"}',
    ],
)
def test_an_answer_without_tests_says_what_it_must_be(answer: str):
    with pytest.raises(DataError, match="answer must be JSON like"):
        read_tests(answer)


def test_the_three_layouts():
    assert TESTS["scripts"] == Scripts((("3 4\n", "7\n"), ("10 -2", "8\n")))
    assert TESTS["calls"] == Calls("add", (((3, 4), 7), ((10, -2), 8)), 1e-9)
    check = read_tests(json.dumps({"entry_point": "f", "test": "f(1)", "prompt": "def f(x):"}))
    assert check == Check("f", preamble="", test="f(1)", opening="def f(x):")


@pytest.mark.parametrize("kind", ["scripts", "calls"])
def test_the_first_tests_of_many_are_run(kind: str):
    asked = {
        key: each * 20 if isinstance(each, list) else each for key, each in ASKED[kind].items()
    }
    tests, two = read_tests(json.dumps(asked)), TESTS[kind]
    assert not isinstance(tests, Check) and not isinstance(two, Check)
    assert tests.pairs == two.pairs * 16 and len(tests.pairs) == MAX_PAIRS == 32


def test_the_program_in_a_completion():
    assert program_of("x = 1") == "x = 1"
    two = "```python\ndef f(): 1\n```\nso\n```py\nf()\n```\n```bash\nls\n```"
    assert program_of(two) == "f()\n"
    assert program_of(two, "f") == "def f(): 1\n"
    assert program_of("```python\nx = 1") == "```python\nx = 1", "a fence that is not closed"


@pytest.mark.parametrize(
    ("value", "wanted", "same"),
    [
        ((1, [2.0]), [1, [2]], True),
        (0.1 + 0.2, 0.3, True),
        (0.3001, 0.3, False),
        (True, True, True),
        (True, 1, False),
        (1, True, False),
        (10**400, 1.0, False),
        (10**20, 10**20 + 1, False),
        (float("nan"), 1.0, False),
        ({"a": (1,)}, {"a": [1]}, True),
        ({1: 1}, {"1": 1}, False),
        ([1, 2], [1, 2, 3], False),
        ({1, 2}, [1, 2], False),
        (None, None, True),
        ("7", 7, False),
        (b"7", "7", False),
    ],
)
def test_values_are_compared_strictly(value: object, wanted: object, same: bool):
    assert same_value(value, wanted, 1e-9) is same


def test_outputs_are_compared_line_by_line():
    assert same_output("7 \n8\n\n", "7\n8")
    assert not same_output("7 8", "7\n8") and not same_output(" 7", "7")


def test_only_plain_values_travel():
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    values = [1, -0.0, 2**70, 1j, "ä\ud800", b"\x00", (1,), [{1, 2}], {"a": frozenset({1})}, None]
    for value in values:
        travelled = decode(json.loads(json.dumps(encode(value))))
        assert travelled == value and type(travelled) is type(value)
    assert math.copysign(1, decode(encode(-0.0))) == -1
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan)))))
    assert type(decode(encode(Liar(3)))) is int and decode(encode(Liar(3))) != 4
    loop: list[object] = []
    loop.append(loop)
    for bad in (object(), int, (each for each in ()), loop):
        with pytest.raises(TypeError):
            encode(bad)


def test_without_a_sandbox_nothing_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SetupError, match="none holds on this machine") as caught:
        sandbox_for(SandboxSettings(tier="bubblewrap"))
    assert "allow_unsafe" in caught.value.fix and "not installed" in caught.value.why
    named = SandboxSettings(tier="bubblewrap", allow_unsafe=True)
    assert sandbox_for(named).tier == "none"


@needs_humaneval
@pytest.mark.slow
def test_all_of_humaneval_passes_and_a_mutant_of_each_fails(sandbox: Sandbox):
    rows = [json.loads(line) for line in gzip.decompress(HUMANEVAL.read_bytes()).splitlines()]
    assert len(rows) == 164

    def verdicts(row: dict[str, str]) -> list[bool]:
        tests = read_tests(json.dumps({key: row[key] for key in ("prompt", "entry_point", "test")}))
        right = row["canonical_solution"]
        mutant = f"```python\n{mutated(row)}\n```"
        return [run_tests(sandbox, text, tests, 10.0).passed for text in (right, mutant)]

    with ThreadPoolExecutor(2) as threads:
        results = dict(
            zip((row["task_id"] for row in rows), threads.map(verdicts, rows), strict=True)
        )
    assert not {name: passed for name, passed in results.items() if passed != [True, False]}
