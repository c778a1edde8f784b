"""The workflows name what exists, pin what they use, and need no secret."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
FOLDERS = "benchmarks|csrc|docs|examples|fused_resnet|tests"
every = pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)


def load(file):
    workflow = yaml.safe_load(file.read_text())
    workflow["on"] = workflow.pop(True)  # YAML 1.1 takes the word for a truth value
    return workflow


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job.get("steps", ())]


def scripts(workflow):
    return [step["run"] for step in steps(workflow) if "run" in step]


def test_there_are_lint_tests_gate_wheels_and_release():
    assert {file.stem for file in FILES} == {"ci", "gate", "wheels", "release"}
    said = "\n".join(script for file in FILES for script in scripts(load(file)))
    assert {"make lint", "make test", "make gate"} <= set(re.findall(r"make \w+", said))
    assert load(ROOT / ".github/workflows/gate.yml")["on"]["schedule"]
    assert load(ROOT / ".github/workflows/release.yml")["on"]["push"]["tags"] == ["v*"]


@every
def test_targets_and_paths_exist(file):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = file.read_text()
    for script in scripts(load(file)):
        assert set(re.findall(r"\bmake ([a-z]+)", script)) <= targets
        for variable in re.findall(r"\bmake .*?\b([A-Z]+)=", script):
            assert re.search(rf"^{variable} +\?=", (ROOT / "Makefile").read_text(), re.MULTILINE), variable
    for path in re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for pattern in re.findall(r"(?<![\w/-])([\w*.-]+\.(?:txt|md|toml))\b", text):
        assert pattern == "notes.md" or list(ROOT.glob(pattern)), pattern
    for variable in re.findall(r"\b(FUSED_RESNET_[A-Z_]+)=", text):
        assert variable in (ROOT / "setup.py").read_text(), variable


@every
def test_actions_are_pinned_and_nothing_is_secret(file):
    workflow = load(file)
    used = [job["uses"] for job in workflow["jobs"].values() if "uses" in job]
    used += [step["uses"] for step in steps(workflow) if "uses" in step]
    for name in used:
        if name.startswith("./"):
            assert (ROOT / name).exists() and "workflow_call" in load(ROOT / name)["on"]
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", name), f"{name} is not pinned to a major version"
    assert "secrets." not in file.read_text()
    assert workflow["permissions"] == {"contents": "read"}


@every
def test_jobs_end_and_follow_jobs_that_exist(file):
    jobs = load(file)["jobs"]
    for name, job in jobs.items():
        assert "uses" in job or 0 < job["timeout-minutes"] <= 120, f"{name} may run for hours"
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(jobs)


@every
def test_scripts_are_well_formed(file):
    bash = shutil.which("bash") or pytest.skip("there is no bash")
    for script in scripts(load(file)):
        plain = re.sub(r"\$\{\{.*?\}\}", "x", script)
        done = subprocess.run([bash, "-n"], input=plain, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_pythons_are_those_of_the_package():
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    for name, job in (("ci", "test"), ("wheels", "use")):
        pythons = load(ROOT / f".github/workflows/{name}.yml")["jobs"][job]["strategy"]["matrix"]["python"]
        assert pythons[0] == oldest and len(pythons) == 3 and all(isinstance(python, str) for python in pythons)
