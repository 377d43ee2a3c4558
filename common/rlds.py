"""Robot episodes in RLDS folders, TFRecord or ArrayRecord, read by random access (Sec. 3.2, A.2, Table 12).

    <root>[/DOWNLOAD_DIR|/CONVERSION_DIR]/<name>/<version>/{dataset_info,features}.json
    <root>[/DOWNLOAD_DIR|/CONVERSION_DIR]/<name>/<version>/<name>-<split>.tfrecord-00000-of-00004

A record is one episode. TensorFlow is not needed: the framing of TFRecord is read here, that of ArrayRecord by the
package array-record. tensorflow-datasets decodes the payload, because it knows every feature codec; images stay encoded
until one is asked for.
"""

from __future__ import annotations

import functools
import io
import json
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from PIL import Image

from common.errors import MissingFileError, UserError

_HEADER = struct.Struct("<QI")  # length, masked crc32c of the length
_CRC = struct.Struct("<I")


class RldsError(UserError):
    """An RLDS folder, shard or episode cannot be read; the message names it and says what to do."""


class TFRecordFile:
    """The records of one TFRecord shard by index. Lengths and payloads are checked by their CRC."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @functools.cached_property
    def spans(self) -> np.ndarray:
        """(N, 2) offset and length in bytes of every payload. Raises RldsError where the framing is damaged."""
        if not self.path.is_file():
            raise RldsError(f"{self.path}: no such shard; download it again")
        size, spans, at = self.path.stat().st_size, [], 0
        with self.path.open("rb") as stream:
            while at < size:
                stream.seek(at)
                header = stream.read(_HEADER.size)
                where = f"{self.path}: record {len(spans)} at byte {at}"
                if len(header) < _HEADER.size:
                    raise RldsError(f"{where} is cut off in its header; download the shard again")
                length, crc = _HEADER.unpack(header)
                if crc != masked_crc32c(header[:8]):
                    raise RldsError(f"{where} has a corrupt length (crc differs); download the shard again")
                if at + _HEADER.size + length + _CRC.size > size:
                    raise RldsError(f"{where} claims {length} bytes, the file ends before; download the shard again")
                spans.append((at + _HEADER.size, length))
                at += _HEADER.size + length + _CRC.size
        # an array, because a set has up to a million records and every worker of a loader keeps this index
        return np.array(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> bytes:
        offset, length = map(int, self.spans[index])
        with self.path.open("rb") as stream:
            stream.seek(offset)
            payload, crc = stream.read(length), stream.read(_CRC.size)
        if _CRC.unpack(crc)[0] != masked_crc32c(payload):
            raise RldsError(f"{self.path}: record {index} is corrupt (crc differs); download the shard again")
        return payload


class ArrayRecordFile:
    """The records of one ArrayRecord shard by index. The package array-record reads and checks them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @functools.cached_property
    def count(self) -> int:
        """Number of records, from the footer of the shard. Raises RldsError where there is no valid footer."""
        return self._ask("the file", lambda reader: reader.num_records())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> bytes:
        return self._ask(f"record {index}", lambda reader: reader.read([index])[0])

    def _ask(self, what: str, question: Callable[[Any], Any]) -> Any:
        try:
            from array_record.python.array_record_module import ArrayRecordReader
        except ImportError as error:
            raise RldsError(
                f"{self.path}: reading ArrayRecord needs the package array-record (Linux): pip install array-record"
            ) from error
        if not self.path.is_file():
            raise RldsError(f"{self.path}: no such shard; download it again")
        try:
            # opened for every read, because the threads of a reader do not survive a fork
            reader = ArrayRecordReader(str(self.path), "readahead_buffer_size:0,max_parallelism:0")
            try:
                return question(reader)
            finally:
                reader.close()
        except (ValueError, IndexError, RuntimeError, OSError) as error:
            raise RldsError(f"{self.path}: {what} is corrupt ({_line(error)}); download the shard again") from error


# fileFormat in dataset_info.json, which is part of the names of the shards -> reader
FORMATS = {"tfrecord": TFRecordFile, "array_record": ArrayRecordFile}


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value.rstrip("\0") if isinstance(value, str) else None


