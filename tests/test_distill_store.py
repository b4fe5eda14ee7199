"""The store of teacher targets: one pass per row and no more, and nobody else's word (#71, #72)."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from conftest import TINY_CHAT_TEMPLATE, make_tiny_model, make_tiny_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distill.filling import Estimate, fill, require_room
from distill.identity import Identity, identity_of, token_ids
from distill.shard import KEY_BYTES, StoredRow, StrangerError, write_shard
from distill.store import TargetStore, TokenRow, identities
from distill.targets import TargetFormat, TeacherTargets
from distill.teacher import Teacher
from ground.errors import DataError, SetupError
from ground.logprobs import model_logprobs
from ground.model import load_model

WHOSE = Identity("teacher@0123456789abcdef", "aa", "bb", 262, "topk_tail k=4")
FORMAT = TargetFormat("topk_tail", count=4, always=(260,))
ROWS = [
    TokenRow(
        (256, *(5 + n % 7 for n in range(length)), 260), (False, *([n % 2 == 0] * length), True)
    )
    for n, length in enumerate((3, 9, 4, 30, 5, 3))
]


class CountedTeacher:
    """Loads a teacher on demand, and tells how often."""

    def __init__(self, path: Path, format: TargetFormat = FORMAT, pass_tokens: int = 64) -> None:
        self.path, self.format, self.pass_tokens = path, format, pass_tokens
        self.times_loaded = 0

    def __call__(self) -> Teacher:
        self.times_loaded += 1
        model = load_model(self.path)
        return Teacher(model, self.format, vocabulary=262, pass_tokens=self.pass_tokens)


def opened(folder: Path, whose: Identity = WHOSE) -> TargetStore:
    return TargetStore(folder, whose, "topk_tail")


def made(num_tokens: int = 3, seed: int = 0) -> TeacherTargets:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_tokens, 262, generator=generator)
    return FORMAT.make(logits, torch.arange(num_tokens))


def filled(folder: Path, keys: list[bytes]) -> TargetStore:
    store = opened(folder)
    with store.writer() as writer:
        for seed, key in enumerate(keys):
            writer.insert(key, made(seed=seed))
    return store


def key(letter: str) -> bytes:
    return letter.encode() * KEY_BYTES


def test_what_the_teacher_says_is_what_its_log_probs_say(tiny_model: Path):
    """Of a row in company of longer ones, at the trained tokens only; the tail is the rest."""
    model = load_model(tiny_model)
    teacher = Teacher(model, FORMAT, vocabulary=262, pass_tokens=200)
    said = dict(teacher.speak(ROWS))
    assert teacher.num_rows == len(ROWS)
    for row in ROWS:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            logprobs, _ = model_logprobs(model, ids, torch.ones_like(ids))
            logits = model(ids).logits[0, :, :262]
        targets = said[row]
        assert len(targets) == len(row.places) == sum(row.is_trained)
        assert targets.ids_TK is not None
        assert targets.ids_TK[:, 0].tolist() == [row.ids[place] for place in row.places]
        # Two rows of the head stand for no token: their mass is dealt out among the others.
        missing = logits.logsumexp(-1) - model(ids).logits[0].logsumexp(-1)
        want = logprobs[0, row.places] - missing[[place - 1 for place in row.places]]
        torch.testing.assert_close(targets.realised_T, want, atol=1e-4, rtol=0)
        whole = targets.logprobs_TK.exp().sum(-1) + targets.tail_T.exp()
        torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-5, rtol=0)


def test_the_second_epoch_costs_no_teacher_pass(tiny_model: Path, tmp_path: Path):
    teacher = CountedTeacher(tiny_model)
    first = fill(opened(tmp_path), ROWS, teacher)
    assert (first.rows, first.hits, first.passes) == (6, 0, 6)
    again = fill(opened(tmp_path), ROWS, teacher)
    assert (again.hits, again.passes, teacher.times_loaded) == (6, 0, 1)
    more = fill(opened(tmp_path), [*ROWS, TokenRow((256, 9, 9), (False, True, True))], teacher)
    assert (more.hits, more.passes, more.tokens) == (6, 1, 2)
    alone = next(iter(teacher().speak([ROWS[3]])))[1]
    stored = opened(tmp_path).read(ROWS[3].key)
    torch.testing.assert_close(stored.logprobs_TK, alone.logprobs_TK, atol=4e-3, rtol=1e-3)


def test_which_tokens_are_trained_is_part_of_the_key():
    row = ROWS[0]
    assert row.key != replace(row, is_trained=(False, False, False, False, True)).key
    assert row.key != replace(row, ids=(*row.ids[:-1], 259)).key


@pytest.mark.parametrize("kind", ["full", "topk_tail", "sampled"])
def test_half_precision_moves_no_probability_by_half_a_percent(kind):
    format = TargetFormat(kind, count=20, always=(3,))
    logits = 3 * torch.randn(5, 262, generator=torch.Generator().manual_seed(1))
    targets = format.make(logits, torch.arange(5), torch.Generator().manual_seed(2))
    back = StoredRow.of(key("a"), targets).targets(kind)
    assert back.kind == kind
    whole = back.logprobs_TK.exp().sum(-1) + back.tail_T.exp()
    torch.testing.assert_close(whole, torch.ones(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        back.logprobs_TK.exp(), targets.logprobs_TK.exp(), atol=1e-7, rtol=5e-3
    )
    torch.testing.assert_close(back.tail_T.exp(), targets.tail_T.exp(), atol=1e-7, rtol=5e-3)
    size = sum(column.nbytes for column in StoredRow.of(key("a"), targets).columns.values())
    assert size == 5 * format.bytes_per_token(262)


def test_a_cut_shard_is_named_and_its_rows_are_made_again(tmp_path: Path, tiny_model: Path, caplog):
    teacher = CountedTeacher(tiny_model)
    fill(opened(tmp_path), ROWS, teacher)
    (shard,) = tmp_path.glob("*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        store = opened(tmp_path)
    assert shard.name in caplog.text and "cut off or damaged" in caplog.text
    assert store.num_rows == 0
    assert fill(store, ROWS, teacher).passes == 6
    assert opened(tmp_path).num_rows == 6


@pytest.mark.parametrize("format", ["topk_tail k=4", "full"])
def test_a_shard_without_its_format_s_columns_is_named(tmp_path: Path, format: str, caplog):
    """Ids are lost where the format has them, or are there where it has none."""
    whose = replace(WHOSE, format=format)
    has_ids = format == "full"
    stored = StoredRow.of(key("a"), made())
    columns = {name: each for name, each in stored.columns.items() if has_ids or name != "ids"}
    (tmp_path / whose.name).mkdir()
    path = write_shard(tmp_path / whose.name, whose, [replace(stored, columns=columns)])
    assert opened(tmp_path, whose).num_rows == 0
    assert f"{path}: the shard is damaged: its parts do not fit each other" in caplog.text


def test_a_flipped_bit_is_named_refused_and_made_again(tmp_path: Path, tiny_model: Path, caplog):
    """In the numbers of one row: the others are read as before."""
    teacher = CountedTeacher(tiny_model)
    store = opened(tmp_path)
    fill(store, ROWS, teacher)
    (shard,) = tmp_path.glob("*/*.safetensors")
    content, want = bytearray(shard.read_bytes()), store.read(ROWS[3].key)
    needle = StoredRow.of(b"", want).columns["ids"].tobytes()
    content[content.index(needle)] ^= 1
    shard.unlink()
    shard.with_name("0.safetensors").write_bytes(content)  # read before any other
    damaged = opened(tmp_path)
    with pytest.raises(DataError, match=r"row \d+ was changed: its checksum differs"):
        damaged.read(ROWS[3].key)
    damaged.read(ROWS[1].key)
    again = fill(damaged, ROWS, teacher)
    assert (again.hits, again.passes) == (5, 1)
    assert "checksum differs; it is made again" in caplog.text
    assert torch.equal(damaged.read(ROWS[3].key).logprobs_TK, want.logprobs_TK)
    later = fill(opened(tmp_path), ROWS, teacher)
    assert (later.hits, later.passes) == (6, 0), "the sound copy counts, not the damaged one"


def test_targets_of_another_teacher_are_refused_by_name(tmp_path: Path):
    """A shard that was copied over, and a folder that was renamed."""
    other = replace(WHOSE, teacher="newer@fedcba9876543210")
    filled(tmp_path, [key("a")])
    assert opened(tmp_path, other).num_rows == 0
    with opened(tmp_path, other).writer() as writer:
        writer.insert(key("b"), made())
    theirs, ours = (tmp_path / each.name for each in (other, WHOSE))
    (strange,) = theirs.glob("*.safetensors")
    shutil.copy(strange, ours)
    with pytest.raises(
        StrangerError, match="teacher newer@fedcba9876543210 instead of teacher@0123"
    ):
        opened(tmp_path)
    assert {each.name for each in identities(tmp_path)} == {WHOSE.name, other.name}
    shutil.rmtree(ours)
    theirs.rename(ours)
    with pytest.raises(StrangerError, match="teacher newer@fedcba"):
        opened(tmp_path)


@pytest.mark.parametrize("said", ['{"teacher": "ol', "{}", "[]"])
def test_a_neighbour_whose_identity_is_torn_is_named_and_left_out(tmp_path: Path, said, caplog):
    filled(tmp_path, [key("a")])
    torn = tmp_path / "0123456789abcdef" / "identity.json"
    torn.parent.mkdir()
    torn.write_text(said)
    assert [each.name for each in identities(tmp_path)] == [WHOSE.name]
    assert f"{torn}: this " in caplog.text and "it is left out" in caplog.text


@pytest.mark.parametrize("part", ["tokenizer", "template", "format"])
def test_what_else_differs_is_named(tmp_path: Path, part: str):
    store = filled(tmp_path, [key("a")])
    other = replace(WHOSE, **{part: "other"})
    store.folder.rename(tmp_path / other.name)
    with pytest.raises(StrangerError, match=f"{part} .* instead of other"):
        opened(tmp_path, other)


def test_a_teacher_that_was_moved_is_the_same(tmp_path: Path):
    filled(tmp_path, [key("a")])
    assert opened(tmp_path, replace(WHOSE, teacher="moved@0123456789abcdef")).num_rows == 1


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path):
    """Four writers with four rows each, one of them the same in all, in files of one row."""
    barrier = Barrier(4)

    def write(number: int) -> None:
        store = opened(tmp_path)
        barrier.wait()
        with store.writer(tokens_per_shard=1) as writer:
            for letter in ("z", *(f"{chr(97 + number * 3 + n)}" for n in range(3))):
                writer.insert(key(letter), made(seed=ord(letter)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    store = opened(tmp_path)
    assert store.num_rows == 13
    for letter in "zabcdefghijkl":
        want = StoredRow.of(b"", made(seed=ord(letter))).targets("topk_tail")
        assert torch.equal(store.read(key(letter)).logprobs_TK, want.logprobs_TK)
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2770])
def test_whoever_may_use_the_store_s_folder_may_use_what_is_in_it(tmp_path: Path, mode: int):
    """Readers and writers are chosen by chmod of that folder, whatever the filler's umask."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    umask = os.umask(0o077)
    try:
        store = filled(folder, [key("a")])
        store.note_rate(100.0)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(store.folder.stat().st_mode) == mode
    files = list(store.folder.iterdir())
    assert {path.suffix for path in files} == {".json", ".safetensors"} and len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode & 0o666}


