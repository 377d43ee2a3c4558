"""Find, configure and start `calvin_env`, the simulator that CALVIN's authors publish (Sec. 4.2).

Robot, scenes, cameras and tasks come from the configuration files of the installed checkout; none of them is copied
here. It renders with TinyRenderer (on the CPU) or with EGL. Success rates depend on the renderer, so results name it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from common.errors import UserError

INSTALL_HINT = "docs/calvin.md has the steps"
RENDERERS = ("auto", "egl", "cpu")
SOFTWARE_RENDERERS = ("llvmpipe", "softpipe", "swrast", "swr")  # names of Mesa's renderers that use no GPU
EGL_PROBE_TIMEOUT = 120
EGL_PROBE = """
import importlib.util, sys, pybullet
pybullet.connect(pybullet.DIRECT)
found = importlib.util.find_spec("eglRenderer")
plugin = pybullet.loadPlugin(found.origin, "_eglRendererPlugin") if found else pybullet.loadPlugin("eglRendererPlugin")
if plugin < 0:
    sys.exit("the plugin eglRenderer did not load")
pybullet.getCameraImage(8, 8)
"""

log = logging.getLogger(__name__)


class CalvinError(UserError):
    """calvin_env is not installed or incomplete, or its simulator or renderer does not start."""


class RendererChoice(NamedTuple):
    """Whether calvin_env renders with EGL, and the name of the renderer for result files."""

    egl: bool
    name: str


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Discard what pybullet, its EGL plugin and calvin_env write to stdout and stderr, also from C code."""
    c_library = ctypes.CDLL(None)
    kept = {}
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        kept[number] = os.dup(number)
    c_library.fflush(None)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for number in kept:
                os.dup2(sink, number)
            yield
    finally:
        c_library.fflush(None)
        os.close(sink)
        for number, descriptor in kept.items():
            os.dup2(descriptor, number)
            os.close(descriptor)


def _alias_gym_to_gymnasium() -> None:
    """Let calvin_env import gymnasium as gym, which is no longer maintained. It has all that calvin_env uses."""
    if importlib.util.find_spec("gym") is None:
        for name in ("", ".utils", ".utils.seeding"):
            sys.modules[f"gym{name}"] = importlib.import_module(f"gymnasium{name}")


def import_calvin_env() -> tuple[ModuleType, ModuleType]:
    """Import pybullet and calvin_env. Raises CalvinError, with a message of one line, if they or parts are missing."""
    try:
        with suppress_output():
            _alias_gym_to_gymnasium()
            pybullet, package = importlib.import_module("pybullet"), importlib.import_module("calvin_env")
            importlib.import_module("calvin_env.envs.play_table_env")
    except ImportError as error:
        raise CalvinError(f"CALVIN's simulator is not installed ({error}): {INSTALL_HINT}") from error
    if getattr(package, "__file__", None) is None:
        raise CalvinError(
            f"the folder {next(iter(package.__path__))} hides the installed calvin_env: move the clone out of the "
            "folder in which programs are started"
        )
    if not (checkout_root(package) / "conf" / "scene").is_dir():
        raise CalvinError(
            f"calvin_env in {checkout_root(package)} is without its folders conf/ and data/: install a clone of it "
            f"with pip install -e; {INSTALL_HINT}"
        )
    return pybullet, package


def checkout_root(package: ModuleType) -> Path:
    """The checkout, with the folders calvin_env/, conf/ and data/."""
    return Path(package.__file__).resolve().parents[1]


def make_config(folder: Path, scene: str, *, static_size: int, gripper_size: int, egl: bool) -> DictConfig:
    """The configuration of calvin_env for a scene, with the robot of the dataset and the cameras static and gripper."""
    conf = folder / "conf"
    robot = OmegaConf.merge(
        OmegaConf.load(conf / "robot" / "panda.yaml"),
        OmegaConf.load(conf / "robot" / "panda_longer_finger.yaml"),
    )
    del robot["defaults"]
    cameras = {name: OmegaConf.load(conf / "cameras" / "cameras" / f"{name}.yaml") for name in ("static", "gripper")}
    for name, size in (("static", static_size), ("gripper", gripper_size)):
        cameras[name].width = cameras[name].height = size
    env = OmegaConf.load(conf / "env" / "play_table_env.yaml")
    # The success detection compares scene_info.
    env.update(use_scene_info=True, use_egl=egl, show_gui=False)
    scene_config = OmegaConf.load(conf / "scene" / f"calvin_scene_{scene}.yaml")
    return OmegaConf.create(
        {
            "env": env,
            "robot": robot,
            "scene": scene_config,
            "cameras": cameras,
            "data_path": str(folder / "data"),
            "use_vr": False,
        }
    )


