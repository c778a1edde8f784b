"""What fuse() says about what it did."""

import io
import json
import sys

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.fusing import Report, Row, plans
from tests import seeds
from tests.fusing.helpers import equal
from tests.nets import randomize


class Stem(nn.Module):
    """One convolution of every kind that stays stock."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.pooled, self.pool = nn.Conv2d(8, 8, 1), nn.MaxPool2d(2)
        self.twice = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.pool(self.pooled(self.reflect(self.same(self.fine(x)))))
        x = self.twice(x)
        return self.last(x.tanh() * x)


REASONS = {"same": "'same'", "reflect": "padding_mode 'reflect'", "pooled": "MaxPool2d follows",
           "twice": "more than once", "last": "nothing follows", "unused": "no plan covers it"}


@torch.no_grad()
def test_every_convolution_has_a_row_and_a_reason():
    stock = randomize(Stem()).eval()
    fused = fr.fuse(stock)
    rows = {row.name: row for row in fr.report(fused)}
    assert list(rows) == [name for name, m in stock.named_modules() if isinstance(m, nn.Conv2d)]
    assert rows.pop("fine.0") == Row("fine.0", "conv+norm+act", "fused", "", "")
    for name, row in rows.items():
        assert (row.status, row.pattern, row.backend) == ("skipped", "", "") and REASONS[name] in row.reason, row
    fused(torch.randn(1, 3, 12, 12))
    assert next(iter(fr.report(fused))).backend in fr.backends.NAMES


@torch.no_grad()
def test_prints_as_a_table_and_as_json():
    fused = fr.fuse(randomize(Stem()).eval())
    report = fr.report(fused)
    lines = str(report).splitlines()
    assert len(lines) == len(report) + 3 and lines[0].split() == ["name", "pattern", "status", "backend", "reason"]
    assert lines[-1] == "1 of 7 convolutions fused" and report.fused == 1 and not report and repr(report) == str(report)
    document = json.loads(report.to_json())
    assert [Row(**row) for row in document["rows"]] == list(report) and document["notes"] == []
    assert fr.report(fr.fuse(seeds.ShortcutBlock(8, 8).eval()))
    assert str(Report(())).endswith("0 of 0 convolutions fused")


@torch.no_grad()
def test_after_a_call_rows_know_their_problem_and_the_rule_that_chose():
    fused = fr.fuse(randomize(Stem()).eval())
    fused(torch.randn(2, 3, 12, 12))
    report = fr.report(fused)
    row, problem = report.rows[0], next(iter(report.problems.values()))
    assert (row.label, row.problem, row.flops, row.bytes) == ("heuristic", problem.id, problem.flops, problem.bytes)
    assert problem.N == 2 and row.ran_on == "cpu (heuristic)" and len(report.problems) == 1
    with fr.backends.use("reference"):
        fused(torch.randn(2, 3, 12, 12))
        assert fr.report(fused).rows[0].ran_on == "reference (forced)"
    assert fr.report(fused).rows[0].ran_on == "reference", "other rules hold now than when it ran"


def test_the_tree_holds_every_row_once_and_skips_are_grouped():
    stock = Stem().eval()
    report = fr.report(fr.fuse(stock))
    tree = report.tree()
    assert list(tree.rows()) == list(report.rows) and tree.kind == "Stem"
    assert [(node.name, node.kind, len(node.children)) for node in tree.children[:2]] == [
        ("fine", "Sequential", 1), ("same", "Conv2d", 0)]
    assert sorted(name for names in report.skipped().values() for name in names) == sorted(REASONS)
    alone = fr.report(fr.fuse(nn.Conv2d(3, 4, 3))).tree()
    assert alone.row is not None and alone.row.name == ""


def test_the_table_is_plain_without_rich_and_where_the_terminal_knows_no_boxes(monkeypatch, capsys):
    report = fr.report(fr.fuse(Stem().eval()))
    boxed = str(report)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert "\u2500" in boxed and str(report).isascii()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    plain = str(report)
    assert plain.isascii() and [line.split() for line in plain.splitlines()] == [
        line.split() for line in boxed.splitlines() if "\u2500" not in line]
    report.show()
    assert capsys.readouterr().out == plain + "\n"


def test_show_prints_through_rich(monkeypatch, capsys):
    pytest.importorskip("rich")
    report = fr.report(fr.fuse(Stem().eval()))
    report.show()
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and all(row.name in shown for row in report) and report.counted in shown
    monkeypatch.setenv("FORCE_COLOR", "1")
    report.show()
    assert "\x1b[" in capsys.readouterr().out


def test_patterns_name_what_is_in_the_launch():
    names = {row.name: row.pattern for row in fr.report(fr.fuse(seeds.LateNormBlock(8, 16, 2).eval()))}
    assert names == {"conv1": "conv+norm+act", "conv2": "norm+conv+add+act", "shortcut.0": "conv+norm"}


def test_calls_that_ran_stock_are_counted():
    fused = fr.fuse(randomize(seeds.ShortcutBlock(8, 8)).eval())
    x = torch.randn(1, 8, 5, 5)
    handle = fused.conv1.register_forward_hook(lambda *_: None)
    for _ in range(3):
        fused(x)
    handle.remove()
    assert fr.report(fused).notes == ("the model ran stock 3 times: a hook is registered inside",)
    assert fr.report(fused).notes[0] in str(fr.report(fused))
    for i in range(50):
        with torch.no_grad():
            fused(x[:0] if i % 2 else x * float("nan"))
    assert sum(len(plan.fallbacks) for plan in plans(fused).values()) <= 4, "reasons do not pile up"


def test_only_fused_models_have_a_report():
    with pytest.raises(ValueError, match=r"fuse\(\) returned"):
        fr.report(nn.ReLU())


@torch.no_grad()
def test_a_plan_that_disagrees_is_dropped_with_one_warning(monkeypatch):
    stock = randomize(seeds.ShortcutBlock(8, 8)).eval()
    fused, x = fr.fuse(stock), torch.randn(2, 8, 6, 6)
    launch = fr.nn.executor.launch
    monkeypatch.setattr(fr.nn.executor, "launch", lambda *args: launch(*args).add_(1))
    with pytest.warns(UserWarning, match="ShortcutBlock stock: the plan disagreed") as seen:
        for _ in range(3):
            equal(stock, fused, x)
    assert len(seen) == 1
    assert [row.status for row in fr.report(fused)] == ["skipped"] * 2 and "disagreed" in fr.report(fused).notes[-1]


@torch.no_grad()
def test_a_plan_that_fails_is_dropped_with_stocks_answer(monkeypatch):
    stock = randomize(seeds.ShortcutBlock(8, 8)).eval()
    fused, x = fr.fuse(stock), torch.randn(2, 8, 6, 6)

    def fail(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fr.nn.executor, "launch", fail)
    with pytest.warns(UserWarning, match="raised RuntimeError: no such kernel"):
        equal(stock, fused, x)
    equal(stock, fused, x)


@torch.no_grad()
def test_a_forced_backend_that_cannot_run_raises():
    fused = fr.fuse(randomize(seeds.ShortcutBlock(8, 8)).eval())
    with fr.backends.use("cudnn"), pytest.raises(ValueError, match="cudnn"):
        fused(torch.randn(1, 8, 6, 6))
    assert fr.report(fused)
