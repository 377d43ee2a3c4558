"""Recordings have CALVIN's format, their actions can be replayed, and workers and kills do not change the result."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import yaml

from common.errors import UserError
from envs.playtable import PlayTableEnv
from envs.recording import recorder
from envs.recording.demonstrate import demonstrate, demonstrate_chain
from envs.recording.recorder import record
from envs.tasks import ELEVEN, INSTRUCTIONS

FIXTURES = ["open_drawer", "close_drawer", "turn_on_led", "turn_off_led"]


def without_images(scene: str, monkeypatch: pytest.MonkeyPatch) -> PlayTableEnv:
    """An environment that renders no images."""
    env = PlayTableEnv(scene)
    monkeypatch.setattr(
        env, "get_obs", lambda: {"rgb_obs": {"rgb_static": None, "rgb_gripper": None}, **env._state_obs()}
    )
    return env


def unpickled(path: Path) -> dict:
    return np.load(path, allow_pickle=True).item()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("recording") / "A"
    counts = record(
        scenes=["A", "D"], tasks=FIXTURES, episodes=8, out=out, workers=2, seed=1, videos=True, validation_fraction=0.2
    )
    return out, counts


def test_counts_and_folders(recording: tuple[Path, dict]) -> None:
    out, counts = recording
    assert counts["episodes"] == 8 == sum(counts["tasks"].values())
    assert counts["frames"] == len(list(out.glob("*/episode_*.npz")))
    assert not (out / ".parts").exists() and not list(out.rglob("*.part"))


def test_frames_are_calvins(recording: tuple[Path, dict]) -> None:
    out, _ = recording
    with np.load(out / "training" / "episode_0000000.npz", allow_pickle=False) as frame:
        shapes = {key: (frame[key].shape, frame[key].dtype) for key in frame.files}
    assert shapes == {
        "rgb_static": ((200, 200, 3), np.uint8),
        "rgb_gripper": ((84, 84, 3), np.uint8),
        "actions": ((7,), np.float64),
        "rel_actions": ((7,), np.float64),
        "robot_obs": ((15,), np.float64),
        "scene_obs": ((24,), np.float64),
    }


def test_ids_are_contiguous_and_annotated(recording: tuple[Path, dict]) -> None:
    out, counts = recording
    following = 0
    for split in ("training", "validation"):
        spans = np.load(out / split / "ep_start_end_ids.npy")
        assert spans.dtype == np.int64 and len(spans) > 0
        assert [int(start) for start in spans[:, 0]] == [following, *(int(end) + 1 for end in spans[:-1, 1])]
        following = int(spans[-1, 1]) + 1
        np.testing.assert_array_equal(np.load(out / split / "ep_lens.npy"), spans[:, 1] - spans[:, 0] + 1)
        annotations = unpickled(out / split / "lang_annotations" / "auto_lang_ann.npy")
        assert annotations["info"]["indx"] == [tuple(span) for span in spans.tolist()]
        language = annotations["language"]
        assert language["ann"] == [INSTRUCTIONS[task] for task in language["task"]]
        assert len(language["emb"]) == len(spans)
        scenes = unpickled(out / split / "scene_info.npy")
        assert min(first for first, _ in scenes.values()) == spans[0, 0]
        assert max(last for _, last in scenes.values()) == spans[-1, 1]
        statistics = yaml.safe_load((out / split / "statistics.yaml").read_text())
        assert len(statistics["robot_obs"][0]["mean"]) == 15 and len(statistics["act_max_bound"]) == 7
        assert yaml.safe_load((out / split / ".hydra" / "merged_config.yaml").read_text())["world"] == "playtable"
    assert following == counts["frames"]
    assert set(unpickled(out / "training" / "scene_info.npy")) == {"calvin_scene_A", "calvin_scene_D"}


def test_actions_are_the_next_pose_and_the_clean_command(recording: tuple[Path, dict]) -> None:
    out, _ = recording
    start, end = np.load(out / "training" / "ep_start_end_ids.npy")[0]
    frames = [np.load(out / "training" / f"episode_{number:07d}.npz") for number in range(start, end + 1)]
    for now, after in zip(frames, frames[1:]):
        np.testing.assert_array_equal(now["actions"][:6], after["robot_obs"][:6])
        assert now["actions"][6] == now["rel_actions"][6]
        assert np.abs(now["rel_actions"]).max() <= 1


def test_the_video_set_has_its_layout(recording: tuple[Path, dict]) -> None:
    root = recording[0] / "videos_set"
    for split, folder in (("train", "training"), ("val", "validation")):
        for path in sorted((root / "annotation" / split).glob("*.json")):
            annotation = json.loads(path.read_text())
            assert annotation["texts"][0] in INSTRUCTIONS.values() and annotation["episode_id"] == path.stem
            assert annotation["latent_videos"][1]["latent_video_path"] == f"latent_videos/{split}/{path.stem}/1.pt"
            scenes, spans = (
                unpickled(recording[0] / folder / "scene_info.npy"),
                np.load(recording[0] / folder / "ep_start_end_ids.npy"),
            )
            assert (
                scenes[annotation["scene"]][0] <= spans[int(path.stem)][0]
                and spans[int(path.stem)][1] <= scenes[annotation["scene"]][1]
            )
            assert np.shape(annotation["state"]) == (annotation["video_length"], 15)
            for entry, edge in zip(annotation["videos"], (200, 84)):
                with av.open(str(root / entry["video_path"])) as film:
                    pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
                assert len(pictures) == annotation["video_length"] and pictures[0].shape == (edge, edge, 3)
    spans = np.load(recording[0] / "training" / "ep_start_end_ids.npy")
    assert len(list((root / "annotation" / "train").glob("*.json"))) == len(spans)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.npz"))}


def test_the_number_of_workers_and_a_kill_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = {"scenes": ["D"], "tasks": FIXTURES, "episodes": 4, "seed": 3}
    record(**request, out=tmp_path / "two", workers=2)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recorder.writer, "write_split", killed)  # half of the frames are already in place
        record(**request, out=tmp_path / "one", workers=1)
    assert (tmp_path / "one" / ".parts").is_dir()
    with pytest.raises(ValueError, match="other settings"):
        record(**{**request, "seed": 4}, out=tmp_path / "one", workers=1)
    summary = next(
        path for path in sorted(tmp_path.glob("one/.parts/*/summary.json")) if json.loads(path.read_text())["segments"]
    )
    text = summary.read_text()
    summary.write_text(text.replace('"renderer": "', '"renderer": "another '))
    with pytest.raises(UserError, match=r"renderer: .*begin again"):
        record(**request, out=tmp_path / "one", workers=1)
    summary.write_text(text)
    record(**request, out=tmp_path / "one", workers=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") != {}
    with pytest.raises(ValueError, match="already holds"):
        record(**request, out=tmp_path / "one", workers=1)


def kill_workers(times: int) -> None:
    """Kill a worker of the recording in this process, `times` times, as soon as there is one."""
    killed: set[int] = set()
    while len(killed) < times:
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if (
                    process.pid not in killed
                    and "spawn_main" in " ".join(process.cmdline())
                    and process.cpu_times().user > 0.3
                ):
                    process.kill()
                    killed.add(process.pid)
                    break
        time.sleep(0.05)


@pytest.mark.parametrize("times", [1, 4])
def test_a_worker_that_dies_is_replaced_a_few_times(tmp_path: Path, times: int) -> None:
    request = {"scenes": ["D"], "tasks": FIXTURES, "episodes": 3, "seed": 3, "out": tmp_path / "killed", "workers": 1}
    killer = threading.Thread(target=kill_workers, args=(times,), daemon=True)
    killer.start()
    if times > recorder.MAX_RESTARTS:
        with pytest.raises(UserError, match="run the same command again"):
            record(**request)
        killer.join(20)
    record(**request)
    assert not killer.is_alive()
    record(**{**request, "out": tmp_path / "calm"})
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm") != {}


def test_chains_go_on_from_where_they_are_and_lift(monkeypatch: pytest.MonkeyPatch) -> None:
    env = without_images("D", monkeypatch)
    chains = [demonstrate(env, ELEVEN, 5, np.random.default_rng(seed))[0] for seed in range(24)]
    segments = [segment for segments in chains for segment in segments]
    neutral = [segment for segment in segments if abs(segment.robot_obs[0][2] - 0.5712808) < 1e-3]
    lifts = [segment for segment in segments if segment.task.startswith("lift")]
    assert 0.15 < len(neutral) / len(segments) < 0.55
    assert 0.15 < len(lifts) / len(segments) < 0.55
    assert any(segments[-1].task.startswith("lift") and len(segments) >= 4 for segments in chains)


def test_lifts_are_shown_from_misses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    env = without_images("D", monkeypatch)
    monkeypatch.setattr("envs.recording.displacement.PERTURB_PROB", 1.0)
    lifts = ["lift_red_block_table", "lift_blue_block_table", "lift_pink_block_table"]
    chains = [demonstrate(env, lifts, 1, np.random.default_rng(seed)) for seed in range(60)]
    assert sum(failed for _, failed in chains) <= 4, "pushed off its course, the expert still lifts"
    first = np.array([segment.robot_obs[0] for segments, _ in chains for segment in segments])
    assert (first[:, 2] < 0.5).sum() >= 3, "the hand stands at the table"
    assert (first[:, 14] < 0).sum() >= 2, "the hand is shut"


def test_consecutive_chains_start_alike_and_lift_what_their_sentence_names(monkeypatch: pytest.MonkeyPatch) -> None:
    env = without_images("A", monkeypatch)
    shares = {
        "CHAIN_LENGTH_PROBS": (1.0, 0.0, 0.0, 0.0, 0.0),
        "LIFT_LAST_PROB": 1.0,
        "UNDISTURBED_PROB": 1.0,
        "TWO_BLOCKS_PROB": 1.0,
        "SCATTERED_PROB": 0.0,
    }
    for name, share in shares.items():
        monkeypatch.setattr(f"envs.recording.demonstrate.{name}", share)
    for number in (0, 2, 4):
        (one,), (two,) = (demonstrate_chain(env, ELEVEN, 5, seed=7, number=twin)[0] for twin in (number, number + 1))
        assert {one.task, two.task} < {
            "lift_red_block_table",
            "lift_blue_block_table",
            "lift_pink_block_table",
        } and one.task != two.task
        assert np.array_equal(one.scene_obs[0], two.scene_obs[0]) and np.array_equal(one.robot_obs[0], two.robot_obs[0])
    assert not np.array_equal(demonstrate_chain(env, ELEVEN, 5, seed=7, number=6)[0][0].scene_obs[0], one.scene_obs[0])


def test_the_expert_succeeds_from_displaced_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    env = without_images("A", monkeypatch)
    for name, share in (
        ("displacement.RANDOM_POSE_PROB", 1.0),
        ("displacement.HOVER_PROB", 0.5),
        ("displacement.WRONG_SIDE_PROB", 0.5),
        ("demonstrate.UNDISTURBED_PROB", 0.0),
    ):
        monkeypatch.setattr(f"envs.recording.{name}", share)
    chains = [demonstrate(env, ELEVEN, 1, np.random.default_rng(seed)) for seed in range(40)]
    assert sum(failed for _, failed in chains) <= 3
    places = np.array([segment.robot_obs[0][:3] for segments, _ in chains for segment in segments])
    assert (places.std(0) > [0.15, 0.05, 0.03]).all(), "the hand begins all over the table"
    near = [
        np.abs(segment.robot_obs[0][:3] - block[:3]).max() < 0.15
        for segments, _ in chains
        for segment in segments
        if segment.task.startswith("lift")
        for block in [
            segment.scene_obs[0][6:].reshape(3, 6)[list(env.scene.blocks).index(f"block_{segment.task.split('_')[1]}")]
        ]
    ]
    assert sum(near) >= 3


def test_labels_replay_open_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    env = without_images("D", monkeypatch)
    monkeypatch.setattr("envs.recording.demonstrate.NOISE_SIGMAS", (0.0,))
    replayed = total = 0
    for seed in range(8):
        for segment in demonstrate(env, FIXTURES, 1, np.random.default_rng(seed))[0]:
            env.reset(robot_obs=segment.robot_obs[0], scene_obs=segment.scene_obs[0])
            before, done = env.get_info(), False
            for action in segment.rel_actions:
                _, info = env.step(action, render=False)
                done = done or env.check_success(segment.task, before, info)
            replayed, total = replayed + done, total + 1
    assert total >= 6 and replayed >= total - 1


def test_bad_requests_say_what_to_do(tmp_path: Path) -> None:
    good = {"scenes": ["D"], "tasks": FIXTURES, "episodes": 2, "out": tmp_path / "x"}
    for change, words in (
        ({"scenes": ["E"]}, "A, B, C, D"),
        ({"tasks": ["sing"]}, "sing"),
        ({"tasks": []}, "empty"),
        ({"episodes": 0}, "episodes=0"),
        ({"workers": 0}, "workers=0"),
        ({"length": 9}, "length=9"),
        ({"validation_fraction": 1.5}, "validation_fraction=1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            record(**{**good, **change})
    assert not (tmp_path / "x").exists()


def test_the_program_ends_with_one_line_on_bad_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "envs.record", "tasks=[sing]", f"out={tmp_path}/x", "episodes=1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == 1 and ended.stderr.startswith("error: unknown task 'sing'")
    assert "Traceback" not in ended.stderr


def test_an_interrupt_does_not_wait_for_chains_in_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(pool: ProcessPoolExecutor, *_: object, **__: object) -> None:
        pool.submit(time.sleep, 200)
        raise KeyboardInterrupt

    monkeypatch.setattr(recorder, "_in_order", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        record(scenes=["D"], tasks=FIXTURES, episodes=1, out=tmp_path / "x", workers=1)
    assert time.monotonic() - began < 100


def test_workers_end_with_a_program_that_is_killed(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "envs.record",
        f"out={tmp_path}/x",
        "episodes=1000",
        "workers=2",
        "tasks=eleven",
    ]
    started = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2]
    )
    try:
        limit = time.monotonic() + 180
        while not list(tmp_path.glob("x/.parts/*/summary.json")):
            assert started.poll() is None and time.monotonic() < limit
            time.sleep(0.2)
        workers = psutil.Process(started.pid).children(recursive=True)
    finally:
        started.kill()
        started.wait()
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=20)[1]
