from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from common.calvin_format import CalvinFormatError, load_npy
from common.mixture import UnreadableSample
from step3_defi.data import dataset, store
from step3_defi.data.dataset import CalvinWindows, split_recordings
from tests.step3_defi.parts import write_annotations, write_calvin

RNG = np.random.default_rng(0)


def windows(root: Path, **changes) -> CalvinWindows:
    return CalvinWindows(root, **{"split": "all", "image_size": 16, **changes})


def test_windows_stay_inside_their_annotation_unless_padded(calvin: Path) -> None:
    assert len(windows(calvin)) == 4 * (33 - 9)
    assert len(windows(calvin, max_pad=5)) == 4 * (33 - 4)
    assert len(windows(calvin, frame_stride=8)) == 4 * 3


def test_the_releases_windows_are_fewer(tmp_path: Path) -> None:
    """The release's windows start at range(first, last + 1 - 21) of an annotation.

    That gives 44 windows for 65 frames, where chunks of ten actions fit 56 times.
    """
    root = write_calvin(tmp_path / "c", recordings=1, length=70)
    write_annotations(root / "training", [(102, 166)])
    assert len(windows(root)) == 56 and windows(root, min_window=22, pack=True).windows[:, 1].tolist() == list(
        range(102, 166 + 1 - 21)
    )
    with pytest.raises(ValueError, match="no window of 66 actions"):
        windows(root, min_window=66)
    with pytest.raises(ValueError, match="min_window=4.*at least 5"):
        windows(root, min_window=4, max_pad=5)


def test_sample_is_the_annotated_frame_and_its_motions(calvin: Path) -> None:
    sample = windows(calvin).sample(2, RNG)
    assert sample["id"] == "calvin/training/0000105" and sample["text"] == "push the red block"
    assert torch.allclose(sample["actions"][:, 0], 1e-3 * torch.arange(105, 115)) and sample["actions"].shape == (10, 7)
    with np.load(calvin / "training" / "episode_0000105.npz") as archive:
        pixel = archive["rgb_static"].mean() / 127.5 - 1
    assert sample["views"]["static"].shape == (3, 16, 16) and abs(sample["views"]["static"].mean() - pixel) < 0.02
    assert sample["views"]["static"].min() >= -1 and sample["views"]["gripper"].shape == (3, 16, 16)


def test_motions_past_the_end_are_still_and_keep_the_gripper(calvin: Path) -> None:
    data = windows(calvin, max_pad=5)
    last = int(np.flatnonzero(data.windows[:, 0] == 0)[-1])
    assert data.windows[last, 1] == 131  # the annotation covers 103..135
    actions = data.action_chunk(last)
    assert torch.allclose(actions[:5, 0], 1e-3 * torch.arange(131, 136)) and not actions[5:, :6].any()
    assert (actions[5:, 6] == actions[4, 6]).all()


def test_packed_windows_equal_those_of_the_npz_files(calvin: Path) -> None:
    plain = windows(calvin, future_frames=(2, 30))
    packed = windows(calvin, future_frames=(2, 30), pack=True)
    assert plain.pack is None and packed.pack is not None and plain.fingerprint() == packed.fingerprint()
    for index in range(len(plain)):
        a, b = plain.sample(index, RNG), packed.sample(index, RNG)
        assert a["id"] == b["id"] and torch.equal(a["actions"], b["actions"])
        for view in ("static", "gripper"):
            assert torch.equal(a["views"][view], b["views"][view]) and torch.equal(
                a["futures"][view], b["futures"][view]
            )


