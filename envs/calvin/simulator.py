"""Finding, configuring and opening `calvin_env`, the simulator of CALVIN, as its authors publish it (DESIGN 6).

Nothing of it is copied here: robot, scenes, cameras and tasks come from the configuration of the installed checkout.
It draws with TinyRenderer (on the CPU) or with EGL; scores move with the renderer, so results name it.
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

INSTALL_HINT = 'README.md, "Real CALVIN", has the steps'
RENDERERS = ("auto", "egl", "cpu")
SOFTWARE_RENDERERS = ("llvmpipe", "softpipe", "swrast", "swr")  # what Mesa calls its renderers that use no GPU
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


class CalvinError(RuntimeError):
    """calvin_env is absent, or its renderer does not start."""


class RendererChoice(NamedTuple):
    """What draws: for calvin_env, and for the result file."""

    egl: bool
    name: str


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """pybullet, its EGL plugin and calvin_env chatter on stdout and stderr, in part from C; errors are raised all the
    same."""
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
    """calvin_env asks for gym, which nobody maintains; its successor has all that is used."""
    if importlib.util.find_spec("gym") is None:
        for name in ("", ".utils", ".utils.seeding"):
            sys.modules[f"gym{name}"] = importlib.import_module(f"gymnasium{name}")


def import_calvin_env() -> tuple[ModuleType, ModuleType]:
    """The modules pybullet and calvin_env. Raises CalvinError, in one line, where they or their parts are absent."""
    try:
        with suppress_output():
            _alias_gym_to_gymnasium()
            pybullet, package = importlib.import_module("pybullet"), importlib.import_module("calvin_env")
            importlib.import_module("calvin_env.envs.play_table_env")
    except ImportError as error:
        raise CalvinError(f"CALVIN's simulator is not installed ({error}): {INSTALL_HINT}") from error
    if getattr(package, "__file__", None) is None:
        raise CalvinError(
            f"the folder {next(iter(package.__path__))} hides the installed calvin_env: keep the clone out of the "
            "folder where programs start"
        )
    if not (checkout_root(package) / "conf" / "scene").is_dir():
        raise CalvinError(
            f"calvin_env in {checkout_root(package)} is without its folders conf/ and data/, install a clone with pip install "
            f"-e: {INSTALL_HINT}"
        )
    return pybullet, package


def checkout_root(package: ModuleType) -> Path:
    """The checkout that holds calvin_env/, conf/ and data/."""
    return Path(package.__file__).resolve().parents[1]


def make_config(folder: Path, scene: str, *, static_size: int, gripper_size: int, egl: bool) -> DictConfig:
    """calvin_env's own configuration of the dataset's robot, scene "A" to "D" and the two cameras of a policy."""
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
    # scene_info is what the oracle compares
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
    """A new simulator. Raises CalvinError where it does not start or another one lives in this process."""
    try:
        with suppress_output():
            simulator = hydra.utils.instantiate(config.env, seed=seed)
            for camera in simulator.cameras if config.env.use_egl else ():
                camera.render()  # EGL says hello at its first picture
    except HydraException as error:
        raise CalvinError(f"calvin_env does not start ({error.__cause__ or error}): {INSTALL_HINT}") from error
    if simulator.cid != 0:
        close_simulator(simulator)
        raise CalvinError("calvin_env serves one world in a process: close the other one first")
    return simulator


def close_simulator(simulator: Any) -> None:
    """End a simulator, and see to it that its destructor does not end the next one."""
    with suppress_output():
        simulator.p.disconnect(physicsClientId=simulator.cid)
    simulator.close = lambda: None


def make_task_oracle(folder: Path) -> Any:
    """CALVIN's `Tasks`, which compares two infos."""
    return hydra.utils.instantiate(OmegaConf.load(folder / "conf" / "tasks" / "new_playtable_tasks.yaml"))


def version(package: ModuleType) -> str:
    """calvin_env's commit and the versions below it. Raises CalvinError where it is no git checkout (its own code asks
    git, too)."""
    git = importlib.import_module("git")
    try:
        commit = git.Repo(checkout_root(package)).head.commit.hexsha
    except (git.exc.GitError, ValueError) as error:
        raise CalvinError(
            f"calvin_env in {checkout_root(package)} is no readable git checkout ({error!r}): {INSTALL_HINT}"
        ) from error
    return f"calvin_env {commit[:12]}, pybullet {importlib.metadata.version('pybullet')}, numpy {importlib.metadata.version('numpy')}"


def choose_renderer(requested: str) -> RendererChoice:
    """ "egl" or "cpu" as wished; "auto" is EGL where it renders on a GPU. Raises CalvinError where a wished EGL does
    not start."""
    if requested not in RENDERERS:
        raise ValueError(f"renderer={requested}: choose one of {', '.join(RENDERERS)}")
    cpu = RendererChoice(False, "pybullet TinyRenderer (CPU)")
    if requested == "cpu":
        return cpu
    try:
        device = egl_device()
    except CalvinError as error:
        if requested == "egl":
            raise
        log.warning("%s; pictures come from TinyRenderer", error)
        return cpu
    if requested == "auto" and any(name in device.lower() for name in SOFTWARE_RENDERERS):
        log.warning(
            "EGL finds no GPU here: pictures come from TinyRenderer, whose look differs from CALVIN's dataset "
            "(renderer=egl takes Mesa)"
        )
        return cpu
    return RendererChoice(True, f"pybullet EGL, {device}")


def egl_device() -> str:
    """What EGL renders on, for instance "llvmpipe (LLVM 15.0.6, 256 bits), 4.5 (Core Profile) Mesa 22.3.6".

    Asked in a process of its own, because a machine without it may end the one that asks. Raises CalvinError.
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
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise CalvinError(
            f"pybullet's EGL does not start (exit code {done.returncode}: {last}), install libegl1 and the GPU's "
            "driver or take renderer=cpu"
        )
    return f"{found['GL_RENDERER']}, {found['GL_VERSION']}"
