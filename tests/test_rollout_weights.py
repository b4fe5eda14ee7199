"""Published weights arrive as they were, outlive who published them, and old ones are let go."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from remote_keeper import RemoteKeeper
from safetensors.torch import load_file, save_file
from weight_doubles import Post

from ground.errors import DataError, InfraError, SetupError
from ground.faults import Faults
from ground.strikes import kill9
from rollout import handover
from rollout.checksums import checksums, spread
from rollout.handover import Inbox, Outbox
from rollout.layout import Layout, Place
from rollout.shared_memory import Lock, SharedBuffer, map_buffer
from rollout.weights import WeightKeeper, start_keeper, this_node

pytestmark = pytest.mark.usefixtures("ray_local")


def _tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "b": torch.full((2, 3), value),
        "a": torch.tensor([1.0, value], dtype=torch.bfloat16),
        "none": torch.empty(0, 4),
        "one": torch.tensor(value),
    }


def test_a_layout_puts_one_aligned_tensor_behind_the_other() -> None:
    layout = Layout.of(_tensors(1.0))
    assert layout.places == {
        "b": Place(0, (2, 3), "torch.float32"),
        "a": Place(256, (2,), "torch.bfloat16"),
        "none": Place(512, (0, 4), "torch.float32"),
        "one": Place(512, (), "torch.float32"),
    }
    assert layout.size == 768


def test_checksums_see_every_part_and_name_it() -> None:
    base = checksums(_tensors(1.0))
    assert checksums(dict(reversed(_tensors(1.0).items()))) == base
    changes = {
        "value": torch.tensor([[1, 1, 1], [1, 1, 1.0000001]]),
        "shape": torch.full((3, 2), 1.0),
        "type": torch.full((2, 3), 0x3F800000, dtype=torch.int32),
        "order": torch.tensor([[1.0, 2, 3], [4, 5, 6]]),
        "other order": torch.tensor([[1.0, 4, 2], [5, 3, 6]]),
    }
    seen = {"base": base["b"]}
    for what, changed in changes.items():
        sums = checksums({**_tensors(1.0), "b": changed})
        assert [name for name in base if sums[name] != base[name]] == ["b"], what
        seen[what] = sums["b"]
    assert len(set(seen.values())) == 6


def test_a_checksum_depends_on_bytes_alone_not_on_threads_or_strides() -> None:
    large = torch.arange(3 << 20, dtype=torch.float32)
    alone = checksums({"x": large})
    assert checksums({"x": large, "y": large})["x"] == alone["x"]
    square = large[: 1 << 20].view(1024, 1024)
    assert checksums({"x": square.T}) == checksums({"x": square.T.clone()})
    copy = {"x": torch.empty_like(large)}
    assert checksums({"x": large}, into=copy) == alone
    assert torch.equal(copy["x"], large)
    swapped = torch.cat([large[1 << 19 :], large[: 1 << 19]])  # whole pieces change places
    assert checksums({"x": swapped}) != alone


def test_work_is_spread_in_order() -> None:
    sizes = [5 << 20] * 7 + [0, 1]
    assert spread(lambda item: item * item, range(9), sizes) == [n * n for n in range(9)]
    assert spread(lambda item: item, [], []) == []


def test_a_buffer_is_not_filled_under_a_reader_nor_kept_by_a_dead_one() -> None:
    buffer = SharedBuffer(4096)
    reader = Lock.take(buffer.path, exclusive=False)
    assert reader and Lock.take(buffer.path, exclusive=True) is None
    second = Lock.take(buffer.path, exclusive=False)
    assert second
    reader.release()
    assert Lock.take(buffer.path, exclusive=True) is None
    del second  # nobody refers to it any more
    writer = Lock.take(buffer.path, exclusive=True)
    assert writer and Lock.take(buffer.path, exclusive=False) is None
    writer.share()
    assert Lock.take(buffer.path, exclusive=False)
    writer.release()

    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys, time\n"
            f"fd = os.open({buffer.path!r}, os.O_RDONLY); fcntl.flock(fd, fcntl.LOCK_SH)\n"
            "print('locked', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout and holder.stdout.readline()
    assert Lock.take(buffer.path, exclusive=True) is None
    holder.kill()
    holder.wait()
    assert Lock.take(buffer.path, exclusive=True)
    buffer.close()


def test_what_a_reader_writes_reaches_nobody_else() -> None:
    buffer = SharedBuffer(16)
    buffer.map()[:4] = b"true"
    reader = map_buffer(buffer.path, 16, writable=False)
    reader[:4] = b"lies"
    assert buffer.map()[:4] == b"true" and map_buffer(buffer.path, 16, writable=False)[:1] == b"t"
    map_buffer(buffer.path, 16, writable=True)[:4] = b"news"
    assert buffer.map()[:4] == b"news"


def test_weights_arrive_bit_for_bit_and_without_a_copy() -> None:
    post = Post()
    live = _tensors(1.5)
    parcel = post.outbox.pack(3, live)
    live["b"].zero_()
    post.outbox.send(parcel)
    opened = post.inbox.open(post.keeper.current()[1])
    assert list(opened) == ["b", "a", "none", "one"]
    assert checksums(opened) == checksums(_tensors(1.5)) == parcel.published.checksums
    assert all(each.data_ptr() % 64 == 0 for each in opened.values() if each.numel())
    where = post.keeper.current()[1].path
    with open(where, "r+b") as memory:
        memory.write(b"\0\0\x80\x3f")
    assert opened["b"][0, 0] == 1.0  # the very pages, not a copy of them


def test_a_parcel_can_be_saved_while_it_is_on_its_way(tmp_path: Path) -> None:
    parcel = Post().outbox.pack(0, _tensors(2.0))
    save_file(parcel, tmp_path / "x.safetensors")
    assert checksums(load_file(tmp_path / "x.safetensors")) == checksums(_tensors(2.0))


def test_three_buffers_do_for_any_number_of_versions_and_none_is_refilled_in_use() -> None:
    post = Post()
    paths = []
    for version in range(8):
        published = post.publish(version, _tensors(float(version)))
        opened = post.inbox.open(published)
        assert checksums(opened) == published.checksums
        paths.append(published.path)
    assert len(set(paths)) == 3
    assert all(len({*paths[n : n + 3]}) == 3 for n in range(6))


def test_a_reader_that_lags_behind_costs_a_buffer_not_its_weights() -> None:
    post = Post()
    lagging = Inbox(this_node())
    opened = lagging.open(post.publish(0, _tensors(0.5)))
    for version in range(1, 9):
        post.inbox.open(post.publish(version, _tensors(float(version))))
    assert torch.equal(opened["b"], torch.full((2, 3), 0.5))
    assert len(post.keeper.buffers(768)) == 4


def test_memory_is_bounded_and_the_next_version_waits_until_somebody_lets_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    post = Post()
    parcels = [post.outbox.pack(version, _tensors(1.0)) for version in range(6)]
    with monkeypatch.context() as patch:
        patch.setattr(handover, "_ROOM_SECONDS", 0.1)
        with pytest.raises(InfraError, match=r"must find a free buffer within 0\.1 s"):
            post.outbox.pack(6, _tensors(1.0))
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(post.outbox.pack, 6, _tensors(1.0))
        with pytest.raises(FutureTimeoutError):
            waiting.result(0.1)
        del parcels[2]
        assert waiting.result(30)


def test_memory_that_is_not_there_is_refused_before_it_is_asked_for() -> None:
    with pytest.raises(SetupError, match="bytes of shared memory are needed") as caught:
        SharedBuffer(1 << 60)
    assert "bytes are available" in caught.value.why


def test_weights_that_are_gone_or_being_overwritten_are_refused() -> None:
    post = Post()
    published = post.publish(0, _tensors(1.0))
    for version in (1, 2):
        post.publish(version, _tensors(1.0))
    parcel = post.outbox.pack(3, _tensors(1.0))
    assert parcel.published.path == published.path
    fd = os.open(published.path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    del parcel
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another version is being packed
    with pytest.raises(InfraError, match="version 0 must be readable"):
        post.inbox.open(published)
    os.close(fd)
    with pytest.raises(InfraError, match="version 0 must be readable"):
        post.inbox.open(replace(published, path="/proc/self/fd/999"))


def test_another_machine_sends_and_fetches_the_bytes(keeper: ActorHandle) -> None:
    far = Outbox(RemoteKeeper(keeper), node="another machine")
    far.send(far.pack(4, _tensors(4.5)))
    version, published = _get(keeper.current.remote())
    assert (version, published.node) == (4, this_node())
    for node in (this_node(), "a third machine"):
        opened = Inbox(node).open(published)
        assert checksums(opened) == checksums(_tensors(4.5)) == published.checksums
    gone = replace(published, version=3)
    with pytest.raises(InfraError, match="version 3 must be fetched"):
        Inbox("a third machine").open(gone)


def _get(ref: ray.ObjectRef) -> Any:
    return ray.get(ref, timeout=60)


@pytest.fixture
def keeper(ray_local: None) -> Iterator[ActorHandle]:
    keeper = cast(ActorHandle, start_keeper())
    yield keeper
    ray.kill(keeper)


class Learner:
    """A learner in another process; dies in the middle of packing when it is armed to."""

    def publish(
        self, keeper: ActorHandle, version: int, environment: dict[str, str] | None = None
    ) -> int:
        from ground import faults

        os.environ.update(environment or {})
        faults.enter("learner")
        outbox = Outbox(RemoteKeeper(keeper), this_node())
        outbox.send(outbox.pack(version, _tensors(float(version))))
        return os.getpid()


def _learner() -> ActorHandle:
    return cast(ActorHandle, ray.remote(Learner).options(num_cpus=0).remote())


def test_weights_outlive_the_process_that_published_them(keeper: ActorHandle) -> None:
    pid = _get(_learner().publish.remote(keeper, 7))
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    version, published = _get(keeper.current.remote())
    assert (version, published.version) == (7, 7)
    opened = Inbox(this_node()).open(published)
    assert torch.equal(opened["b"], torch.full((2, 3), 7.0))


@pytest.mark.parametrize("nth", [2, *(pytest.param(nth, marks=pytest.mark.slow) for nth in (1, 3))])
def test_79_a_sender_killed_at_tensor_k_leaves_the_version_before_whole(
    keeper: ActorHandle, tmp_path: Path, nth: int
) -> None:
    outbox = Outbox(RemoteKeeper(keeper), this_node())
    outbox.send(outbox.pack(1, _tensors(1.0)))
    plan = Faults(tmp_path).at("learner", "publish.copy", nth=nth).do(kill9)
    with pytest.raises(RayActorError):
        _get(_learner().publish.remote(keeper, 2, plan.environment()))
    assert [firing.point for firing in plan.fired()] == ["publish.copy"]
    version, published = _get(keeper.current.remote())
    assert version == 1 and _get(keeper.versions.remote()) == [1]
    assert checksums(Inbox(this_node()).open(published)) == checksums(_tensors(1.0))
    outbox.send(outbox.pack(2, _tensors(2.0)))  # the half-filled buffer serves again
    _, published = _get(keeper.current.remote())
    assert checksums(Inbox(this_node()).open(published)) == checksums(_tensors(2.0))
    assert len(_get(keeper.buffers.remote(768))) == 2


def test_78_the_newest_two_versions_are_kept_and_versions_rise() -> None:
    post, keeper = Post(), WeightKeeper()
    with pytest.raises(InfraError, match="no weights have been published"):
        keeper.current()
    for version in (0, 1, 5):
        post.publish(version, _tensors(float(version)))
    assert post.keeper.versions() == [1, 5]
    for version in (5, 4):
        with pytest.raises(DataError, match=f"must rise, got {version} after 5"):
            post.publish(version, _tensors(0.0))
    assert post.keeper.versions() == [1, 5]