def permuted(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokens, two of them with each other's ids."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
        pad_token="<|pad|>",
    )
    other.chat_template = tokenizer.chat_template
    return other


def test_a_permuted_vocabulary_and_another_template_are_refused(tmp_path: Path):
    path, ours = make_tiny_model(tmp_path / "teacher"), make_tiny_tokenizer()
    whose = identity_of(path, ours, make_tiny_tokenizer(), "full")
    assert (whose.vocabulary, whose.teacher.partition("@")[0]) == (262, "teacher")
    with pytest.raises(DataError, match=r"id 64 is 'b' to the teacher and 'a' to the student"):
        identity_of(path, permuted(ours), ours, "full")
    other = make_tiny_tokenizer(TINY_CHAT_TEMPLATE.replace("\n\n", "\n"))
    with pytest.raises(DataError, match="their chat templates differ: line 2 has ") as caught:
        identity_of(path, other, ours, "full")
    assert "'' for the student" in caught.value.what, "the student's has an empty line there"
    assert "copy chat_template.jinja" in str(caught.value.fix)
    other = make_tiny_tokenizer(TINY_CHAT_TEMPLATE + "\n")
    with pytest.raises(DataError, match="line 6 has '' for the teacher and '<no such line>'"):
        identity_of(path, other, ours, "full")
    other = make_tiny_tokenizer()
    other.pad_token = "<|eot|>"
    with pytest.raises(DataError, match=r"pad_token is '<\|eot\|>' to the teacher and '<\|pad\|>'"):
        identity_of(path, other, ours, "full")
    retrained = make_tiny_model(tmp_path / "retrained" / "teacher", seed=1)
    assert identity_of(retrained, ours, ours, "full").name != whose.name


def test_named_tokens_are_looked_up():
    assert token_ids(make_tiny_tokenizer(), ["<|eot|>", "a"]) == (260, 64)
    with pytest.raises(DataError, match="'<eot>' is not a token"):
        token_ids(make_tiny_tokenizer(), ["<eot>"])


def test_a_disk_that_is_too_small_is_refused_before_the_teacher_is_loaded(tmp_path: Path):
    store = opened(tmp_path)
    require_room(store, Estimate(10, 10, 100, 200, 500))
    with pytest.raises(SetupError, match=r"the targets of 10 rows need 5e\+05 TB, .* are free"):
        require_room(store, Estimate(10, 10, 10**15, 200, 500))
