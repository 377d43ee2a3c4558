"""encode: latents of every camera, complete or absent, resumed after a stop; unreadable videos counted and named."""

import json

import numpy as np
import pytest
import torch
from video_sets import write_video_set

from common.video import read_frames, resize
from step1_gfdm import encode
from step1_gfdm import vae as svd_vae
from step1_gfdm.dataset import LatentClips

OPTIONS = {"image_size": 64, "chunk_size": 8}


@pytest.fixture(scope="module")
def vae(hub):
    return svd_vae.load(hub / "svd")


def latents(root):
    return {str(p.relative_to(root)): p for p in sorted(root.rglob("*.pt"))}


def test_encodes_what_the_vae_says_and_training_reads_it(tmp_path, vae):
    root = write_video_set(tmp_path, 2, cameras=2, stated=False)
    assert encode.encode_set(root, root, vae, sample_posterior=False, **OPTIONS) == {"encoded": 4}
    assert list(latents(root)) == [f"latent_videos/train/{e}/{c}.pt" for e in (0, 1) for c in (0, 1)]
    whole = vae.encode(resize(read_frames(root / "videos/train/1/1.mp4"), 64) * 2 - 1)
    stored = torch.load(root / "latent_videos/train/1/1.pt", weights_only=True)
    assert stored.dtype == torch.float32 and stored.shape == (20, vae.channels, 8, 8)
    torch.testing.assert_close(stored, whole, atol=1e-5, rtol=1e-5)
    assert json.loads((root / "annotation/train/0.json").read_text())["video_length"] == 20
    videos = LatentClips(root, num_frames=4, clip={"span": "episode"}, latent_shape=(vae.channels, 8, 8))
    assert torch.equal(
        videos.sample(1, np.random.default_rng(0))["latents"][0],
        torch.load(root / "latent_videos/train/1/0.pt", weights_only=True)[0],
    )


def test_a_resumed_run_gives_the_same_result(tmp_path, vae):
    whole, broken = write_video_set(tmp_path / "a", 3), write_video_set(tmp_path / "b", 3)
    encode.encode_set(whole, whole, vae, **OPTIONS)
    encode.encode_set(broken, broken, vae, **OPTIONS)
    first, second, third = latents(broken).values()
    times = first.stat().st_mtime_ns
    second.unlink()
    third.write_bytes(third.read_bytes()[:500])  # a truncated file does not count as complete
    assert encode.encode_set(broken, broken, vae, **OPTIONS) == {"encoded": 2, "already there": 1}
    assert first.stat().st_mtime_ns == times
    for one, other in zip(latents(whole).values(), latents(broken).values()):
        assert torch.equal(torch.load(one, weights_only=True), torch.load(other, weights_only=True))


def test_another_scale_is_encoded_again(tmp_path, vae):
    root = write_video_set(tmp_path, 1)
    encode.encode_set(root, root, vae, **OPTIONS)
    assert encode.encode_set(root, root, vae, image_size=32) == {"encoded": 1}
    assert torch.load(next(iter(latents(root).values())), weights_only=True).shape[-1] == 4


def test_bad_videos_are_counted_named_and_leave_nothing(tmp_path, vae, capsys):
    root = write_video_set(tmp_path, 4)
    (root / "videos/train/0/0.mp4").unlink()
    torn = root / "videos/train/1/0.mp4"
    torn.write_bytes(torn.read_bytes()[:300])
    record = json.loads((root / "annotation/train/2.json").read_text())
    (root / "annotation/train/2.json").write_text(json.dumps({**record, "video_length": 99}))
    (root / "annotation/train/9.json").write_text("{}")
    counts = encode.encode_set(root, root, vae, **OPTIONS)
    assert counts == {"encoded": 1, "unreadable video": 3, "unreadable annotation": 1}
    assert list(latents(root)) == ["latent_videos/train/3/0.pt"]
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "skipped:" in line]
    assert (
        len(lines) == 4
        and any("no such video" in line for line in lines)
        and any("annotation says 99" in line for line in lines)
    )
    assert not [p for p in root.rglob("*") if "part" in p.name]


