"""The commit protocol: whole or absent, damage named, the older one used, nothing lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crashpoints import crash_at_each_call, limited_file_size, old_then_new

from ground import storage
from ground.checkpoints import Checkpoints, facts_of
from ground.disk import require_space, show_bytes
from ground.errors import DataError, SetupError
from ground.manifest import MANIFEST, digest, read_manifest
from ground.storage import commit_directory, verify_directory, verify_file, write_file


def commit(target: Path, text: str, **facts: object) -> None:
    with commit_directory(target, facts) as staging:
        (staging / "weights.safetensors").write_text(text * 50)
        (staging / "deep").mkdir()
        (staging / "deep" / "state.json").write_text(f'"{text}"')


def content(target: Path) -> str:
    """What a reader sees: the text of a verified folder, or that there is none."""
    if not target.exists():
        return "none"
    verify_directory(target)
    return (target / "weights.safetensors").read_text()[:3]


def save(text: str) -> Callable[[Path], None]:
    def writer(folder: Path) -> None:
        (folder / "model.safetensors").write_text(text * 100)
        (folder / "optimizer.bin").write_bytes(b"\x80state")

    return writer


# --- a folder is committed as a whole ---------------------------------------------------------


def test_manifest_lists_hash_and_size_of_every_file_and_the_facts(tmp_path: Path) -> None:
    commit(tmp_path / "model", "abc", step=7, shape=(2, 3), loss=float("nan"))
    manifest = verify_directory(tmp_path / "model")
    assert {name: fact.size for name, fact in manifest.files.items()} == {
        "weights.safetensors": 150,
        "deep/state.json": 5,
    }
    assert digest(tmp_path / "model" / "deep" / "state.json").sha256 == (
        "6cc43f858fbb763301637b5af970e2a46b46f461f27e5a0f41e009c59b827b25"
    )
    assert manifest.facts == {"step": 7, "shape": [2, 3], "loss": None}
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_seal_survives_keys_that_json_turns_into_text(tmp_path: Path) -> None:
    commit(tmp_path / "model", "abc", by_version={10: 1, 2: 1})
    assert read_manifest(tmp_path / "model").facts == {"by_version": {"10": 1, "2": 1}}


def test_a_writer_that_fails_leaves_the_old_folder_and_no_litter(tmp_path: Path) -> None:
    commit(tmp_path / "model", "old")
    with (
        pytest.raises(ZeroDivisionError),
        commit_directory(tmp_path / "model", {}) as staging,
    ):
        (staging / "weights.safetensors").write_text("new")
        _ = 1 // 0
    assert content(tmp_path / "model") == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_with_its_own_manifest_is_covered_by_it(tmp_path: Path) -> None:
    with commit_directory(tmp_path / "stage", {}) as staging:
        commit(staging / "model", "abc")
    assert list(read_manifest(tmp_path / "stage").files) == ["model/manifest.json"]
    (tmp_path / "stage" / "model" / "weights.safetensors").write_text("x")
    with pytest.raises(DataError, match=r"weights\.safetensors: the file must have 150 bytes"):
        verify_directory(tmp_path / "stage")


# --- crash points: old or new, never a mixture ------------------------------------------------


def test_crash_points_of_write_file(ram_path: Path) -> None:
    seen = crash_at_each_call(
        ram_path,
        lambda place: (place / "file").write_text("old"),
        lambda place: write_file(place / "file", "new"),
        lambda place: (place / "file").read_text(),
    )
    old_then_new(seen, "old", "new")
    assert [death.at for death, _ in seen] == [
        *("unlink", "open", "write", "fsync", "rename", "fsync", "unlink", "")
    ]


def test_crash_points_of_commit_directory_into_nothing(ram_path: Path) -> None:
    seen = crash_at_each_call(
        ram_path,
        lambda place: None,
        lambda place: commit(place / "model", "new"),
        lambda place: content(place / "model"),
    )
    old_then_new(seen, "none", "new")
    assert len(seen) > 15


def test_crash_points_of_commit_directory_over_an_older_one(ram_path: Path) -> None:
    seen = crash_at_each_call(
        ram_path,
        lambda place: commit(place / "model", "old"),
        lambda place: commit(place / "model", "new"),
        lambda place: content(place / "model"),
    )
    old_then_new(seen, "old", "new")


def test_crash_points_where_names_cannot_be_exchanged(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the reader may find the old one put aside, whole, and the next commit puts it back."""
    monkeypatch.setattr(storage, "_exchange", lambda first, second: False)

    def read(place: Path) -> str:
        target, aside = place / "model", place / ".model.replaced"
        return content(target if target.exists() else aside)

    seen = crash_at_each_call(
        ram_path,
        lambda place: commit(place / "model", "old"),
        lambda place: commit(place / "model", "new"),
        read,
    )
    old_then_new(seen, "old", "new")


