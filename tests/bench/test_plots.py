"""Charts: what is drawn, and that a dark one is dark."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

from fused_resnet.bench import plots, results
from fused_resnet.bench.layers import Ceilings, Layer
from fused_resnet.bench.results import Row
from fused_resnet.problem import ConvProblem

CEILINGS = Ceilings(gflops=400.0, gbytes=20.0)
PROBLEMS = [ConvProblem("cpu", "fp32", 1, 56, 56, 64, 64, 1, 1), ConvProblem("cpu", "fp32", 1, 56, 56, 64, 64, 3, 3),
            ConvProblem("cpu", "fp32", 1, 224, 224, 3, 64, 7, 7), ConvProblem("cpu", "fp32", 1, 56, 56, 64, 64, 3, 3,
                                                                              groups=64)]


def row(provider="fused", speed=1.2, **fields):
    return Row(**{"level": "model", "model": "resnet50", "batch": 8, "dtype": "fp32", "device": "cpu",
                  "provider": provider, "ms_p20": 1.4, "ms_p50": 1.5, "ms_p80": 1.8, "vs_stock": speed,
                  "images_per_s": 5.0, **fields})


def layer(problem):
    floor, bound = CEILINGS.floor(problem.flops, problem.bytes)
    times = {"ms_p20": 1.2 * floor, "ms_p50": 1.5 * floor, "ms_p80": 1.8 * floor}
    return Layer(Row("layer", "net", 1, "fp32", "cpu", "fused", problem=problem.id, **times), 2, "cpu", floor, bound,
                 problem)


def bars(path, dark=False):
    rows = [row("eager", 1.0), row("eager", 1.0, graph=True), row(),
            row("openvino", None, status="failed", ms_p50=None)]
    return plots.speedups(results.Results({"cpu": "any", "threads": 2, "torch": "2"}, "abc", rows), path, dark=dark)


def roofline(path, dark=False):
    return plots.roofline([layer(problem) for problem in PROBLEMS], CEILINGS, path, "net fp32", dark=dark)


def colours(path):
    image = Image.open(path).convert("RGB")
    return {colour: n / image.width / image.height for n, colour in image.getcolors(image.width * image.height)}


def rgb(text):
    return tuple(int(text[i:i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("draw", [bars, roofline])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_chart_has_the_ground_and_the_ink_of_its_theme(draw, dark, tmp_path):
    found, theme = colours(draw(tmp_path / "a.png", dark)), plots.THEMES[dark]
    assert found[rgb(theme.ground)] > 0.5 and rgb(theme.ink) in found
    assert rgb(plots.COLOURS["fused"]) in found if draw is bars else len(found) > 100


def test_error_bars_span_the_percentiles_of_the_same_row():
    low, high = plots._span(row())
    assert low == pytest.approx(1.2 * 1.5 / 1.8) and high == pytest.approx(1.2 * 1.5 / 1.4)
    assert plots._span(row(ms_p20=None, ms_p80=None)) == (1.2, 1.2)


def test_rates_are_flops_over_time():
    one = layer(PROBLEMS[0])
    low, middle, high = plots._rates(one)
    assert low < middle < high and middle == pytest.approx(PROBLEMS[0].flops / one.row.ms_p50 / 1e6)


def test_nothing_is_drawn_of_nothing_and_bad_paths_are_named(tmp_path):
    assert plots.roofline([], CEILINGS, tmp_path / "a.png", "none") is None and not list(tmp_path.iterdir())
    for draw in (bars, roofline):
        with pytest.raises(ValueError, match="cannot write"):
            draw(tmp_path / "none" / "a.png")