def test_a_pack_serves_every_split_share_and_view_of_its_frames(calvin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows(calvin, split="train", val_fraction=0.25, pack=True)
    for module in (dataset, store):
        monkeypatch.setattr(module, "read_frame", lambda *_: pytest.fail("opened an npz"))
    for changes in (
        {},
        {"split": "val", "val_fraction": 0.25},
        {"fraction": 0.5, "split": "train", "val_fraction": 0.25},
        {"frame_stride": 3},
        {"views": ["static"]},
    ):
        windows(calvin, **changes).sample(0, RNG)
        windows(calvin, **changes, pack=True).sample(0, RNG)
    assert len(list((calvin / "training/.defi_cache").glob("*/index.safetensors"))) == 1


def test_frames_outside_of_annotations_are_not_read(calvin: Path) -> None:
    for frame in (100, 101, 102, 136, 139):
        (calvin / f"training/episode_{frame:07d}.npz").unlink()
    assert len(windows(calvin, pack=True)) == len(windows(calvin)) == 4 * (33 - 9)


def test_a_folder_of_its_own_may_validate(calvin: Path) -> None:
    write_calvin(calvin.parent / "other", recordings=1, first=700)
    (calvin.parent / "other/training").rename(calvin / "validation")
    held = windows(calvin, split="val", val_fraction=0, val_folder="validation")
    assert len(held) == 33 - 9 and held.id(0) == "calvin/validation/0000703"
    assert len(windows(calvin, split="train", val_fraction=0, val_folder="validation")) == 4 * (33 - 9)


def test_another_language_folder(calvin: Path) -> None:
    (calvin / "training/lang_annotations").rename(calvin / "training/lang_clip_resnet50")
    assert windows(calvin, lang_folder="lang_clip_resnet50").text(0) == "push the red block"


def test_futures_are_frames_ahead_and_stop_at_the_recordings_end(calvin: Path) -> None:
    data = windows(calvin, future_frames=(1, 10), future_stride=3)
    sample = data.sample(20, RNG)  # frame 123 of the recording 100..139
    assert torch.equal(sample["futures"]["static"][0], data.images(126)["static"])
    assert torch.equal(sample["futures"]["static"][1], data.images(139)["static"])
    whole = windows(calvin, future_frames=4, future_stride=3)
    assert whole.future_offsets == (3, 6, 9) and windows(calvin).future_offsets == ()


def test_fractions_are_nested_whole_recordings_and_validation_is_apart() -> None:
    def pick(split: str, fraction: float = 1.0) -> set[int]:
        return set(split_recordings(100, split, fraction=fraction, val_fraction=0.05, seed=3))

    tenth, half, everything, held = pick("train", 0.1), pick("train", 0.5), pick("train"), pick("val", 0.1)
    assert tenth < half < everything and len(tenth) == round(9.5) and len(held) == 5
    assert not everything & held and held == pick("val", 1.0) and everything | held == set(range(100))


def test_a_share_of_the_data_is_all_windows_of_some_recordings(tmp_path: Path) -> None:
    root = write_calvin(tmp_path / "ten", recordings=10)
    train, tenth, half, held = (
        windows(root, split=split, fraction=share, val_fraction=0.2)
        for split, share in (("train", 1.0), ("train", 0.13), ("train", 0.5), ("val", 0.13))
    )
    inside = [{(int(frame) - 100) // 45 for frame in part.windows[:, 1]} for part in (tenth, half, train, held)]
    assert (
        inside[0] < inside[1] < inside[2]
        and [len(recordings) for recordings in inside] == [1, 4, 8, 2]
        and not inside[2] & inside[3]
    )
    assert [len(part) for part in (tenth, half, train, held)] == [24 * len(recordings) for recordings in inside]


def test_one_recording_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="split=all"):
        split_recordings(1, "train", fraction=1.0, val_fraction=0.1, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "split"),
        ({"fraction": 0.0}, "fraction"),
        ({"views": ["top"]}, "top"),
        ({"max_pad": 10}, "max_pad"),
    ],
)
def test_wrong_arguments(calvin: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windows(calvin, **change)


def test_missing_key_names_file_and_key(calvin: Path) -> None:
    path = calvin / "training" / "episode_0000110.npz"
    with np.load(path) as archive:
        np.savez(path, **{key: archive[key] for key in archive.files if key != "rgb_gripper"})
    data = windows(calvin)
    with pytest.raises(UnreadableSample, match="episode_0000110.npz.*rgb_gripper"):
        data.sample(7, RNG)


def test_truncated_npz_is_one_unreadable_sample(calvin: Path) -> None:
    data = windows(calvin)
    path = calvin / "training" / "episode_0000110.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnreadableSample, match="truncated or damaged"):
        data.sample(7, RNG)
    for content in (b"", b"no zip at all"):
        path.write_bytes(content)
        with pytest.raises(UnreadableSample, match="episode_0000110.npz: truncated or damaged"):
            data.sample(7, RNG)


@pytest.mark.parametrize("motion", [np.zeros(6), np.full(7, np.nan), np.zeros(7, int), np.array([None] * 7)])
def test_wrong_motions_name_their_file(calvin: Path, motion: np.ndarray) -> None:
    np.savez(calvin / "training" / "episode_0000110.npz", rel_actions=motion)
    with pytest.raises(CalvinFormatError, match="episode_0000110.npz"):
        windows(calvin)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((20, 20), np.uint8),
        np.zeros((20, 20, 6), np.uint8),
        np.zeros((20, 20, 3)),
        np.zeros((0, 20, 3), np.uint8),
    ],
)
def test_wrong_pictures_name_their_file(calvin: Path, picture: np.ndarray) -> None:
    data, path = windows(calvin), calvin / "training" / "episode_0000110.npz"
    with np.load(path) as archive:
        arrays = {**archive, "rgb_static": picture}
    np.savez(path, **arrays)
    with pytest.raises(UnreadableSample, match="episode_0000110.npz: rgb_static has shape"):
        data.sample(7, RNG)
    with pytest.raises(CalvinFormatError, match="episode_0000110.npz: rgb_static has shape"):
        windows(calvin, pack=True)