def _code_points(value: Any) -> str | None:
    whole = isinstance(value, np.ndarray) and value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    return "".join(map(chr, value[value > 0])) if whole else None


# How a sentence is stored: as UTF-8, or as Language Table does, as a zero-padded array of code points. A decoder
# returns None for a value that is stored in another way.
ENCODINGS = {"text": _text, "code_points": _code_points}


class Episode:
    """One episode, decoded step by step. Keys are paths inside a step, such as "observation/image"."""

    def __init__(self, id: str, steps: Any) -> None:
        self.id, self._steps = id, steps

    def __len__(self) -> int:
        return len(self._steps)

    def has(self, key: str) -> bool:
        """Whether the episode has this feature."""
        return _find(self._step(0), key)[1] is None

    def encoded(self, key: str, index: int) -> bytes | np.ndarray:
        """The image of one step as it is stored, in most sets the bytes of a JPEG or PNG. `decode` opens it."""
        return self._value(key, index)

    def image(self, key: str, index: int) -> np.ndarray:
        """The image (H, W, 3) uint8 of one step; nothing else is decoded."""
        return decode(self.encoded(key, index), f"{self.id}: {key} of step {index}")

    def values(self, key: str) -> np.ndarray:
        """(T, ...) of a numeric feature over all steps."""
        return np.stack([self._value(key, index) for index in range(len(self))])

    def text(self, key: str, index: int = 0, encoding: str = "text") -> str:
        """A sentence without its padding; see ENCODINGS. Raises RldsError where the feature has another encoding."""
        value = self._value(key, index)
        sentence = ENCODINGS[encoding](value)
        if sentence is None:
            found = f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise RldsError(
                f"{self.id}: {key} is not encoded as {encoding}, it holds {found}; name its encoding, one of "
                f"{', '.join(ENCODINGS)}"
            )
        return sentence

    def _value(self, key: str, index: int) -> Any:
        value, missing = _find(self._step(index), key)
        if missing is not None:
            known = sorted(value) if isinstance(value, dict) else []
            raise RldsError(f"{self.id}: no feature {key!r}; at {missing!r} there are {known}")
        return value

    def _step(self, index: int) -> Any:
        try:
            return self._steps[index]
        except (ValueError, KeyError, IndexError) as error:
            raise RldsError(f"{self.id}: step {index} does not decode ({error})") from error


