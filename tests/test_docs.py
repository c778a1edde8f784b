"""The documentation says what the code does: its programs run, its commands exist, its links lead somewhere."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import typer

import fused_resnet as fr
from fused_resnet.bench.results import FIELDS
from fused_resnet.cli.app import app
from tests.run_blocks import blocks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
PROGRAMS = [page for page in PAGES if blocks(page.read_text(), "python")]
DRAWINGS = sorted(DOCS.glob("img/*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


def named(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All programs of all pages, in one process as a user has it: without Triton's interpreter, with an empty cache."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "error::UserWarning",
                   "FUSED_RESNET_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "tests.run_blocks", *map(str, PROGRAMS)], text=True, env=environment,
                          cwd=tmp_path_factory.mktemp("work"), capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.gate  # a minute, most of it AOTInductor's
@pytest.mark.xdist_group("programs")
@pytest.mark.parametrize("page", PROGRAMS, ids=named)
def test_programs_run(ran, page):
    pytest.importorskip("torchvision")
    result = ran[str(page)]
    assert result["failed"] is None, result["failed"]
    assert result["ran"] == len(blocks(page.read_text(), "python"))


def commands(text):
    """(command, options) of every `fused-resnet ...` in a page, in blocks and in prose."""
    for line in re.findall(r"(?:fused-resnet|-m fused_resnet) ([^`#\n]*(?:\n(?!\n)[^`#\n]*`)?)", text):
        words = line.replace("\n", " ").split()
        if words and re.fullmatch(r"[a-z]+", words[0]):
            yield words[0], re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", " ".join(words[1:]))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_and_their_options_exist(page):
    known = typer.main.get_command(app).commands
    for command, options in commands(page.read_text()):
        if command not in known:
            assert command in {"and", "is", "says"} or named(page) == "CHANGELOG.md", f"fused-resnet {command}"
            continue
        accepted = {opt for p in known[command].params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert set(options) <= accepted, f"fused-resnet {command} has no {set(options) - accepted}"


def test_the_pages_show_commands():
    shown = {command for page in PAGES for command, _ in commands(page.read_text())}
    assert shown >= set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", page.read_text())) <= targets


def slugs(page):
    """The anchors of a page, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists() and other.is_relative_to(ROOT), f"{named(page)} links to {target}"
        assert not anchor or anchor in slugs(other), f"{named(page)} links to {target}"


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and page.name not in index] == []
    assert "docs/README.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("drawing", DRAWINGS, ids=named)
def test_drawings_are_whole_used_and_described(drawing):
    root = ElementTree.parse(drawing).getroot()
    assert root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
    assert not list(root.iter(f"{SVG}script")) and "http" not in drawing.read_text().replace(SVG[1:-1], "")
    # Text stands on a card of its own, so that it can be read on a dark page, too.
    width, height = map(float, root.get("viewBox").split()[2:])
    card = root.find(f"{SVG}rect")
    assert (float(card.get("width")), float(card.get("height"))) == (width, height) and card.get("fill")
    assert any(f"img/{drawing.name}" in page.read_text() for page in PAGES)


def test_every_environment_variable_is_explained():
    page = (DOCS / "environment.md").read_text()
    sources = "".join((ROOT / name).read_text() for name in ("fused_resnet/settings.py", "setup.py"))
    settings = set(re.findall(r"FUSED_RESNET_[A-Z_]+[A-Z]", sources)) | {
        f"FUSED_RESNET_{name}" for name in re.findall(r'wanted\("([A-Z_]+)"\)', sources)}
    assert settings - set(re.findall(r"`(FUSED_RESNET_[A-Z_]+)", page)) == set()


def test_every_field_of_a_row_is_explained():
    page = (DOCS / "benchmark-method.md").read_text()
    assert [name for name in FIELDS if f"`{name}`" not in page] == []


def test_the_guide_names_the_public_interface():
    guide = (DOCS / "guide.md").read_text()
    apart = {"__version__", "numerics", "testing", "tuner"}
    assert [name for name in fr.__all__ if name not in apart and f"fr.{name}" not in guide] == []
