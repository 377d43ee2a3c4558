"""The scripts, with an `accelerate` that writes down what it was asked for instead of running it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from common import artifact, rows
from common.program import CONFIGS
from envs.tasks import resolve_tasks

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = """#!/usr/bin/env bash
echo "$@" | sed 's/.* -m //' >> asked
name=$(echo "$@" | sed -n 's/.* name=\\([^ ]*\\).*/\\1/p')
scale=$(echo "$@" | grep -oE " scale=(tiny|small)" || echo =full)
meta="{\\"format\\": FORMAT, \\"kind\\": \\"%s\\", \\"scale\\": \\"${scale#*=}\\"}"
for kind in gfdm gidm defi; do
    case "$*" in
        *_$kind.train*) mkdir -p ckpts/$kind/$name; printf "$meta" $kind > ckpts/$kind/$name/meta.json ;;
    esac
done
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The repository without a venv, data and artifacts."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("configs", "common", "step1_gfdm", "step2_gidm", "step3_defi", "envs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/accelerate").write_text(ACCELERATE.replace("FORMAT", str(artifact.FORMAT)))
    (tmp_path / "bin/accelerate").chmod(0o755)
    return tmp_path


def run(root: Path, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A launcher, with the `accelerate` of `root`."""
    path = os.pathsep.join([str(root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DEFI_", "CUDA_", "ACCELERATE_"))}
    return subprocess.run(
        ["bash", str(root / "scripts" / script), *words],
        env={**kept, "PATH": path, "MACHINE": "cpu", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def launch(root: Path, script: str, *words: str, **variables: str) -> list[str]:
    """What was launched: module and words, a line each."""
    done = run(root, script, *words, **variables)
    assert done.returncode == 0, done.stderr
    asked = root / "asked"
    lines = asked.read_text().splitlines() if asked.exists() else []
    asked.unlink(missing_ok=True)
    return lines


def test_a_row_trains_what_it_needs_then_itself_then_rolls_out(root: Path) -> None:
    assert launch(root, "reproduce_row.sh", "t5_all_no_human") == [
        "step1_gfdm.train experiment=gfdm/t5_no_human name=t5_no_human",
        "step2_gidm.train experiment=gidm/t5_no_human name=t5_no_human",
        "step3_defi.train experiment=defi/t5_all_no_human name=t5_all_no_human",
        "step3_defi.eval rollout=full policy=ckpts/defi/t5_all_no_human out=outputs/t5_all_no_human",
    ]
    assert launch(root, "reproduce_row.sh", "t5_gfdm_no_human") == [  # its forward model is there by now
        "step2_gidm.train name=full",
        "step3_defi.train experiment=defi/t5_gfdm_no_human name=t5_gfdm_no_human",
        "step3_defi.eval rollout=full policy=ckpts/defi/t5_gfdm_no_human out=outputs/t5_gfdm_no_human",
    ]


def test_a_row_below_full_rolls_out_what_its_scale_teaches(root: Path) -> None:
    lines = launch(
        root, "reproduce_row.sh", "t4_gfdm_no_pretrain", "scale=tiny", "loop.max_steps=3", ROLLOUT="sequences=2"
    )
    assert lines == [
        "step2_gidm.train name=tiny scale=tiny loop.max_steps=3",
        "step3_defi.train experiment=defi/t4_gfdm_no_pretrain name=t4_gfdm_no_pretrain scale=tiny loop.max_steps=3",
        "step3_defi.eval rollout=tiny policy=ckpts/defi/t4_gfdm_no_pretrain out=outputs/t4_gfdm_no_pretrain "
        "sequences=2",
    ]


def test_a_row_does_not_use_a_model_of_another_scale(root: Path) -> None:
    """`t8_binning` has the same folder at every scale; the inverse model of one scale must not become the policy of
    another."""
    assert launch(root, "reproduce_row.sh", "t8_binning", "scale=tiny")[-1].startswith("step3_defi.eval rollout=tiny ")
    done = run(root, "reproduce_row.sh", "t8_binning")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ckpts/gidm/t8_binning: ") and done.stderr.count("\n") == 1
    assert "scale=tiny" in done.stderr and "scale=full" in done.stderr
    assert not (root / "asked").exists(), "nothing is trained before"


@pytest.mark.parametrize(
    "scale, world, tasks, protocol",
    [
        ("tiny", "envs.playtable.PlayTableEnv", 11, ("A", 100, 360, 8)),
        ("small", "envs.playtable.PlayTableEnv", 11, ("A", 100, 360, 8)),
        ("full", "envs.calvin.env.CalvinEnv", 34, ("D", 1000, 720, 10)),
    ],
)
def test_a_scale_is_rolled_out_in_what_it_was_trained_for(scale: str, world: str, tasks: int, protocol: tuple) -> None:
    """The demonstrations of tiny and small hold eleven tasks in scene A; CALVIN's protocol asks for 1000 chains of 34
    tasks in scene D. A key that is given besides counts."""
    with initialize_config_dir(version_base=None, config_dir=CONFIGS):
        cfg, other = (
            compose("step3_eval", [f"rollout={scale}", "policy=x", *also])
            for also in ((), ("tasks=lifts", "scene=C", "horizon=30"))
        )
    assert cfg.env._target_ == world and len(resolve_tasks(cfg.tasks)) == tasks
    assert (cfg.scene, cfg.sequences, cfg.horizon, cfg.planner.execute) == protocol
    assert (len(resolve_tasks(other.tasks)), other.scene, other.horizon, other.sequences) == (3, "C", 30, protocol[1])


def test_a_row_of_one_model_trains_it_alone(root: Path) -> None:
    assert launch(root, "reproduce_row.sh", "eq3_ddpm") == ["step1_gfdm.train experiment=gfdm/eq3_ddpm name=eq3_ddpm"]
    assert launch(root, "reproduce_row.sh", "gidm/t8_binning", "scale=tiny") == [
        "step2_gidm.train experiment=gidm/t8_binning name=t8_binning scale=tiny"
    ]


def test_the_rows_are_listed_and_an_unknown_one_is_refused(root: Path) -> None:
    listed = run(root, "reproduce_row.sh").stdout.split()
    assert listed == list(rows.load()) and "defi/f8_human_20" in listed
    done = run(root, "reproduce_row.sh", "t10_everything")
    assert done.returncode == 1 and done.stderr.startswith(
        "There is no row t10_everything. The rows are: gfdm/eq3_ddpm "
    )


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_a_script_is_readable(script: str) -> None:
    """It can be parsed, says what it does, and every program and every key that it names exists."""
    text = (ROOT / "scripts" / script).read_text()
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)], check=True)
    assert max(map(len, text.splitlines())) <= 120
    assert script == "common.sh" or text.startswith("#!/usr/bin/env bash\n#")
    for module in re.findall(r"(?:python -m|launch) ((?:common|envs|step\d_\w+)\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


# What the longer scripts run, composed with the configs of today.
COMMANDS = [
    (script, *command)
    for script in ("quickstart.sh", "pretrain_playtable.sh", "few_labels.sh")
    for command in re.findall(
        r"python -m (\S+)((?: (?!>)\S+)*)", (ROOT / "scripts" / script).read_text().replace("\\\n", " ")
    )
]


@pytest.mark.parametrize("script, module, words", COMMANDS)
def test_the_commands_of_a_script_compose(script: str, module: str, words: str) -> None:
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    config = re.search(r'\bprogram\("(\w+)"', source)[1]
    words = words.replace("$ROLLOUT", "horizon=360 planner.execute=8 workers=6").replace('"$@"', "")
    words = (
        words.replace("$((GIDM_STEPS / 2))", "2")
        .replace("$experiment", "experiment=defi/t4_gidm_no_pretrain")
        .replace('"', "")
    )
    overrides = [re.sub(r"\$\{?\w+\}?", "1", word) for word in words.split()]
    with initialize_config_dir(version_base=None, config_dir=CONFIGS):
        compose(config, overrides)


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
