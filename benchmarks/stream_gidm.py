"""Speed and memory of reading step 2's pairs: the stream compared with random access and with video.

    python -m benchmarks.stream_gidm rlds=<RLDS folder> fps=5 image=observation/image_0 [video=<video set>] [video_fps=]
        [times=50] [joined=10] [passes=1] [pairs=4000] [block=512] [per_episode=8] [image_size=224] [buffer_gb=0.25]
        [rounds=3] [workers=0]

The set is read at two sizes, as it is and with its shard `times` times, and both again with `joined` episodes in one
record, because published sets have records of 5 to 30 MB. A run draws `per_episode` pairs per record `passes` times (of
the video set, `pairs`), so that all of the data are read: memory that grows with the data shows at the larger size.
`buffer_gb` should be less than the smaller size. Every run is a forked process; its memory is the peak resident size
above that before the set was opened. A round runs all of them in turn, and ratios are within a round. Reading checks
the CRC of every payload; the cost of that is timed on the records alone.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import resource
import statistics
import struct
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tensorflow_datasets.proto import tf_example_pb2

from common import loop, rlds
from common.mixture import block_size
from common.progress import tqdm
from step2_gidm.data.dataset import build_mixture

log = logging.getLogger(__name__)
DEFAULTS = {
    "rlds": "???",
    "fps": "???",
    "image": "observation/image",
    "text": "language_instruction",
    "video": None,
    "video_fps": None,
    "times": 50,
    "joined": 10,
    "passes": 1,
    "pairs": 4000,
    "block": 512,
    "per_episode": 8,
    "image_size": 224,
    "buffer_gb": 0.25,
    "rounds": 3,
    "workers": 0,
}


def copy_set(source: Path, out: Path, *, times: int, joined: int) -> Path:
    """A set of `times` links to the first shard of `source`, with `joined` episodes per record."""
    episodes = rlds.RldsDataset(source)
    payloads = [episodes.shards[0][i] for i in range(len(episodes.shards[0]))]
    payloads = [_join(payloads[i : i + joined]) for i in range(0, len(payloads), joined)] if joined > 1 else payloads
    out.mkdir(parents=True)
    shard = out / "payloads"
    shard.write_bytes(b"".join(_record(payload) for payload in payloads))
    for number in range(times):
        (out / f"{episodes.name}-train.tfrecord-{number:05d}-of-{times:05d}").symlink_to(shard)
    info = {
        "name": episodes.name,
        "fileFormat": "tfrecord",
        "splits": [{"name": "train", "shardLengths": [str(len(payloads))] * times}],
    }
    (out / "dataset_info.json").write_text(json.dumps(info))
    (out / "features.json").write_bytes((source / "features.json").read_bytes())
    return out


def _record(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return (
        length
        + struct.pack("<I", rlds.masked_crc32c(length))
        + payload
        + struct.pack("<I", rlds.masked_crc32c(payload))
    )


def _join(payloads: list[bytes]) -> bytes:
    whole = tf_example_pb2.Example.FromString(payloads[0])
    for payload in payloads[1:]:
        for name, feature in tf_example_pb2.Example.FromString(payload).features.feature.items():
            if name.startswith("steps/"):
                kind = feature.WhichOneof("kind")
                getattr(whole.features.feature[name], kind).value.extend(getattr(feature, kind).value)
    return whole.SerializeToString()


def read(options: DictConfig, sets: dict[str, Any], pairs: int, *, stream: bool) -> tuple[float, float, float]:
    """(pairs per second, peak resident memory above that before in MB, seconds to the first batch)."""
    plan = {"block": options.block, "pairs": options.per_episode, "buffer_gb": options.buffer_gb} if stream else None
    start, before = time.perf_counter(), _peak(resource.RUSAGE_SELF)
    samples = build_mixture(sets, length=10**6, image_size=options.image_size, stream=plan)
    count = max(2, pairs // 32)
    batches = loop.DistributedBatchSampler(
        len(samples),
        32,
        seed=0,
        rank=0,
        world=1,
        start=0,
        stop=count,
        block=block_size(samples),
        num_readers=max(1, options.workers),
    )
    times = []
    for _ in loop.loader(samples, batches, workers=options.workers, pin=False):
        times.append(time.perf_counter())
    above = _peak(resource.RUSAGE_CHILDREN if options.workers else resource.RUSAGE_SELF) - before
    return 32 * (count - 1) / (times[-1] - times[0]), above, times[0] - start


def _peak(whose: int) -> float:
    return resource.getrusage(whose).ru_maxrss / 1e3


def check(copy: Path, repeats: int = 20) -> tuple[float]:
    """(records per second of the checksum alone,)."""
    file = rlds.RldsDataset(copy).shards[0]
    payloads = [file[i] for i in range(len(file))]
    start = time.perf_counter()
    for _ in range(repeats):
        for payload in payloads:
            rlds.masked_crc32c(payload)
    return (repeats * len(payloads) / (time.perf_counter() - start),)


def main() -> None:
    options = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(sys.argv[1:]))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found: dict[str, list[tuple[float, float, float]]] = {}
    checked: dict[str, list[tuple[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        arms: dict[str, tuple[dict[str, Any], int, bool]] = {}
        checks: dict[str, Path] = {}
        sizes: dict[str, float] = {}
        for joined in dict.fromkeys((1, options.joined)):
            for times in dict.fromkeys((1, options.times)):
                copy = copy_set(
                    Path(options.rlds).resolve(), Path(folder) / f"{joined}x{times}", times=times, joined=joined
                )
                size = next(copy.glob("payloads")).stat().st_size * times / 1e6
                checks[f"random access, {joined} joined, {size:.0f} MB"] = copy
                row = {"rlds": str(copy), "fps": options.fps, "image": options.image, "text": options.text}
                pairs = options.passes * options.per_episode * times * len(rlds.RldsDataset(copy).shards[0])
                for stream in (False, True):
                    name = f"{'stream' if stream else 'random access'}, {joined} joined, {size:.0f} MB"
                    arms[name], sizes[name] = ({"set": row}, pairs, stream), size
        if options.video:
            arms["video, random access"] = (
                {"set": {"video": options.video, "fps": options.video_fps}},
                options.pairs,
                False,
            )
        for _ in tqdm(range(options.rounds), desc="rounds"):
            for name, (sets, pairs, stream) in arms.items():
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
                    found.setdefault(name, []).append(pool.submit(read, options, sets, pairs, stream=stream).result())
                if name in checks:
                    checked.setdefault(name, []).append(check(checks[name]))
    log.info(
        "a buffer of %.1f MB\n\n| reading | pairs | pairs/s | MB above before | first batch s |\n|---|---|---|---|---|",
        1e3 * options.buffer_gb,
    )
    for name, runs in found.items():
        rate, memory, first = (statistics.median(column) for column in zip(*runs))
        log.info("| %s | %d | %.0f | %.1f | %.1f |", name, arms[name][1], rate, memory, first)
    names = [name for name in found if name.startswith("stream")]
    log.info("\n| ratio | median | lowest | highest |\n|---|---|---|---|")
    for name in names:
        _ratio(f"{name}: rate over random access", found[name], found[name.replace("stream", "random access")], 0)
    for small, large in zip(names[::2], names[1::2]):
        _ratio(f"{large}: memory over {small}", found[large], found[small], 1)
        more = [((many[1] - few[1]) / (sizes[large] - sizes[small]),) for few, many in zip(found[small], found[large])]
        _ratio(f"{large}: more memory over more data than {small}", more, [(1.0,)] * len(more), 0)
    if options.video:
        video = found["video, random access"]
        _ratio(f"video, random access: rate over {names[0]}", video, found[names[0]], 0)
    for name, rates in checked.items():
        _ratio(f"{name}: time of its checksums over all of it", found[name], rates, 0)


def _ratio(what: str, some: list[tuple], others: list[tuple], column: int) -> None:
    ratios = sorted(one[column] / other[column] for one, other in zip(some, others))
    log.info("| %s | %#.3g | %#.3g | %#.3g |", what, statistics.median(ratios), ratios[0], ratios[-1])


if __name__ == "__main__":
    main()
