"""The launchers, with `accelerate` replaced by one that writes down what it was asked for."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = """#!/usr/bin/env bash
echo "$@" | sed 's/.* -m //' >> asked
name=$(echo "$@" | sed -n 's/.* name=\\([^ ]*\\).*/\\1/p')
for kind in gfdm gidm defi; do case "$*" in *_$kind.train*) mkdir -p ckpts/$kind/$name && echo "{}" > ckpts/$kind/$name/meta.json ;; esac; done
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The repository without a venv, data and artifacts."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("configs", "common", "step1_gfdm", "step2_gidm", "step3_defi", "playtable"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/accelerate").write_text(ACCELERATE)
    (tmp_path / "bin/accelerate").chmod(0o755)
    return tmp_path


def launch(root: Path, script: str, *words: str, **variables: str) -> list[str]:
    """What was launched: module and words, a line each."""
    path = os.pathsep.join([str(root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DEFI_", "CUDA_", "ACCELERATE_"))}
    done = subprocess.run(["bash", str(root / "scripts" / script), *words], env={**kept, "PATH": path, "MACHINE": "cpu", **variables},
                          capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    asked = root / "asked"
    lines = asked.read_text().splitlines() if asked.exists() else []
    asked.unlink(missing_ok=True)
    return lines


def test_a_row_trains_what_it_stands_on_then_itself_then_rolls_out(root: Path) -> None:
    assert launch(root, "reproduce_row.sh", "t5_all_no_human") == [
        "step1_gfdm.train experiment=gfdm/t5_no_human name=t5_no_human", "step2_gidm.train experiment=gidm/t5_no_human name=t5_no_human",
        "step3_defi.train experiment=defi/t5_all_no_human name=t5_all_no_human",
        "step3_defi.eval env=calvin policy=ckpts/defi/t5_all_no_human out=outputs/t5_all_no_human"]
    assert launch(root, "reproduce_row.sh", "t5_gfdm_no_human") == [  # its forward model is there by now
        "step2_gidm.train name=full", "step3_defi.train experiment=defi/t5_gfdm_no_human name=t5_gfdm_no_human",
        "step3_defi.eval env=calvin policy=ckpts/defi/t5_gfdm_no_human out=outputs/t5_gfdm_no_human"]


def test_a_row_below_full_rolls_out_in_playtable(root: Path) -> None:
    lines = launch(root, "reproduce_row.sh", "t4_gfdm_no_pretrain", "scale=tiny", "loop.max_steps=3", ROLLOUT="sequences=2")
    assert lines == ["step2_gidm.train name=tiny scale=tiny loop.max_steps=3",
                     "step3_defi.train experiment=defi/t4_gfdm_no_pretrain name=t4_gfdm_no_pretrain scale=tiny loop.max_steps=3",
                     "step3_defi.eval env=playtable policy=ckpts/defi/t4_gfdm_no_pretrain out=outputs/t4_gfdm_no_pretrain sequences=2"]


def test_a_row_of_one_model_trains_it_alone(root: Path) -> None:
    assert launch(root, "reproduce_row.sh", "eq3_ddpm") == ["step1_gfdm.train experiment=gfdm/eq3_ddpm name=eq3_ddpm"]


def test_only_the_gpus_that_are_visible_are_counted(root: Path) -> None:
    (root / "bin/nvidia-smi").write_text("#!/usr/bin/env bash\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i; done\n")
    (root / "bin/nvidia-smi").chmod(0o755)
    (root / "bin/accelerate").write_text('#!/usr/bin/env bash\necho "$@" > asked\n')

    def flags(**variables: str) -> str:
        return launch(root, "step1_train_svd.sh", MACHINE="", **variables)[0].split(" -m ")[0]

    assert flags(CUDA_VISIBLE_DEVICES="2,5") == "launch --config_file configs/accelerate/8gpu.yaml --num_processes 2"
    assert flags(CUDA_VISIBLE_DEVICES="5") == "launch --config_file configs/accelerate/1gpu.yaml"
    assert flags(CUDA_VISIBLE_DEVICES="") == "launch --config_file configs/accelerate/cpu.yaml"
    assert flags() == "launch --config_file configs/accelerate/8gpu.yaml --num_processes 8"
