"""The page that a report writes: what it says, that it needs nothing beside it, and how a browser shows it."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("jinja2")

import fused_resnet as fr
from fused_resnet.fusing import Report, Row, Timings, page
from fused_resnet.fusing.axes import Scale
from tests.nets import randomize

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAME = "net <b>&\"bold\"</b>"
SECTIONS = ("summary", "operators", "skipped", "launches", "roofline", "network", "environment")
VOID = {"meta", "link", "br", "wbr"}
NARROW, WIDE = 400, 1400
CSS = (Path(page.__file__).parent / "templates" / "report.css").read_text()


class Mixed(nn.Module):
    """Launches of every kind of point, one convolution that stays stock, and a long name."""

    def __init__(self):
        super().__init__()
        
        def unit(c, k, size, **options):
            return nn.Sequential(nn.Conv2d(c, k, size, padding=size // 2, **options), nn.BatchNorm2d(k), nn.ReLU())

        self.body = nn.Sequential(unit(3, 16, 7, stride=2), unit(16, 32, 1), unit(32, 32, 3, groups=32),
                                  unit(32, 16, 3))
        self.a_rather_long_name_that_no_phone_can_show_in_one_line = unit(16, 16, 3)
        self.reflect = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        return self.reflect(self.a_rather_long_name_that_no_phone_can_show_in_one_line(self.body(x)))


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    fused = fr.fuse(randomize(Mixed()).eval())
    with torch.no_grad():
        for _ in range(2):
            fused(torch.randn(2, 3, 32, 32))
    return fr.report(fused)


@pytest.fixture(scope="module")
def timings(report):
    """Each launch at 40 % to 80 % of its roofline."""
    bare = Timings(gflops=100.0, gbytes=10.0)
    floors = {name: bare.floor(problem) for name, problem in report.problems.items()}
    times = {name: floor / (0.4 + 0.1 * i) for i, (name, floor) in enumerate(floors.items())}
    return Timings({name: (0.9 * t, t, 1.2 * t) for name, t in times.items()}, 100.0, 10.0)


class Reader(HTMLParser):
    """Tags that nest, text by section, what is referred to."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.section, self.text, self.ids, self.links = [], "", {}, set(), []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given["id"]} if "id" in given else set()
        self.links += [given[key] for key in ("href", "src", "xlink:href") if key in given]
        if tag == "section":
            self.section = given["id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text[self.section] = f"{self.text.get(self.section, '')} {data.strip()}"


def test_it_says_what_the_report_says(report):
    read = Reader(report.to_html(title=NAME))
    assert tuple(s for s in SECTIONS if s in read.ids) == SECTIONS
    assert NAME in read.text[""]
    assert "5 of 6" in " ".join(read.text["summary"].split()) and "1 skipped" in read.text["summary"]
    assert "padding_mode 'reflect'" in read.text["skipped"] and "reflect" in read.text["skipped"]
    for row in report:
        assert row.name in read.text["launches"].replace(". ", "."), row
    assert "7x7 stride 2, 3 → 16, 32x32" in read.text["launches"] and "depthwise" in read.text["launches"]
    assert "Mixed" in read.text["network"] and "cpu (heuristic)" in read.text["network"]
    assert torch.__version__ in read.text["environment"]


def test_computed_figures_are_not_called_measured(report, timings):
    text = {name: Reader(page).text for name, page in
            {"computed": report.to_html(), "timed": report.to_html(timings=timings)}.items()}
    assert "Computed from the shapes, not measured" in text["computed"]["launches"]
    assert "Neither times nor ceilings were measured" in text["computed"]["roofline"]
    assert "Measured: the bar is the median" in text["timed"]["launches"]
    assert "GFLOP/s, measured" in text["timed"]["roofline"] and "Furthest above the floor" in text["timed"]["roofline"]
    assert "not measured" not in text["timed"]["launches"]


def test_operators_are_those_of_the_profiler_or_of_the_patterns(report):
    assert "16 to 6" in " ".join(Reader(report.to_html()).text["summary"].split())
    counted = {"stock": {"conv": 6, "norm": 5, "activation": 5}, "fused": {"conv": 6, "other": 2}}
    read = Reader(report.to_html(launches=counted))
    assert "16 to 8" in " ".join(read.text["summary"].split()) and "counted by the profiler" in read.text["summary"]
    assert "other: 0 to 2" in read.text["operators"]


def test_nothing_is_loaded_and_names_are_escaped(report, timings):
    text = report.to_html(timings=timings, title=NAME)
    read = Reader(text)
    assert all(link.startswith("#") or link == "data:," for link in read.links)
    assert {link[1:] for link in read.links if link.startswith("#")} <= read.ids
    assert not re.search(r"https?://|@import|url\(|<b>", text)
    strange = Report((Row("a<i>", "conv", "fused", "cpu", ""), Row("b", "", "skipped", "", "<script>no</script>")),
                     ("<note>",), {"": "<C>"})
    assert not re.search("<i>|<script>no|<note>|<C>", strange.to_html(environment={"<e>": "<v>"}))


@pytest.mark.parametrize("model", [nn.Flatten(), nn.Conv2d(3, 4, 3), Mixed()], ids=lambda m: type(m).__name__)
def test_models_without_launches_have_a_page_too(model, tmp_path):
    file = tmp_path / "page.html"
    text = fr.report(fr.fuse(model.eval())).to_html(file)
    assert Reader(text).text["roofline"] and file.read_text(encoding="utf-8") == text
    with pytest.raises(ValueError, match=r"cannot write .*none"):
        fr.report(fr.fuse(model)).to_html(tmp_path / "none" / "page.html")


@pytest.mark.parametrize("wrong", [{"gflops": 0.0}, {"gbytes": -1.0}, {"ms": {"a": (2.0, 1.0, 3.0)}},
                                   {"ms": {"a": (1.0, 2.0)}}])
def test_timings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected rising|must be positive"):
        Timings(**wrong)


def test_axes_are_logarithmic_and_their_ticks_lie_on_them():
    scale = Scale.of([2.0, 200.0], 0.0, 100.0)
    assert scale(20.0) == pytest.approx(50.0, abs=0.1) and scale(2.0) < scale(200.0)
    for values in ([1.0], [1.0, 5.0], [0.01, 1e4]):
        ticks = Scale.of(values, 0.0, 100.0).ticks()
        assert ticks and all(0.0 <= at <= 100.0 for at, _, _ in ticks)


def _themes():
    blocks = re.findall(r"\{([^{}]*--bg:[^{}]*)\}", CSS)
    found = [dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", block)) for block in blocks]
    assert len(found) == 3 and found[1] == found[2], "light, dark by preference, dark by the button"
    return found[:2]


def _contrast(a, b):
    def luminance(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", _themes(), ids=["light", "dark"])
def test_contrast_is_that_of_wcag_aa(theme):
    for ink, grounds in {"ink": ("bg", "card", "accent-soft"), "muted": ("bg", "card"), "ok": ("card",),
                         "accent": ("bg", "card", "accent-soft"), "warn": ("card", "warn-soft")}.items():
        for ground in grounds:
            assert _contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
    for shape in ("one", "three", "other", "grouped", "conv", "norm", "activation", "add", "pool", "linear", "rest"):
        assert _contrast(theme[shape], theme["card"]) >= 3.0, shape


def chromium(tmp_path, *arguments):
    """Runs the browser on `arguments`; (stdout, lines of the page's console)."""
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                           "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", *map(str, arguments)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def _framed(pages, file):
    """A page of frames, one for each page and width, that writes down what each of them shows."""
    frames = "".join(f'<iframe width="{width}" height="2000" data-page="{name}" srcdoc="{html.escape(text)}"></iframe>'
                     for name, text in pages.items() for width in (NARROW, WIDE))
    file.write_text(f"""<!DOCTYPE html><body>{frames}<ol></ol><script>
    onload = () => document.querySelectorAll("iframe").forEach(frame => {{
      const page = frame.contentDocument, root = page.documentElement, button = page.getElementById("theme");
      const ground = () => frame.contentWindow.getComputedStyle(page.body).backgroundColor, before = ground();
      button.click();
      const after = ground(), name = button.textContent;
      button.click();
      page.querySelector("[data-open=all]").click();
      const shut = page.querySelectorAll(".tree details:not([open])").length;
      const blind = [...page.querySelectorAll("button, a, svg[role=img]")].filter(
        e => !(e.textContent.trim() || e.getAttribute("aria-label"))).length;
      const item = document.createElement("li");
      item.textContent = ["RESULT", frame.dataset.page, frame.width, root.scrollWidth, root.clientWidth, before, after,
        name, shut, blind, [...page.querySelectorAll("section")].map(s => s.id).join(" ")].join("|");
      document.querySelector("ol").append(item);
    }});</script></body>""")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_shows_it_without_errors_at_every_width(report, timings, tmp_path):
    pages = {"timed": report.to_html(timings=timings, title=NAME), "computed": report.to_html(title=NAME),
             "empty": fr.report(fr.fuse(nn.Flatten().eval())).to_html()}
    _framed(pages, tmp_path / "frames.html")
    dom, console = chromium(tmp_path, "--dump-dom", f"file://{tmp_path / 'frames.html'}")
    assert console == []
    found = [line.split("|") for line in re.findall(r"<li>(RESULT\|.*?)</li>", dom)]
    assert [(name, int(width)) for _, name, width, *_ in found] == [(n, w) for n in pages for w in (NARROW, WIDE)]
    for _, name, width, content, window, before, after, button, shut, blind, sections in found:
        assert int(content) <= int(window), f"{name} is {content} wide in a window of {width}"
        assert before != after and button == "Light colours", "the button changes the colours"
        assert (shut, blind) == ("0", "0")
        assert sections.split() == [s for s in SECTIONS if s != "operators" or name != "empty"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_dark_and_light_follow_the_readers_preference(report, timings, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    report.to_html(tmp_path / "page.html", timings)
    means = []
    for scheme in (0, 1):  # dark, light
        shot = tmp_path / f"{scheme}.png"
        _, console = chromium(tmp_path, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}",
                              f"--window-size={WIDE},1000", f"file://{tmp_path / 'page.html'}")
        assert console == []
        image = Image.open(shot).convert("L")
        assert image.width == WIDE
        histogram = image.histogram()
        means.append(sum(i * n for i, n in enumerate(histogram)) / sum(histogram))
        assert sum(n > 0 for n in histogram) > 30, "an empty page"
    assert means[0] < 60 and means[1] > 200
