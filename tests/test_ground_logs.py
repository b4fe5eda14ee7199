"""Canary secrets never reach a log, whatever the handler and whoever logs."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ground.logs import (
    install_redaction,
    raw_output_redacted,
    redact,
    redact_tree,
    setup_logging,
)

CANARIES = {
    "hugging face": "hf_QwErTyUiOpAsDfGhJkLzXcVb",
    "openai": "sk-proj-a1B2c3D4e5F6g7H8i9J0",
    "github": "ghp_a1B2c3D4e5F6g7H8i9J0k1L2",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "wandb": "wandb_v1_a1B2c3D4e5F6g7H8i9J0",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
}
SENTENCES = {
    "Authorization: Bearer abcdefgh12345678": "abcdefgh12345678",
    'headers={"authorization": "Basic dXNlcjpwYXNz"}': "dXNlcjpwYXNz",
    "cloning https://user:pa55w0rd@example.org/repo": "pa55w0rd",
    "redis://:s3cr3tpass@host:6379": "s3cr3tpass",
    f"WANDB_API_KEY={'0123456789' * 4}": "0123456789" * 4,
    "password: correcthorsebattery": "correcthorsebattery",
    "'secret_access_key': 'wJalrXUtnFEMI/K7MDENG'": "wJalrXUtnFEMI",
}
HARMLESS = [
    "max_new_tokens=64 eos_token: <|eot|> tokens/s=812.5",
    "commit 0123456789abcdef0123456789abcdef01234567",
    "loading https://example.org/a:b/c@d and s3://bucket/key",
    "num_tokens=123456789012 token_ids=[1, 2, 3]",
]


@pytest.fixture
def clean_logging():
    """Restore the process's logging afterwards."""
    factory, root = logging.getLogRecordFactory(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = handlers, level
    logging.setLogRecordFactory(factory)


@pytest.mark.parametrize("secret", CANARIES.values(), ids=CANARIES.keys())
def test_tokens_of_known_shape_are_removed(secret):
    assert redact(f"got {secret}, going on") == "got [redacted], going on"


@pytest.mark.parametrize(("sentence", "secret"), SENTENCES.items())
def test_secrets_are_known_by_their_surroundings(sentence, secret):
    assert secret not in redact(sentence)
    assert "[redacted]" in redact(sentence)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_values_of_secret_environment_variables_are_removed(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plainlookingvalue")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("EDITOR_NAME", "unremarkable")
    text = "plainlookingvalue abc unremarkable"
    assert redact(text) == "[redacted] abc unremarkable"


def test_trees_lose_secrets_in_values_and_under_telling_names():
    tree = {"api_key": "longenough1", "nested": ["x", {"note": CANARIES["aws"]}], "steps": 3}
    assert redact_tree(tree) == {
        "api_key": "[redacted]",
        "nested": ["x", {"note": "[redacted]"}],
        "steps": 3,
    }


def test_no_canary_reaches_the_log_file_or_a_library_s_own_handler(
    tmp_path: Path, clean_logging, capsys
):
    file = tmp_path / "log" / "sft.log"
    setup_logging(file)
    stream = io.StringIO()
    library = logging.getLogger("some.package")
    library.addHandler(logging.StreamHandler(stream))
    for name, secret in CANARIES.items():
        library.warning("%s: %s", name, secret)
    try:
        raise ConnectionError(f"refused for {CANARIES['openai']}")
    except ConnectionError:
        library.exception("cannot log in")
    written = file.read_text() + stream.getvalue() + capsys.readouterr().err
    assert "cannot log in" in file.read_text() and "ConnectionError" in stream.getvalue()
    assert not [secret for secret in CANARIES.values() if secret in written]


def test_bare_output_of_a_killed_process_keeps_its_last_lines_and_no_secret(tmp_path: Path):
    """Raw bytes, carriage returns and a last line without end stay as they are."""
    secret = CANARIES["openai"]
    code = (
        "import os, signal, sys\n"
        f"os.write(2, b'10%\\r20%\\r\\xff token {secret} used\\nthe last words')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "before.err").write_text(f"left by a killed run: {secret}\n")
    clean = tmp_path / "clean.err"
    clean.write_text("nothing to hide\n")
    untouched = clean.stat().st_ino
    with raw_output_redacted(tmp_path, "*.err"):
        assert (tmp_path / "before.err").read_text() == "left by a killed run: [redacted]\n"
        with (tmp_path / "learner.err").open("ab") as log:
            killed = subprocess.run([sys.executable, "-c", code], stderr=log, timeout=60)
    assert killed.returncode == -9
    assert (tmp_path / "learner.err").read_bytes() == (
        b"10%\r20%\r\xff token [redacted] used\nthe last words"
    )
    assert clean.stat().st_ino == untouched


def test_a_full_disk_at_redaction_does_not_hide_how_the_process_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "x.err").write_text(CANARIES["aws"])
    monkeypatch.setattr("ground.storage.os.replace", full)
    with pytest.raises(ZeroDivisionError), raw_output_redacted(tmp_path, "*.err"):
        raise ZeroDivisionError
    assert "secrets may be left in" in caplog.text


def test_redaction_can_be_installed_twice(clean_logging):
    install_redaction()
    install_redaction()
    record = logging.getLogger("x").makeRecord("x", 20, "f", 1, "a %s b", ("c",), None)
    assert record.getMessage() == "a c b"
