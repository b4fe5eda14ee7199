"""Faults #16 to #24 on real processes: whatever a reward does, its neighbours get their verdict.

The completion names the misdeed: `bad_reward` below does what the text says.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from ground.errors import DataError, InfraError, RecipeError
from ground.records import Message, Prompt
from rollout.reward_pool import RewardPool, ScoredText
from rollout.rewards import RewardError

BAD_REWARD = '''
import ctypes, os, random, subprocess, sys, time
from rollout.rewards import Score, reward

class Unpicklable(Exception):
    def __init__(self):
        self.lock = __import__("threading").Lock()
    def __str__(self):
        raise RuntimeError("no text either")

def daemon(seconds=300):
    """Fork twice and leave the session, as daemons do."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(seconds)
        os._exit(0)
    time.sleep(0.1)

def act(text):
    exec(text, {**globals(), "random": random})
    return 1.0

@reward("bad")
def bad(prompts, completions, **columns):
    return [act(c[0]["content"]) for c in completions]

@reward("returns")
def returns(prompts, completions, **columns):
    return eval(completions[0][0]["content"])

@reward("spoils")
def spoils(prompts, completions, answer, **columns):
    texts = [c[0]["content"] for c in completions]
    values = [float(a == "right" and text == "text") for a, text in zip(answer, texts)]
    answer.clear(), completions[0].clear(), prompts.clear()
    return values

@reward("drifts")
def drifts(prompts, completions, **columns):
    return [random.random() for c in completions]