@pytest.mark.parametrize("span", [(103, 150), (90, 120), (120, 110)])
def test_annotation_past_the_end(calvin: Path, span: tuple[int, int]) -> None:
    write_annotations(calvin / "training", [span])
    with pytest.raises(CalvinFormatError, match="annotation 0.*past the end"):
        windows(calvin)


def test_missing_files_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(CalvinFormatError, match="ep_start_end_ids.npy is missing"):
        windows(tmp_path)
    write_calvin(tmp_path / "c", recordings=2)
    (tmp_path / "c" / "training" / "lang_annotations" / "auto_lang_ann.npy").unlink()
    with pytest.raises(CalvinFormatError, match="auto_lang_ann.npy is missing"):
        windows(tmp_path / "c")


class Bomb:
    def __reduce__(self) -> tuple:
        return print, ("exploded",)


def test_pickles_of_anything_else_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.save(tmp_path / "bomb.npy", np.array({"language": Bomb()}, dtype=object), allow_pickle=True)
    with pytest.raises(CalvinFormatError, match="builtins.print"):
        load_npy(tmp_path / "bomb.npy")
    assert "exploded" not in capsys.readouterr().out
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CalvinFormatError, match="raw.npy"):
        load_npy(tmp_path / "raw.npy")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_numpy_in_builtin_containers_passes(tmp_path: Path, protocol: int) -> None:
    content = {
        "a": [(1, "x"), np.arange(3)],
        "b": np.float32(2.5),
        "c": np.array(["s", None], dtype=object),
        "d": np.array("é"),
    }
    with (tmp_path / "good.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(content, dtype=object), stream, protocol=protocol)
    back = load_npy(tmp_path / "good.npy")
    assert np.array_equal(back["a"][1], [0, 1, 2]) and back["b"] == 2.5 and back["c"][0] == "s"


def test_calvins_own_files(shared_data: Path) -> None:
    spans = load_npy(shared_data / "calvin_meta" / "ep_start_end_ids_ABCD.npy")
    assert spans.shape[1] == 2 and (spans[:, 0] <= spans[:, 1]).all()
