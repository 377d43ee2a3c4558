"""pyproject.toml, the requirements files and what the code imports agree; programs start in any folder."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "step1_gfdm", "step2_gidm", "step3_defi", "envs", "benchmarks")
MODULES = {  # module -> the distribution that holds it, where that has another name
    "huggingface_hub": "huggingface-hub",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "hydra": "hydra-core",
    "tensorflow_datasets": "tensorflow-datasets",
    "google_crc32c": "google-crc32c",
    "google": "tensorflow-datasets",  # google.protobuf, which it requires
    "array_record": "array-record",
}
OPTIONAL = {"calvin_env", "pybullet", "gymnasium", "git", "quaternion", "cv2"}  # imported where they are installed


def requirements(name: str) -> set[str]:
    """The requirements of a file, without comments and spaces."""
    lines = (line.split("#")[0] for line in (ROOT / name).read_text().splitlines())
    return {normal(line) for line in lines if line.strip()}


def normal(requirement: str) -> str:
    return re.sub(r"\s+", "", requirement).replace("'", '"')


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(found: set[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for requirement in found}


def test_requirements_txt_lists_the_dependencies_and_the_extra_dev():
    listed = {normal(r) for r in project()["dependencies"] + project()["optional-dependencies"]["dev"]}
    assert listed == requirements("requirements.txt")


def test_requirements_calvin_txt_lists_the_extra_calvin():
    assert {normal(r) for r in project()["optional-dependencies"]["calvin"]} == requirements("requirements-calvin.txt")


def test_the_lock_holds_a_version_of_every_requirement():
    locked = {line.split("==")[0] for line in requirements("requirements-lock.txt")}
    assert names(requirements("requirements.txt")) <= names(locked)


def test_extras_and_python_versions():
    assert {"calvin", "simpler", "lerobot", "serve", "dev"} <= project()["optional-dependencies"].keys()
    assert project()["requires-python"] == ">=3.10,<3.14"


def test_what_is_imported_is_required():
    imported = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - set(ROOMS) - OPTIONAL
    required = {MODULES.get(name, name).lower().replace("_", "-") for name in foreign}
    assert required <= names(requirements("requirements.txt"))


def test_every_folder_of_code_and_configs_is_a_package():
    from setuptools import find_namespace_packages

    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = set(find_namespace_packages(str(ROOT), include=options["include"]))
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for room in (*ROOMS[:-1], "configs")
        for pattern in ("*.py", "*.yaml")
        for path in (ROOT / room).rglob(pattern)
    }
    assert folders <= packages
    assert not {name for name in packages if name.split(".")[0] not in (*ROOMS[:-1], "configs")}


def test_programs_start_in_any_folder(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "common.missing", "--cfg", "job", "scale=tiny", "models=[gfdm/tiny]"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "gfdm/tiny" in done.stdout, done.stderr