'''
GOOD = ScoredText(1.0, True)


def prompt(reward: str = "bad", answer: str = "right") -> Prompt:
    return Prompt.make((Message("user", "?"),), capability="a", reward=reward, answer=answer)


@pytest.fixture(scope="module")
def bad_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "bad_rewards.py"
    path.write_text(BAD_REWARD)
    return path


@pytest.fixture
def pool(bad_file: Path) -> Iterator[RewardPool]:
    """A patient one: a busy machine must not look like a hang."""
    with RewardPool(1, 20.0, [bad_file]) as pool:
        yield pool
        pids = pool.pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.fixture
def hasty(bad_file: Path) -> Iterator[RewardPool]:
    """For what really hangs; each hang costs its deadline twice."""
    with RewardPool(1, 3.0, [bad_file]) as pool:
        yield pool


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    """Something in the environment of all processes that this test starts, and of no others."""
    monkeypatch.setenv("REWARD_TEST", name := secrets.token_hex(8))
    return name


def marked_processes(own: str) -> set[int]:
    """Processes that were started by, or forked from, a reward process of this test."""
    found = set()
    for process in psutil.process_iter():
        try:
            lives = process.status() != psutil.STATUS_ZOMBIE
            environment = process.environ() if lives else {}
            if environment.get("REWARD_TEST") == own and "PACKTRAIN_REWARD_PROCESS" in environment:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def test_verdicts_come_in_the_order_of_the_texts(pool: RewardPool):
    texts = ["=>9", "=>8", "9", "1;=>9"]
    passed = [scored.passed for scored in pool.score(prompt("exact", "9"), texts)]
    assert passed == [True, False, False, True]
    assert pool.score(prompt("exact", "9"), []) == []


def test_text_survives_the_journey(pool: RewardPool):
    text = "=>ä\u2028\n\x00\ud800\"'{}" + "x" * 300_000
    answer = text[2:].replace("\ud800", "")
    passed = [s.passed for s in pool.score(prompt("exact", answer), [f"=>{answer}", text])]
    assert passed == [True, False], "half a character more is another answer"


def test_an_outside_kill_costs_no_verdict(pool: RewardPool, tmp_path: Path):
    """#16: the process dies while idle, then while it scores; both times the answer is right."""
    pool.score(prompt(), ["pass"])
    victim = pool.pids[0]
    os.kill(victim, signal.SIGKILL)
    assert pool.score(prompt(), ["pass"]) == [GOOD]
    assert not psutil.pid_exists(victim)

    begun = tmp_path / "begun"

    def kill_once_it_scores() -> None:
        while not begun.exists():
            time.sleep(0.02)
        os.kill(pool.pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_once_it_scores, name="killer")
    killer.start()
    sleep_once = f"p = {str(begun)!r}\nif not os.path.exists(p): open(p, 'w'); time.sleep(15)"
    assert pool.score(prompt(), [sleep_once]) == [GOOD]
    killer.join()
    assert pool.stats()["restarts"] == 2


@pytest.mark.parametrize(
    "misdeed", ["while 1: pass", "10 ** 10 ** 10", "time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"]
)
def test_a_hang_scores_zero_with_its_reason_and_spares_the_others(hasty: RewardPool, misdeed: str):
    """#17"""
    asked = prompt()
    start = time.monotonic()
    first, hung, last = hasty.score(asked, ["pass", misdeed, "pass"])
    assert time.monotonic() - start < 15, "twice its deadline, and two starts on a busy machine"
    assert (first, last) == (GOOD, GOOD)
    assert (hung.reward, hung.passed) == (0.0, False)
    assert hung.error.startswith("reward_timeout: no reply within 3 s")
    assert f"reward bad, prompt {asked.id}, sample 1" in hung.error


@pytest.mark.parametrize(
    ("misdeed", "name"),
    [
        ("raise ValueError('v')", "ValueError: v"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise BaseException('b')", "BaseException: b"),
        ("raise Unpicklable()", "Unpicklable: (its message cannot be read)"),
        ("raise MemoryError", "MemoryError"),
        ("x = [0] * (1 << 40)", "MemoryError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("raise ExceptionGroup('g', [ValueError()])", "ExceptionGroup: g"),
        ("raise StopIteration", "StopIteration"),
        ("raise ValueError('long' * 100000)", "ValueError: long"),
    ],
)
def test_a_raise_of_any_kind_is_told_with_prompt_and_sample(
    pool: RewardPool, misdeed: str, name: str
):
    """#18"""
    asked = prompt()
    good, raised = pool.score(asked, ["pass", misdeed])
    assert good == GOOD and not raised.passed and raised.reward == 0
    assert raised.error.startswith(f"reward_raised: {name}"), raised.error
    assert f"prompt {asked.id}, sample 1" in raised.error and len(raised.error) < 1000


def test_what_a_reward_forks_is_gone_after_the_call(own: str, pool: RewardPool, hasty: RewardPool):
    """#19: daemons with a session of their own, after a good call, a hang and an early exit."""
    before = marked_processes(own)
    pool.score(prompt(), ["pass"])
    (child,) = marked_processes(own) - before
    fork_and_stay = "subprocess.Popen(['sleep', '300'], start_new_session=True); daemon()"
    assert pool.score(prompt(), [fork_and_stay, "daemon()"]) == [GOOD, GOOD]
    assert marked_processes(own) - before == {child}
    assert pool.score(prompt(), ["daemon(); os._exit(0)"])[0].error.startswith("reward_died")
    (hung,) = hasty.score(prompt(), ["daemon(); time.sleep(60)"])
    assert hung.error.startswith("reward_timeout")
    assert marked_processes(own) - before <= {*pool.pids, *hasty.pids}


def test_a_flood_of_output_blocks_nothing(bad_file: Path):
    """#20: 256 MiB on stdout and stderr."""
    with RewardPool(1, 20.0, [bad_file]) as pool:
        flood = "for _ in range(2048): os.write(1, b'A' * 65536); os.write(2, b'B' * 65536)"
        assert pool.score(prompt(), [flood]) == [GOOD]
        (died,) = pool.score(prompt(), ["print('last words'); sys.stdout.flush(); os._exit(3)"])
        assert "exit code 3" in died.error and "last words" in died.error
        assert len(died.error) < 600


@pytest.mark.parametrize(
    ("misdeed", "cause"),
    [
        ("os._exit(0)", "exit code 0"),
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("ctypes.string_at(0)", "SIGSEGV"),
        ("os.closerange(3, 4096); time.sleep(0.3)", ""),
    ],
)
def test_an_end_without_a_reply_is_no_success(pool: RewardPool, misdeed: str, cause: str):
    """#21"""
    good, died = pool.score(prompt(), ["pass", misdeed])
    assert good == GOOD
    assert not died.passed and died.error.startswith("reward_died: ") and cause in died.error


def test_a_forged_reply_is_refused(pool: RewardPool):
    """#21: the reward writes a verdict on the private socket itself, without the nonce."""
    forge = """
import json
verdict = {"reward": 9, "passed": True, "parts": {}}
line = json.dumps({"verdicts": [verdict], "drifted": False, "nonce": "0"})
for fd in sorted(map(int, os.listdir("/proc/self/fd")))[3:]:
    try: os.write(fd, line.encode() + b"\\n")
    except OSError: pass
time.sleep(60)  # it is read alone, and that ends us
"""
    (scored,) = pool.score(prompt(), [forge])
    assert scored.reward == 0 and not scored.passed
    assert scored.error.startswith("reward_died: it replied to another question")


@pytest.mark.parametrize("returned", ["[]", "[1.0, 1.0]", "1.0", "None", "'1'", "(x for x in [1])"])
def test_a_wrong_length_names_function_got_and_want(pool: RewardPool, returned: str):
    """#22"""
    (scored,) = pool.score(prompt("returns"), [returned])
    assert scored.error.startswith("reward_raised: RewardError")
    assert "returns: a reward must return a list of 1 numbers for 1 completions" in scored.error


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("[float('nan')]", "reward_refused: must be a finite number, got nan"),
        ("[float('-inf')]", "reward_refused: must be a finite number, got -inf"),
        ("[None]", "reward_refused: must be a number, got NoneType"),
        ("['1']", "reward_refused: must be a number, got str"),
        ("[10**400]", "reward_refused: must be a number, got int"),
        ("[1e9]", "reward_refused: must lie within ±1e+06, got 1e+09"),
        ("[Score(0.5, True, {'x': float('inf')})]", "reward_refused: part 'x' must be a finite"),
    ],
)
def test_what_is_no_number_never_enters_the_mean(pool: RewardPool, returned: str, expected: str):
    """#23"""
    (scored,) = pool.score(prompt("returns"), [returned])
    assert scored.error.startswith(expected) and (scored.reward, scored.passed) == (0.0, False)


@pytest.mark.parametrize(
    ("returned", "reward", "passed"),
    [
        ("[True]", 1.0, True),
        ("[0.5]", 0.5, False),
        ("__import__('numpy').ones(1)", 1.0, True),
        ("[Score(-0.25, True, {'length': -1.25})]", -0.25, True),
    ],
)
def test_what_is_a_number_in_disguise_is_normalised(
    pool: RewardPool, returned: str, reward: float, passed: bool
):
    """#23"""
    (scored,) = pool.score(prompt("returns"), [returned])
    assert (scored.reward, scored.passed, scored.error) == (reward, passed, "")


def test_spoilt_inputs_spoil_nobody_elses(pool: RewardPool):
    """#24"""
    texts = ["text", "text", "other"]
    for _ in range(2):
        assert [s.passed for s in pool.score(prompt("spoils"), texts)] == [True, True, False]
    assert texts == ["text", "text", "other"]


def test_the_audit_flags_a_reward_that_is_not_deterministic(bad_file: Path):
    """#24"""
    with RewardPool(1, 5.0, [bad_file], audit_every=2) as pool:
        for _ in range(4):
            pool.score(prompt("drifts"), ["a"])
            pool.score(prompt("exact", "9"), ["=>9"])
        assert pool.stats()["drifted"] == 0, "the second of each pair is audited: exact is stable"
        pool.score(prompt("exact", "9"), ["=>9"])
        pool.score(prompt("drifts"), ["a"])
        assert pool.stats()["drifted"] == 1


def test_a_broken_function_is_told_from_bad_completions(pool: RewardPool):
    """#18: failing on sixteen prompts in a row raises; one verdict in between starts anew."""
    for _ in range(15):
        pool.score(prompt(), ["1 / 0"])
    pool.score(prompt(), ["1 / 0", "pass"])
    for _ in range(15):
        pool.score(prompt(), ["1 / 0"])
    with pytest.raises(RewardError, match="'bad' failed on every completion of 16 prompts"):
        pool.score(prompt(), ["1 / 0"])


def test_an_unknown_reward_names_the_prompt_and_the_nearest(pool: RewardPool):
    asked = prompt("returnz")
    with pytest.raises(DataError) as caught:
        pool.score(asked, ["x"])
    assert caught.value.where == f"prompt {asked.id}" and "'returns'" in caught.value.fix


def test_a_file_that_does_not_load_is_told_at_the_first_call(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("import math\nmath.nonsense\n")
    with RewardPool(1, 5.0, [path]) as pool, pytest.raises(RecipeError, match=f"{path}:2"):
        pool.score(prompt("exact"), ["x"])


def test_many_threads_share_few_processes(bad_file: Path):
    with RewardPool(2, 5.0, [bad_file]) as pool, ThreadPoolExecutor(8) as threads:
        results = list(
            threads.map(lambda n: pool.score(prompt("exact", str(n)), [f"=>{n}", "=>x"]), range(64))
        )
        assert len(pool.pids) == 2
    assert [[s.passed for s in result] for result in results] == [[True, False]] * 64


def test_closing_ends_calls_under_way(bad_file: Path):
    pool = RewardPool(1, 30.0, [bad_file])
    pool.score(prompt(), ["pass"])
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(pool.score, prompt(), ["time.sleep(60)"])
        time.sleep(0.3)
        pool.close()
        with pytest.raises(InfraError, match="closed"):
            call.result(timeout=10)
    pool.close()
    with pytest.raises(InfraError, match="closed"):
        pool.score(prompt(), ["pass"])
    assert pool.pids == []


def test_children_do_not_outlive_a_killed_parent(bad_file: Path, tmp_path: Path):
    program = tmp_path / "parent.py"
    program.write_text(
        "import sys, pathlib\nfrom rollout.reward_pool import RewardPool\n"
        "from ground.records import Message, Prompt\n"
        "p = Prompt.make((Message('user', '?'),), capability='a', reward='bad', answer='')\n"
        "pool = RewardPool(1, 300.0, [pathlib.Path(sys.argv[1])])\n"
        "pool.score(p, ['pass'])\nprint(pool.pids[0], flush=True)\n"
        "pool.score(p, ['time.sleep(300)'])\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(program), str(bad_file)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=5)
    assert not psutil.pid_exists(child)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="got 0 and 1"):
        RewardPool(0, 1.0)
    with pytest.raises(ValueError, match="got 1 and 0"):
        RewardPool(1, 0.0)