@pytest.mark.parametrize("keep", [1, 2])
def test_crash_points_of_a_checkpoint_with_rotation(ram_path: Path, keep: int) -> None:
    def read(place: Path) -> tuple[int, int]:
        """Step of the newest valid one, and how many are valid (never 0)."""
        checkpoints = Checkpoints(place, keep)
        latest = checkpoints.latest()
        assert latest is not None
        valid = [verify_directory(path) for path in checkpoints.steps()]
        return int(str(facts_of(latest)["step"])), min(len(valid), 1)

    def prepare(place: Path) -> None:
        for step in range(100, 100 * (keep + 1), 100):
            Checkpoints(place, keep).commit(step, save("old"), {})

    new = 100 * (keep + 1)
    seen = crash_at_each_call(
        ram_path,
        prepare,
        lambda place: Checkpoints(place, keep).commit(new, save("new"), {}),
        read,
    )
    old_then_new(seen, (new - 100, 1), (new, 1))
    assert len(Checkpoints(ram_path / "k001", keep).steps()) == keep


def test_crash_points_of_setting_a_damaged_checkpoint_aside(ram_path: Path) -> None:
    def prepare(place: Path) -> None:
        for step in (100, 200):
            Checkpoints(place, 2).commit(step, save("x"), {})
        (place / "step_000200" / "model.safetensors").write_text("cut")

    def read(place: Path) -> tuple[str, int]:
        latest = Checkpoints(place, 2).latest()
        assert latest is not None
        return latest.name, len(list(place.glob("step_000200*")))

    seen = crash_at_each_call(ram_path, prepare, lambda place: Checkpoints(place, 2).latest(), read)
    assert {value for _, value in seen} == {("step_000100", 1)}
    assert [death.at for death, _ in seen][:2] == ["rename", "fsync"]


# --- damage is refused by name, and the older checkpoint is used ------------------------------


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut to nothing": lambda path: os.truncate(path, 0),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by one byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one bit flipped": flip_bit,
    "missing": lambda path: path.unlink(),
    "replaced by a link": lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
    "replaced by a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", MANIFEST])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (100, 200):
        checkpoints.commit(step, save("state"), {})
    DAMAGES[damage](tmp_path / "step_000200" / name)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest() == tmp_path / "step_000100"
    missing_manifest = name == MANIFEST and damage == "missing"
    named = "step_000200: there is no manifest" if missing_manifest else f"step_000200/{name}: "
    assert named in caplog.text
    assert (tmp_path / "step_000200.damaged").is_dir()
    assert checkpoints.latest() == tmp_path / "step_000100"


def test_a_pickle_that_is_not_ours_is_refused_by_name_and_never_loaded(tmp_path: Path) -> None:
    commit(tmp_path / "model", "abc")
    planted = tmp_path / "model" / "training_args.bin"
    planted.write_bytes(pickle.dumps({"harmless": True}))
    with pytest.raises(DataError) as caught:
        verify_directory(tmp_path / "model")
    assert str(caught.value) == (
        f"{planted}: a pickle that packtrain did not write is refused: loading it could run code\n"
        "  fix: remove it, or convert it to safetensors"
    )
    planted.rename(tmp_path / "model" / "notes.txt")
    verify_directory(tmp_path / "model")