def test_a_failing_write_leaves_nothing(tmp_path, vae, monkeypatch):
    root = write_video_set(tmp_path, 1)

    def write_to_full_disk(path, content):
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="the disk is full"):
        patch.setattr(encode.Path, "write_bytes", write_to_full_disk)
        encode.encode_set(root, root, vae, **OPTIONS)
    assert not list((root / "latent_videos").rglob("*.*"))
    assert encode.encode_set(root, root, vae, **OPTIONS) == {"encoded": 1}


def test_groups_and_workers_change_nothing_but_the_batches(tmp_path, vae):
    roots = [write_video_set(tmp_path / name, 5) for name in ("single", "grouped", "workers")]
    for root, options in zip(roots, ({"group_size": 1}, {"group_size": 3}, {"group_size": 3, "workers": 2})):
        assert encode.encode_set(root, root, vae, **options, **OPTIONS) == {"encoded": 5}
    single, grouped, workers = (
        [torch.load(path, weights_only=True) for path in latents(root).values()] for root in roots
    )
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(single, grouped))
    assert all(torch.equal(one, other) for one, other in zip(grouped, workers))


def test_compact_latents_are_read_like_any(tmp_path, vae):
    exact, compact = write_video_set(tmp_path / "a", 1), write_video_set(tmp_path / "b", 1)
    encode.encode_set(exact, exact, vae, **OPTIONS)
    encode.encode_set(compact, compact, vae, dtype=torch.bfloat16, **OPTIONS)
    (stored,) = latents(compact).values()
    assert torch.load(stored, weights_only=True).dtype == torch.bfloat16
    read = [
        LatentClips(root, num_frames=4, clip={"span": "episode"}, latent_shape=(vae.channels, 8, 8)).sample(
            0, np.random.default_rng(0)
        )["latents"]
        for root in (exact, compact)
    ]
    assert read[1].dtype == torch.float32 and not torch.equal(*read) and torch.allclose(*read, rtol=2**-8, atol=1e-6)


def test_a_run_stops_where_too_much_is_bad(tmp_path, vae):
    root = write_video_set(tmp_path, 24)
    for number in range(6):
        (root / f"videos/train/{number}/0.mp4").unlink()
    with pytest.raises(ValueError, match=r"6 of 2\d videos are unreadable"):
        encode.encode_set(root, root, vae, max_unreadable_fraction=0.1, **OPTIONS)
    assert len(latents(root)) >= 14


def test_another_folder_and_ranks(tmp_path, vae):
    data, out = write_video_set(tmp_path / "data", 3), tmp_path / "out"
    for rank in (0, 1):
        encode.encode_set(data, out, vae, rank=rank, world=2, **OPTIONS)
    assert len(latents(out)) == 3 and not latents(data)
    found = [
        LatentClips(out, split, num_frames=4, clip={"span": "episode"}, latent_shape=(vae.channels, 8, 8))
        for split in ("train", "val")
    ]
    assert list(map(len, found)) == [2, 1]  # the copy has no val folder


def test_truncated_real_webm(shared_data, tmp_path, vae):
    source = shared_data / "video_samples/sthv2"
    (tmp_path / "annotation/val").mkdir(parents=True)
    (tmp_path / "videos").mkdir()
    for name, keep in (("1023", 1.0), ("1113", 0.5)):
        (tmp_path / f"annotation/val/{name}.json").write_bytes((source / f"annotation/val/{name}.json").read_bytes())
        content = (source / f"videos/{name}.webm").read_bytes()
        (tmp_path / f"videos/{name}.webm").write_bytes(content[: int(len(content) * keep)])
    assert encode.encode_set(tmp_path, tmp_path, vae, **OPTIONS) == {"encoded": 1, "unreadable video": 1}
    assert list(latents(tmp_path)) == ["latent_videos_svd/val/1023/0.pt"]


def test_no_annotations(tmp_path, vae):
    with pytest.raises(FileNotFoundError, match="no annotations"):
        encode.encode_set(tmp_path, tmp_path, vae, **OPTIONS)
