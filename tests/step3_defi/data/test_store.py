"""Packs are complete or absent, equal however often their build was interrupted, and errors are clear."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hydra.utils import instantiate

from common.calvin_format import CalvinFormatError, read_frame
from step3_defi import pack as program
from step3_defi.data import store
from tests.conftest import ROOT
from tests.step3_defi.parts import configure, write_calvin

KEYS = ["rgb_static", "rgb_gripper"]
FRAMES = np.r_[103:136, 148:181]


def pack(calvin: Path, cache: Path, **changes) -> store.Pack:
    arguments = {"frames": FRAMES, "image_frames": FRAMES[::3], "keys": KEYS, "shard": 8, **changes}
    return store.get_or_build_pack(calvin / "training", cache=cache, **arguments)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_holds_motions_of_all_frames_and_every_bit_of_the_pictured(calvin: Path, tmp_path: Path) -> None:
    ours = pickle.loads(pickle.dumps(pack(calvin, tmp_path)))
    for frame in FRAMES:
        assert ours.read_actions(np.array([frame]))[0] == pytest.approx(
            read_frame(calvin / "training", frame, ["rel_actions"])["rel_actions"]
        )
    for frame in FRAMES[::3][::-1].tolist():
        truth = read_frame(calvin / "training", frame, KEYS)
        assert all(np.array_equal(ours.read_images(frame, KEYS)[key], truth[key]) for key in KEYS)
    assert not ours.holds(FRAMES, FRAMES[1:2], KEYS) and ours.holds(FRAMES[5:9], FRAMES[3:4], KEYS[:1])


def test_several_processes_write_the_same_files(calvin: Path, tmp_path: Path) -> None:
    assert content(pack(calvin, tmp_path / "one").folder) == content(pack(calvin, tmp_path / "two", workers=2).folder)


def test_a_broken_build_goes_on_where_it_stopped(calvin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, write = pack(calvin, tmp_path / "whole"), store._write
    monkeypatch.setattr(
        store,
        "_write",
        lambda job: write(job) if "00004" not in job[0].name else (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        pack(calvin, tmp_path / "broken")
    assert store.find_pack(calvin / "training", FRAMES, FRAMES[::3], KEYS, tmp_path / "broken") is None
    target = tmp_path / "broken" / whole.folder.name
    (target / ".00004.77.part.safetensors").write_bytes(b"half")  # what kill -9 leaves behind
    (target / "00002.safetensors").write_bytes(
        (target / "00002.safetensors").read_bytes()[:-10]
    )  # what a power failure may leave
    written = []
    monkeypatch.setattr(store, "_write", lambda job: written.append(job[0].name[:5]) or write(job))
    assert content(pack(calvin, tmp_path / "broken").folder) == content(whole.folder)
    assert written == ["00002", *(f"{number:05d}" for number in range(4, 9))]


def test_killed_and_resumed_equals_unbroken(tmp_path: Path) -> None:
    root, cache = write_calvin(tmp_path / "calvin", recordings=20, length=40), tmp_path / "broken"
    frames = np.array(sorted(int(path.stem[-7:]) for path in (root / "training").glob("episode_*.npz")))
    code = (
        "import sys; from pathlib import Path; import numpy as np; from step3_defi.data import store; folder, cache = "
        "map(Path, sys.argv[1:])\n"
        "frames = np.array(sorted(int(path.stem[-7:]) for path in folder.glob('episode_*.npz')))\n"
        f"if __name__ == '__main__': store.get_or_build_pack(folder, frames, frames, {KEYS}, cache, workers=2, shard=8)"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code, str(root / "training"), str(cache)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 120
    while not list(cache.glob("*/[0-9]*.safetensors")):
        assert started.poll() is None and time.monotonic() < limit
        time.sleep(0.002)
    started.send_signal(signal.SIGKILL)
    started.wait()
    target = next(cache.glob("pack*"))
    done = len(list(target.glob("[0-9]*.safetensors")))
    assert done < len(frames) / 8 and not (target / store.INDEX).exists()
    options = {"frames": frames, "image_frames": frames, "workers": 1}
    assert content(pack(root, cache, **options).folder) == content(pack(root, tmp_path / "unbroken", **options).folder)


def test_the_program_packs_what_training_reads(calvin: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [
        f"data.root={calvin}",
        "data.frame_stride=4",
        "policy.alignment.weight=0",
    ]  # without alignment, no future frames are packed
    with caplog.at_level("INFO"):
        program.main.__wrapped__(configure("step3_pack", *words, "workers=1"))
    folder = next((calvin / "training/.defi_cache").glob("pack*"))
    assert f"results in {folder}: 132 frames, pictures of {4 * 8}" in caplog.text
    cfg = configure("step3_defi", *words, "data.val_fraction=0.25")
    assert {instantiate(cfg.data, split=split).pack.folder for split in ("train", "val")} == {folder}


def test_another_state_of_the_dataset_is_packed_anew(calvin: Path, tmp_path: Path) -> None:
    first = pack(calvin, tmp_path).folder
    np.save(
        calvin / "training/ep_start_end_ids.npy", np.load(calvin / "training/ep_start_end_ids.npy").astype(np.int32)
    )
    assert pack(calvin, tmp_path).folder != first


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corrupt_npz_is_one_line_and_what_was_packed_stays(calvin: Path, tmp_path: Path, workers: int) -> None:
    (calvin / "training/episode_0000150.npz").write_bytes(b"PK")
    with pytest.raises(CalvinFormatError, match="episode_0000150.npz: truncated or damaged") as caught:
        pack(calvin, tmp_path, workers=workers)
    assert (
        "\n" not in str(caught.value)
        and list(tmp_path.glob("*/00000.safetensors"))
        and not list(tmp_path.glob("*/index*"))
    )
    assert not list(tmp_path.glob("*/.*"))


def test_cameras_of_changing_size_are_refused(calvin: Path, tmp_path: Path) -> None:
    path = calvin / "training/episode_0000106.npz"
    with np.load(path) as archive:
        arrays = {**archive, "rgb_gripper": np.zeros((9, 8, 3), np.uint8)}
    np.savez(path, **arrays)
    with pytest.raises(CalvinFormatError, match=r"frame 106: rgb_gripper has shape \(9, 8, 3\)"):
        pack(calvin, tmp_path)


def test_a_full_disk_is_one_line(calvin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(store.PackError, match="0.0 GB are needed for 22 frames.*data.cache_dir"):
        pack(calvin, tmp_path)

    def full(path: Path, data: bytes) -> None:
        with path.open("wb") as stream:
            stream.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(store.PackError, match="No space left on device.*data.cache_dir") as caught:
        pack(calvin, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("pack*/*"))


def test_a_place_that_cannot_be_written_is_one_line(calvin: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(store.PackError, match="cannot be written.*data.cache_dir"):
        pack(calvin, tmp_path / "file/cache")


def test_damage_to_a_finished_pack_is_named(calvin: Path, tmp_path: Path) -> None:
    ours = pack(calvin, tmp_path)
    (ours.folder / "00001.safetensors").unlink()
    with pytest.raises(store.PackError, match="00001.safetensors: not readable"):
        ours.read_images(int(FRAMES[9]), KEYS)
    (ours.folder / store.INDEX).write_bytes(b"x")
    with pytest.raises(store.PackError, match="index.safetensors: not readable"):
        pack(calvin, tmp_path)
