"""RLDS without TensorFlow: framing and checksums, lazy decoding, shards, and one line for each kind of damage."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from common.rlds import (
    ArrayRecordFile,
    RldsDataset,
    RldsError,
    TFRecordFile,
    decode,
    find_version_folder,
    masked_crc32c,
    splits,
)


def record(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc32c(length)) + payload + struct.pack("<I", masked_crc32c(payload))


def picture(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(stream, "png")
    return stream.getvalue()


def write_rlds(folder: Path, *, shards: tuple[int, ...] = (2, 1), steps: int = 4) -> Path:
    """A small RLDS folder: features.json by tensorflow-datasets, examples in the wire format that it reads."""
    features = tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset(
                {
                    "observation": {
                        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                        "wide": tfds.features.Text(),
                    },
                    "action": tfds.features.Tensor(shape=(2,), dtype=np.float32),
                    "instruction": tfds.features.Tensor(shape=(8,), dtype=np.int32),
                }
            )
        }
    )
    folder.mkdir(parents=True)
    features.save_config(str(folder))
    codes = [*map(ord, "päck"), 0, 0, 0, 0]
    episode = 0
    for number, count in enumerate(shards):
        data = b""
        for _ in range(count):
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["steps/observation/image"].bytes_list.value.extend(picture(10 * episode + t) for t in range(steps))
            feature["steps/observation/wide"].bytes_list.value.extend([b"ab\0c\0\0"] * steps)
            feature["steps/action"].float_list.value.extend(float(v) for t in range(steps) for v in (episode, t))
            feature["steps/instruction"].int64_list.value.extend(codes * steps)
            data += record(example.SerializeToString())
            episode += 1
        (folder / f"toy-train.tfrecord-{number:05d}-of-{len(shards):05d}").write_bytes(data)
    info = {
        "name": "toy",
        "version": "1.0.0",
        "fileFormat": "tfrecord",
        "splits": [{"name": "train", "shardLengths": [str(n) for n in shards]}],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_rlds(tmp_path / "oxe" / "toy" / "1.0.0")


def test_crc_is_tfrecords() -> None:
    # CRC-32C of "123456789" is E3069283; TFRecord rotates by 15 and adds a constant
    crc = 0xE3069283
    assert masked_crc32c(b"123456789") == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_episodes_over_shards(toy: Path) -> None:
    episodes = RldsDataset(toy)
    assert len(episodes) == 3 and splits(toy) == ["train"]
    for index in (0, 1, 2):
        episode = episodes[index]
        assert len(episode) == 4
        assert np.array_equal(episode.values("action"), [[index, t] for t in range(4)])
        assert (episode.image("observation/image", 2) == 10 * index + 2).all()
    assert episode.text("instruction", encoding="code_points") == "päck"
    assert episode.encoded("observation/wide", 0) == b"ab\0c\0\0", "NULs survive, inner ones and those at the end"
    assert episode.text("observation/wide") == "ab\0c", "a sentence goes without its padding"
    with pytest.raises(IndexError):
        episodes[3]


def test_only_the_wanted_image_is_decoded(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *args: opened.append(1) or real(*args))
    episode = RldsDataset(toy)[1]
    episode.values("action"), episode.text("observation/wide")
    assert not opened
    episode.image("observation/image", 0)
    assert len(opened) == 1


def test_find_looks_where_oxe_scripts_leave_things(toy: Path) -> None:
    root = toy.parents[1]
    assert find_version_folder(root, ["other", "toy"]) == toy
    shutil.copytree(toy, root / "toy" / "0.9.0")
    assert find_version_folder(root, ["toy"]) == toy
    shutil.copytree(toy, root / "toy" / "0.10.0")
    assert find_version_folder(root, ["toy"]).name == "1.0.0"
    (root / "CONVERSION_DIR" / "moved").mkdir(parents=True)
    shutil.move(toy, root / "CONVERSION_DIR" / "moved" / "0.1.0")
    assert find_version_folder(root, ["moved"]) == root / "CONVERSION_DIR" / "moved" / "0.1.0"
    assert find_version_folder(root, ["toy"], "0.9.0").name == "0.9.0", (
        "a version that is asked for, and not the newest"
    )
    with pytest.raises(
        FileNotFoundError, match=r"oxe/toy: version 0.1.0 is wanted, there is 0.10.0, 0.9.0; fetch toy/0.1.0, or leave"
    ) as caught:
        find_version_folder(root, ["toy"], "0.1.0")
    assert "\n" not in str(caught.value)
    shutil.copytree(root / "toy" / "0.9.0", root / "CONVERSION_DIR" / "toy" / "0.1.0")
    assert find_version_folder(root, ["toy"], "0.1.0") == root / "CONVERSION_DIR" / "toy" / "0.1.0", "wherever it lies"
    with pytest.raises(FileNotFoundError, match="no RLDS folder .* for nothing or none"):
        find_version_folder(root, ["nothing", "none"])


def shard(folder: Path) -> Path:
    return folder / "toy-train.tfrecord-00000-of-00002"


def test_damaged_payload_is_found_by_its_crc(toy: Path) -> None:
    data = bytearray(shard(toy).read_bytes())
    data[200] ^= 0xFF
    shard(toy).write_bytes(bytes(data))
    with pytest.raises(RldsError, match=r"00000-of-00002: record 0 is corrupt \(crc differs\)"):
        RldsDataset(toy)[0]
    assert len(RldsDataset(toy)[1]) == 4


def test_damaged_length_is_always_found(toy: Path) -> None:
    data = bytearray(shard(toy).read_bytes())
    data[2] ^= 0x01
    shard(toy).write_bytes(bytes(data))
    with pytest.raises(RldsError, match="record 0 at byte 0 has a corrupt length"):
        RldsDataset(toy)[0]


@pytest.mark.parametrize(
    "keep, message", [(-3, "record 1 .* the file ends before"), (5, "record 0 at byte 0 is cut off in its header")]
)
def test_truncated_shard(toy: Path, keep: int, message: str) -> None:
    shard(toy).write_bytes(shard(toy).read_bytes()[:keep])
    with pytest.raises(RldsError, match=message):
        RldsDataset(toy)[0]


def test_other_damage_is_one_clear_line(toy: Path) -> None:
    with pytest.raises(RldsError, match=r"no split 'val'; dataset_info.json has \['train'\]"):
        RldsDataset(toy, "val")
    with pytest.raises(RldsError, match=r"no feature 'observation/depth'; at 'depth' there are \['image', 'wide'\]"):
        RldsDataset(toy)[0].image("observation/depth", 0)
    shard(toy).write_bytes(record(b"\x07nonsense") * 2)
    with pytest.raises(RldsError, match="toy/train/0 in .* does not decode"):
        RldsDataset(toy)[0]
    shard(toy).write_bytes(b"")
    with pytest.raises(RldsError, match="holds 0 records, dataset_info.json promises more"):
        RldsDataset(toy)[0]
    shard(toy).unlink()
    with pytest.raises(RldsError, match="1 of 2 train shards are missing, the first is number 0"):
        RldsDataset(toy)
    (toy / "features.json").unlink()
    with pytest.raises(FileNotFoundError, match="features.json is missing"):
        RldsDataset(toy)


def test_unknown_format_and_no_steps(toy: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(toy, flat)
    tfds.features.FeaturesDict({"image": tfds.features.Image()}).save_config(str(flat))
    with pytest.raises(RldsError, match="has no 'steps'"):
        RldsDataset(flat)[0]
    info = json.loads((toy / "dataset_info.json").read_text())
    (toy / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "riegeli"}))
    with pytest.raises(RldsError, match="file format 'riegeli'"):
        RldsDataset(toy)


def test_broken_picture(toy: Path) -> None:
    episode = RldsDataset(toy)[0]
    episode._steps = [{"observation": {"image": picture(3)[:40]}}]
    with pytest.raises(RldsError, match="toy/train/0: observation/image of step 0 is not a readable image"):
        episode.image("observation/image", 0)


def test_the_real_bridge_file(shared_data: Path) -> None:
    folder = find_version_folder(shared_data / "rlds_samples", ["bridge_dataset"])
    assert splits(folder) == ["train"], "its val shard is promised but not there"
    file = TFRecordFile(next(folder.glob("*.tfrecord-*")))
    assert len(file) == 25 and len(file[24]) > 100_000
    episode = RldsDataset(folder)[3]
    assert episode.text("language_instruction") == "turn lever vertical to front"
    assert episode.values("action").shape == (10, 7)
    first, last = (episode.image("observation/image_0", t) for t in (0, 9))
    assert first.shape == (64, 64, 3) and first.std() > 20 and np.abs(first.astype(int) - last).mean() > 2


def to_array_record(folder: Path, out: Path) -> Path:
    """The payloads of an RLDS folder, as they are, in ArrayRecord files."""
    writer = pytest.importorskip("array_record.python.array_record_module").ArrayRecordWriter
    out.mkdir(parents=True)
    for path in folder.glob("*.tfrecord-*"):
        file, copy = (
            TFRecordFile(path),
            writer(str(out / path.name.replace("tfrecord", "array_record")), "group_size:1"),
        )
        for index in range(len(file)):
            copy.write(file[index])
        copy.close()
    info = json.loads((folder / "dataset_info.json").read_text())
    (out / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "array_record"}))
    (out / "features.json").write_text((folder / "features.json").read_text())
    return out


def test_array_record_gives_the_same_episodes(toy: Path, tmp_path: Path) -> None:
    copy = to_array_record(toy, tmp_path / "CONVERSION_DIR" / "toy" / "1.0.0")
    one, other = RldsDataset(toy), RldsDataset(copy)
    assert find_version_folder(tmp_path, ["toy"]) == copy and splits(copy) == ["train"] and len(one) == len(other) == 3
    for index in range(3):
        assert (
            other.shards[0].path.suffix != one.shards[0].path.suffix
            and other[index].encoded("observation/wide", 2) == b"ab\0c\0\0"
        )
        assert one[index].encoded("observation/image", 2) == other[index].encoded("observation/image", 2)


def test_array_record_of_the_real_bridge_file(shared_data: Path, tmp_path: Path) -> None:
    folder = find_version_folder(shared_data / "rlds_samples", ["bridge_dataset"])
    one, other = RldsDataset(folder), RldsDataset(to_array_record(folder, tmp_path / "bridge_dataset" / "1.0.0"))
    assert len(other) == 25
    for index in (0, 7, 24):
        assert one[index].text("language_instruction") == other[index].text("language_instruction")
        assert np.array_equal(one[index].image("observation/image_0", 9), other[index].image("observation/image_0", 9))


def test_damaged_array_record(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = to_array_record(toy, tmp_path / "copy" / "1.0.0")
    path = copy / "toy-train.array_record-00000-of-00002"
    whole = path.read_bytes()
    at = whole.index(b"ab\0c")
    path.write_bytes(whole[:at] + b"x" + whole[at + 1 :])
    with pytest.raises(
        RldsError, match=r"00000-of-00002: record 0 is corrupt \(.*hash mismatch.*\); download the shard again"
    ) as caught:
        RldsDataset(copy)[0]
    assert "\n" not in str(caught.value)
    for content in (whole[:-9], b""):
        path.write_bytes(content)
        with pytest.raises(RldsError, match="00000-of-00002: the file is corrupt"):
            RldsDataset(copy)[0]
    path.unlink()
    with pytest.raises(RldsError, match="no such shard"):
        ArrayRecordFile(path)[0]
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    with pytest.raises(RldsError, match="needs the package array-record"):
        RldsDataset(copy)[2]


def test_unknown_codec(toy: Path) -> None:
    config = (toy / "features.json").read_text()
    (toy / "features.json").write_text(config.replace("image_feature.Image", "image_feature.Hologram"))
    with pytest.raises(
        RldsError, match="features.json names a feature that tensorflow-datasets does not know .*Hologram"
    ) as caught:
        RldsDataset(toy)[0]
    assert "\n" not in str(caught.value)
    with pytest.raises(RldsError, match="frame 3 is not a readable image"):
        decode(b"a codec from the future", "frame 3")
    with pytest.raises(RldsError, match="frame 3 is not an image but float32 of shape"):
        decode(np.zeros((4, 4, 3), np.float32), "frame 3")


def test_no_tensorflow(toy: Path) -> None:
    code = (
        "import sys; from common.rlds import RldsDataset; import step2_gidm.data.dataset, common.loop; "
        "episode = RldsDataset(sys.argv[1])[0]; "
        "episode.image('observation/image', 1), episode.text('observation/wide'); sys.exit('tensorflow' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(toy)], cwd=Path(__file__).resolve().parents[2], check=False
        ).returncode
        == 0
    )