def test_when_every_checkpoint_is_damaged_the_stage_does_not_start_from_nothing(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.latest() is None
    checkpoints.commit(100, save("x"), {})
    flip_bit(tmp_path / "step_000100" / "model.safetensors")
    for _ in range(2):
        with pytest.raises(DataError, match=r"every checkpoint is damaged \(1 of them\)"):
            checkpoints.latest()


def test_a_checkpoint_of_another_model_is_refused_with_the_difference(tmp_path: Path) -> None:
    Checkpoints(tmp_path, 2, {"model": "aaaa", "recipe": "1"}).commit(1, save("x"), {})
    with pytest.raises(DataError) as caught:
        Checkpoints(tmp_path, 2, {"model": "bbbb", "recipe": "1"}).latest()
    assert caught.value.what == "the checkpoint belongs to another run: model aaaa instead of bbbb"
    assert (tmp_path / "step_000001").is_dir()


def test_a_newer_schema_is_refused_by_its_number(tmp_path: Path) -> None:
    commit(tmp_path / "model", "abc")
    path = tmp_path / "model" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(DataError, match="newer packtrain: schema 99, this one reads up to 1"):
        read_manifest(tmp_path / "model")


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    commit(tmp_path / "model", "abc")
    manifest = read_manifest(tmp_path / "model")
    manifest.files["../secret"] = digest(tmp_path / "secret")
    write_file(tmp_path / "model" / MANIFEST, manifest.to_json())
    with pytest.raises(DataError, match="does not list this file"):
        verify_directory(tmp_path / "model")


def test_rotation_keeps_the_newest_and_the_one_just_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (10, 30, 40):
        checkpoints.commit(step, save("x"), {})
    assert [path.name for path in checkpoints.steps()] == ["step_000030", "step_000040"]
    checkpoints.commit(20, save("rolled back"), {})
    assert [path.name for path in checkpoints.steps()] == ["step_000020", "step_000040"]


# --- the disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True, timeout=10)


def test_a_full_disk_is_said_with_its_free_space_and_keeps_the_older_checkpoint(
    small_disk: Path,
) -> None:
    checkpoints = Checkpoints(small_disk, 2)
    checkpoints.commit(100, save("old"), {})
    with pytest.raises(SetupError) as caught:
        checkpoints.commit(200, lambda folder: (folder / "big").write_bytes(b"x" * (2 << 20)), {})
    assert caught.value.what.startswith("the disk is full (")
    assert caught.value.where == str(small_disk / "step_000200")
    assert caught.value.why == "what was there before is untouched"
    assert checkpoints.latest() == small_disk / "step_000100"
    assert sorted(os.listdir(small_disk)) == ["step_000100"]


def test_a_full_disk_that_a_library_reports_as_text_is_recognised(tmp_path: Path) -> None:
    class LibraryError(Exception):
        pass

    with pytest.raises(SetupError, match="the disk is full"), commit_directory(tmp_path / "m", {}):
        raise LibraryError("I/O error: No space left on device (os error 28)")


def test_a_file_size_limit_is_said_and_keeps_the_older_file(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "old")
    refused = pytest.raises(SetupError, match="cannot be written")
    with refused as caught, limited_file_size(1024):
        write_file(tmp_path / "file", "n" * 4096)
    assert caught.value.why == (
        "the file is larger than the limit of this user or file system allows"
    )
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_below_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(SetupError, match="cannot be written"),
        commit_directory(tmp_path / "file" / "model", {}),
    ):
        pass


def test_an_error_of_reading_something_else_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), commit_directory(tmp_path / "out" / "model", {}):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/weights")


def test_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, "a checkpoint")
    with pytest.raises(SetupError, match=r"a checkpoint needs 1024\.0 TB, .* are free"):
        require_space(tmp_path, 2**50, "a checkpoint")
    assert [show_bytes(count) for count in (5, 1536, 3 << 30)] == ["5 bytes", "1.5 KB", "3.0 GB"]


def test_a_single_file_of_a_stage_is_verified_by_name(tmp_path: Path) -> None:
    commit(tmp_path / "stage", "abc")
    assert verify_file(tmp_path / "stage", "deep/state.json").read_text() == '"abc"'
    with pytest.raises(DataError, match="does not list this file"):
        verify_file(tmp_path / "stage", "deep/other.json")
