from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from common.calvin_format import CalvinFormatError, load_npy
from common.mixture import Unreadable
from step3_defi import dataset
from step3_defi.dataset import CalvinWindows, choose_recordings
from tests.step3_defi.parts import write_annotations, write_calvin

RNG = np.random.default_rng(0)


def windows(root: Path, **changes) -> CalvinWindows:
    return CalvinWindows(root, **{"split": "all", "image_size": 16, **changes})


def test_windows_stay_inside_their_annotation_unless_padded(calvin: Path) -> None:
    assert len(windows(calvin)) == 4 * (33 - 9)
    assert len(windows(calvin, max_pad=5)) == 4 * (33 - 4)
    assert len(windows(calvin, frame_stride=8)) == 4 * 3


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
    assert data.windows[last, 1] == 131  # of 103..135
    actions = data.chunk(last)
    assert torch.allclose(actions[:5, 0], 1e-3 * torch.arange(131, 136)) and not actions[5:, :6].any()
    assert (actions[5:, 6] == actions[4, 6]).all()


def test_packed_images_equal_unpacked_to_a_grey_level(calvin: Path) -> None:
    plain, packed = windows(calvin), windows(calvin, pack=True)
    for index in (0, 50, len(plain) - 1):
        a, b = plain.sample(index, RNG), packed.sample(index, RNG)
        assert a["id"] == b["id"] and (a["views"]["gripper"] - b["views"]["gripper"]).abs().max() <= 1 / 127.5
        assert torch.equal(a["actions"], b["actions"])


def test_packing_happens_once_and_leaves_nothing_half_written(calvin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (calvin / "training" / "episode_0000120.npz").rename(calvin / "away.npz")
    with pytest.raises(CalvinFormatError, match="episode_0000120"):
        windows(calvin)
    assert not list((calvin / "training" / ".defi_cache").iterdir())
    (calvin / "away.npz").rename(calvin / "training" / "episode_0000120.npz")
    first = windows(calvin)
    monkeypatch.setattr(dataset, "read_frame", lambda *_: pytest.fail("read the motions again"))
    assert np.array_equal(windows(calvin).actions, first.actions)


def test_futures_are_frames_ahead_and_stop_at_the_recordings_end(calvin: Path) -> None:
    data = windows(calvin, future_frames=(1, 10), future_stride=3)
    sample = data.sample(20, RNG)  # frame 123 of 100..139
    assert torch.equal(sample["futures"]["static"][0], data.images(126)["static"])
    assert torch.equal(sample["futures"]["static"][1], data.images(139)["static"])
    whole = windows(calvin, future_frames=4, future_stride=3)
    assert whole.future_offsets == (3, 6, 9) and windows(calvin).future_offsets == ()


def test_fractions_are_nested_whole_recordings_and_validation_is_apart() -> None:
    def pick(split: str, fraction: float = 1.0) -> set[int]:
        return set(choose_recordings(100, split, fraction=fraction, holdout=0.05, seed=3))
    tenth, half, everything, held = pick("train", 0.1), pick("train", 0.5), pick("train"), pick("val", 0.1)
    assert tenth < half < everything and len(tenth) == round(9.5) and len(held) == 5
    assert not everything & held and held == pick("val", 1.0) and everything | held == set(range(100))


def test_one_recording_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="split=all"):
        choose_recordings(1, "train", fraction=1.0, holdout=0.1, seed=0)


@pytest.mark.parametrize(("change", "message"), [({"split": "test"}, "split"), ({"fraction": 0.0}, "fraction"),
                                                ({"views": ["top"]}, "top"), ({"max_pad": 10}, "max_pad")])
def test_wrong_arguments(calvin: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windows(calvin, **change)


def test_missing_key_names_file_and_key(calvin: Path) -> None:
    path = calvin / "training" / "episode_0000110.npz"
    with np.load(path) as archive:
        np.savez(path, **{key: archive[key] for key in archive.files if key != "rgb_gripper"})
    data = windows(calvin)
    with pytest.raises(Unreadable, match="episode_0000110.npz.*rgb_gripper"):
        data.sample(7, RNG)


def test_truncated_npz_is_one_unreadable_sample(calvin: Path) -> None:
    data = windows(calvin)
    path = calvin / "training" / "episode_0000110.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(Unreadable, match="truncated or damaged"):
        data.sample(7, RNG)
    path.write_bytes(b"")
    with pytest.raises(Unreadable, match="truncated or damaged"):
        data.sample(7, RNG)


def test_wrong_action_shape(calvin: Path) -> None:
    np.savez(calvin / "training" / "episode_0000110.npz", rel_actions=np.zeros(6))
    with pytest.raises(CalvinFormatError, match=r"frame 110.*\(6,\)"):
        windows(calvin)


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
    content = {"a": [(1, "x"), np.arange(3)], "b": np.float32(2.5), "c": np.array(["s", None], dtype=object), "d": np.array("é")}
    with (tmp_path / "good.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(content, dtype=object), stream, protocol=protocol)
    back = load_npy(tmp_path / "good.npy")
    assert np.array_equal(back["a"][1], [0, 1, 2]) and back["b"] == 2.5 and back["c"][0] == "s"


def test_calvins_own_files(shared_data: Path) -> None:
    spans = load_npy(shared_data / "calvin_meta" / "ep_start_end_ids_ABCD.npy")
    assert spans.shape[1] == 2 and (spans[:, 0] <= spans[:, 1]).all()