def decode(image: bytes | np.ndarray, what: str) -> np.ndarray:
    """An image as it is stored -> (H, W, 3) uint8. Raises RldsError; `what` names the image in the message."""
    if not isinstance(image, np.ndarray):
        try:
            return np.array(Image.open(io.BytesIO(image)).convert("RGB"))
        # PIL raises SyntaxError for a damaged PNG
        except (OSError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
            raise RldsError(f"{what} is not a readable image ({_line(error)})") from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise RldsError(f"{what} is not an image but {image.dtype} of shape {image.shape}")
    return image


def _find(value: Any, key: str) -> tuple[Any, str | None]:
    """(value at the path, None), or (value at the last part that exists, name of the first part that does not)."""
    for part in key.split("/"):
        if not isinstance(value, dict) or part not in value:
            return value, part
        value = value[part]
    return value, None


class RldsDataset:
    """The episodes of one split of an RLDS folder, by index. A shard is indexed when it is first used."""

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder, self.split = Path(folder), split
        info = _json(self.folder / "dataset_info.json")
        _json(self.folder / "features.json")
        self.name = info.get("name") or self.folder.parent.name
        self.format = info.get("fileFormat", "tfrecord")
        if self.format not in FORMATS:
            raise RldsError(
                f"{self.folder}: file format {self.format!r} is not read here, only {' and '.join(FORMATS)}"
            )
        lengths = {s["name"]: [int(n) for n in s["shardLengths"]] for s in info.get("splits", [])}
        if split not in lengths:
            raise RldsError(f"{self.folder}: no split {split!r}; dataset_info.json has {sorted(lengths)}")
        self.ends = np.cumsum(lengths[split])
        self.shards = [FORMATS[self.format](p) for p in self._files(len(lengths[split]))]

    def _files(self, count: int) -> list[Path]:
        pattern = re.compile(rf"-{re.escape(self.split)}\.{self.format}-(\d+)-of-{count:05d}$")
        found = {int(m[1]): p for p in self.folder.iterdir() if (m := pattern.search(p.name))}
        missing = sorted(set(range(count)) - set(found))
        if missing:
            raise RldsError(
                f"{self.folder}: {len(missing)} of {count} {self.split} shards are missing, the first is "
                f"number {missing[0]}; download the folder again"
            )
        return [found[i] for i in range(count)]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Episode:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: episode {index} of {len(self)}")
        shard = int(np.searchsorted(self.ends, index, side="right"))
        record = index - (int(self.ends[shard - 1]) if shard else 0)
        file, id = self.shards[shard], f"{self.name}/{self.split}/{index}"
        if record >= len(file):
            raise RldsError(
                f"{file.path}: holds {len(file)} records, dataset_info.json promises more; download it again"
            )
        features, decoders = _features(str(self.folder))
        payload = file[record]
        try:
            return Episode(id, features.deserialize_example_np(payload, decoders=decoders)["steps"])
        except (DecodeError, AttributeError, KeyError, ValueError) as error:
            raise RldsError(f"{id} in {file.path} does not decode as features.json says ({_line(error)})") from error


def splits(folder: str | Path) -> list[str]:
    """Names of the splits that have shards in an RLDS folder; dataset_info.json may name more."""
    folder = Path(folder)
    named = [s["name"] for s in _json(folder / "dataset_info.json").get("splits", [])]
    return [name for name in named if any(path for format in FORMATS for path in folder.glob(f"*-{name}.{format}-*"))]


def find_version_folder(root: str | Path, names: Iterable[str], version: str | None = None) -> Path:
    """The version folder of the first of `names` found under `root`, root/DOWNLOAD_DIR or root/CONVERSION_DIR.

    Without `version` it is the newest one. Raises MissingFileError.
    """
    names, others = list(names), []
    for name in names:
        for place in (Path(root), Path(root) / "DOWNLOAD_DIR", Path(root) / "CONVERSION_DIR"):
            versions = [p.parent for p in (place / name).glob("*/dataset_info.json")]
            wanted = [p for p in versions if version in (None, p.name)]
            if wanted:
                return max(wanted, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
            others += versions
    if others:
        raise MissingFileError(
            f"{others[0].parent}: version {version} is wanted, there is {', '.join(sorted(p.name for p in others))}; "
            f"fetch {names[0]}/{version}, or leave the set out of the mixture"
        )
    raise MissingFileError(
        f"no RLDS folder <name>/<version>/dataset_info.json for {' or '.join(names)} under {root}, "
        f"{root}/DOWNLOAD_DIR or {root}/CONVERSION_DIR; fetch it, or leave the set out of the mixture"
    )


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C, rotated, plus a constant."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _features(folder: str) -> tuple[Any, dict[str, Any]]:
    """The feature tree of a folder, and decoders that leave images encoded."""
    try:
        features = tfds.features.FeaturesDict.from_config(folder)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise RldsError(
            f"{folder}/features.json names a feature that tensorflow-datasets does not know ({_line(error)}); download "
            "it again"
        ) from error
    if "steps" not in features:
        raise RldsError(f"{folder}: features.json has no 'steps'; this is not an RLDS folder")
    return features, {"steps": _skip_images(features["steps"].feature)}


def _skip_images(feature: Any) -> dict[str, Any]:
    skips: dict[str, Any] = {}
    for name, child in feature.items():
        if isinstance(child, tfds.features.Image):
            skips[name] = tfds.decode.SkipDecoding()
        elif isinstance(child, tfds.features.FeaturesDict):
            skips[name] = _skip_images(child)
    return {name: skip for name, skip in skips.items() if skip != {}}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFileError(
            f"{path} is missing; an RLDS folder needs dataset_info.json and features.json beside its shards"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RldsError(f"{path} is not JSON ({error}); download it again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