def create_simulator(config: DictConfig, seed: int) -> Any:
    """Start a simulator. Raises CalvinError if it does not start or if this process has another one already."""
    try:
        with suppress_output():
            simulator = hydra.utils.instantiate(config.env, seed=seed)
            for camera in simulator.cameras if config.env.use_egl else ():
                camera.render()  # EGL writes its greeting when it renders for the first time
    except HydraException as error:
        raise CalvinError(f"calvin_env does not start ({error.__cause__ or error}): {INSTALL_HINT}") from error
    if simulator.cid != 0:
        close_simulator(simulator)
        raise CalvinError("calvin_env allows one simulator in a process: close the other one first")
    return simulator


def close_simulator(simulator: Any) -> None:
    """End a simulator, and prevent its destructor from ending the next one."""
    with suppress_output():
        simulator.p.disconnect(physicsClientId=simulator.cid)
    simulator.close = lambda: None


def make_task_oracle(folder: Path) -> Any:
    """CALVIN's `Tasks`, the success detection that compares two infos."""
    return hydra.utils.instantiate(OmegaConf.load(folder / "conf" / "tasks" / "new_playtable_tasks.yaml"))


def version(package: ModuleType) -> str:
    """The commit of calvin_env and the versions of pybullet and numpy.

    Raises CalvinError if it is not a git checkout, which calvin_env's own code requires as well.
    """
    git = importlib.import_module("git")
    try:
        commit = git.Repo(checkout_root(package)).head.commit.hexsha
    except (git.exc.GitError, ValueError) as error:
        raise CalvinError(
            f"calvin_env in {checkout_root(package)} is no readable git checkout ({error!r}): {INSTALL_HINT}"
        ) from error
    below = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("pybullet", "numpy"))
    return f"calvin_env {commit[:12]}, {below}"


def choose_renderer(requested: str) -> RendererChoice:
    """Choose "egl" or "cpu" as requested; "auto" is EGL if it renders on a GPU.

    Raises UserError for any other value, CalvinError if EGL is requested and does not start.
    """
    if requested not in RENDERERS:
        raise UserError(f"renderer={requested}: choose one of {', '.join(RENDERERS)}")
    cpu = RendererChoice(False, "pybullet TinyRenderer (CPU)")
    if requested == "cpu":
        return cpu
    try:
        device = egl_device()
    except CalvinError as error:
        if requested == "egl":
            raise
        log.warning("%s; TinyRenderer renders the images instead", error)
        return cpu
    if requested == "auto" and any(name in device.lower() for name in SOFTWARE_RENDERERS):
        log.warning(
            "EGL finds no GPU, so TinyRenderer renders the images, which look different from CALVIN's dataset "
            "(renderer=egl uses Mesa instead)"
        )
        return cpu
    return RendererChoice(True, f"pybullet EGL, {device}")


def egl_device() -> str:
    """The device that EGL renders on, for instance "llvmpipe (LLVM 15.0.6, 256 bits), 4.5 (Core Profile) Mesa 22.3.6".

    It is found out in a separate process, because EGL may crash the process on a machine without it. Raises CalvinError
    if EGL does not start.
    """
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", EGL_PROBE],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=EGL_PROBE_TIMEOUT,
            env=settings,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CalvinError(f"EGL did not answer within {EGL_PROBE_TIMEOUT} s") from error
    found = dict(re.findall(r"^(GL_RENDERER|GL_VERSION)=(.*)$", done.stdout, re.MULTILINE))
    if done.returncode or len(found) < 2:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CalvinError(
            f"pybullet's EGL does not start (exit code {done.returncode}: {last}), install libegl1 and the GPU's "
            "driver or take renderer=cpu"
        )
    return f"{found['GL_RENDERER']}, {found['GL_VERSION']}"
