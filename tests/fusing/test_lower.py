"""lower(): exported programs on raw operators compute what stock computes, and say what they run."""

import copy
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export
from torch.utils._pytree import tree_leaves

import fused_resnet as fr
from fused_resnet import native, numerics
from tests.csrc.conftest import library, setup_script  # noqa: F401
from tests.fusing.helpers import same_strides
from tests.nets import randomize

pytestmark = pytest.mark.usefixtures("library")
X = torch.randn(3, 8, 10, 10, generator=torch.Generator().manual_seed(3))
BATCH = Dim("batch", min=1, max=64)


class Layers(nn.Module):
    """Two convolutions with norms, and what a test does with them."""

    def __init__(self, body, conv=None, **options):
        super().__init__()
        self.conv1 = conv or nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1, self.conv2, self.bn2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.body, self.options = body, options

    def forward(self, x):
        return self.body(self, x)


def exported(model, x, dynamic=True):
    shapes = ({0: BATCH},) if dynamic else None
    return export(randomize(model).eval().to(x.dtype), (x,), dynamic_shapes=shapes)


def same(model, lowered, x):
    """Stock and lowered beside float64, at every output: values, strides, dtypes, where NaN and Inf stand."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        stock, result, exact = model(x), lowered.module()(x), exact(x.double())
    same_strides(result, stock)
    for a, b, c in zip(tree_leaves(result), tree_leaves(stock), tree_leaves(exact), strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
        assert (bound := numerics.check_network(a, b, c, dtype=numerics.NAMES[x.dtype])).ok, str(bound)


def lowered(model, x=X, dynamic=True):
    """The lowered program, and the patterns of its launches; at two sizes of the batch it computes what stock does."""
    program = exported(model, x, dynamic)
    result = fr.lower(program)
    for images in (x, torch.cat((x, x))[:-1])[:1 + dynamic]:
        same(model, result, images)
    assert list(result.state_dict) == list(program.state_dict)
    assert result.graph_signature.input_specs == program.graph_signature.input_specs
    return result, [row.pattern for row in fr.report(result)]


def block(m, x):
    out = F.relu(m.bn1(m.conv1(x)))
    return F.relu(m.bn2(m.conv2(out)) + x)


def in_place(m, x):
    out = F.relu(m.bn1(m.conv1(x)), inplace=True)
    identity = out
    out = m.bn2(m.conv2(out))
    out += identity
    return F.relu_(out)


def onto_the_shortcut(m, x):
    identity = x * 2
    identity += m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x)))))
    return F.silu(identity)


def shared(m, x):
    inner = m.bn1(m.conv1(x))
    return F.relu(inner), inner


def to_vector(m, x):
    return F.relu(m.bn1(m.conv1(x))).flatten(1), F.relu(m.bn2(m.conv2(x))).view(x.shape[0], -1)


def twice(m, x):
    out = m.bn1(m.conv1(x))
    return out + out


def pre_activation(m, x):
    out = m.conv1(F.relu(m.bn1(x)))
    return m.conv2(F.relu(m.bn2(out))) + x


def head(m, x):
    return m.head(F.hardswish(m.bn1(m.conv1(x))).mean((2, 3)))


def scaled(m, x):
    out = m.bn1(m.conv1(x))
    return F.relu(torch.add(out, x, alpha=2))


def pooled(m, x):
    return F.max_pool2d(F.relu(m.bn1(m.conv1(x))), 3, 2, 1), F.max_pool2d(F.relu(m.bn2(m.conv2(x))), 2)


@pytest.mark.parametrize(("body", "patterns"), [
    (block, ["conv+norm+act", "conv+norm+add+act"]),
    (in_place, ["conv+norm+act", "conv+norm+add+act"]),
    (onto_the_shortcut, ["conv+norm+act", "conv+norm+add+act"]),
    (shared, ["conv+norm"]),
    (to_vector, ["conv+norm+act"] * 2),
    (twice, ["conv+norm"]),
    (pre_activation, ["norm+act+conv+norm+act", "conv+add"]),
    (head, ["conv+norm+act"]),
    (scaled, ["conv+norm"]),
    (pooled, ["conv+norm+act+maxpool", "conv+norm+act"]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_chains(body, patterns):
    assert lowered(Layers(body))[1] == patterns


@pytest.mark.parametrize("conv", [
    nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8, padding=1),
    nn.Conv2d(8, 8, (3, 1), (2, 1), (2, 0), (2, 1)), nn.Conv2d(8, 8, 3, padding="same", dilation=2),
    nn.Conv2d(8, 8, 3, padding="valid"),
    nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")], ids=["groups", "depthwise", "dilation", "same", "valid",
                                                                 "reflect"])
def test_convolutions_of_every_kind(conv):
    assert lowered(Layers(lambda m, x: F.relu6(m.bn1(m.conv1(x))), conv))[1] == ["conv+norm+act"]


def test_what_no_raw_operator_computes_stays():
    uneven = nn.Conv2d(8, 8, 2, padding="same")
    result, patterns = lowered(Layers(lambda m, x: F.relu(m.bn1(m.conv1(x))), uneven))
    assert patterns == [""] and fr.report(result).skipped() == {
        "no raw operator computes it with what stands around it": ["conv1"]}
    assert lowered(Layers(lambda m, x: m.conv1(x)))[1] == [""]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    lowered(Layers(block), X.to(dtype), dynamic=False)


def test_outputs_have_the_strides_of_the_export():
    """Stock gives NCHW for NCHW and channels_last for channels_last, the raw operators always channels_last."""
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        lowered(Layers(lambda m, x: (block(m, x), m.conv1(x).permute(0, 2, 3, 1), F.relu(m.bn2(m.conv2(x))).mT)), x)


def test_symbolic_sizes_stay_symbolic():
    model = randomize(Layers(block)).eval()
    program = fr.lower(export(model, (X,), dynamic_shapes=({0: BATCH, 2: Dim("h", min=4), 3: Dim("w", min=4)},)))
    for shape in ((1, 8, 5, 9), (4, 8, 12, 7)):
        same(model, program, torch.randn(shape))


def test_nan_and_inf_pass():
    x = X.clone()
    x[0, 1, 2, 3], x[2, 3, 0, 0] = float("nan"), float("inf")
    model = Layers(block)
    program = fr.lower(exported(model, X))
    same(model, program, x)
    with torch.no_grad():
        model.conv1.weight[2, 3, 1, 1] = float("nan")
    same(model, program, X)  # the program holds the model's own parameters


def test_public_operators_become_raw_ones():
    def body(m, x):
        n = m.bn1
        out = fr.functional.conv_bn_act(x, m.conv1.weight, n.weight, n.bias, n.running_mean, n.running_var,
                                        padding=1, residual=x, activation="silu",
                                        prologue=(None, None, m.bn2.running_mean, m.bn2.running_var, 1e-3, "relu"))
        return fr.functional.stem(out, m.conv1.weight, None, None, n.running_mean, n.running_var, padding=1)

    result, patterns = lowered(Layers(body))
    assert patterns == ["norm+act+conv+norm+add+act", "conv+norm+act+maxpool"]
    assert not any(node.target in (torch.ops.fused_resnet.conv_bn_act.default, torch.ops.fused_resnet.stem.default)
                   for node in result.graph.nodes)


def test_a_fused_model_lowers_as_its_stock_model(caplog):
    model = randomize(fr.models.cifar_resnet(8)).eval()
    x = torch.randn(2, 3, 16, 16)
    fused = fr.fuse(model)
    with caplog.at_level(logging.INFO, "fused_resnet"):
        program = fr.lower(export(fused, (x,)))
    assert "9 of 9 convolutions fused" in caplog.text
    same(model, program, x)
    names = [row.name for row in fr.report(program)]
    assert names[0] == "conv1" and "layer1.0.conv2" in names


def test_lowering_twice_changes_nothing():
    once, _ = lowered(Layers(block))
    again = fr.lower(once)
    assert [node.target for node in again.graph.nodes] == [node.target for node in once.graph.nodes]
    assert again.graph_signature.input_specs == once.graph_signature.input_specs


def test_the_given_program_is_left_alone():
    program = exported(Layers(in_place), X)
    before = str(program.graph)
    fr.lower(program)
    assert str(program.graph) == before and fr.report(program).fused == 0


def test_a_lowered_program_is_saved_and_loaded():
    model = Layers(block)
    program, file = fr.lower(exported(model, X)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    same(model, loaded, torch.randn(5, 8, 10, 10))
    assert fr.report(loaded).fused == 2


def test_training_is_refused():
    with pytest.raises(ValueError, match=r"statistics of its batch; export model\.eval\(\)"):
        fr.lower(export(Layers(block).train(), (X,)))


def test_a_norm_without_running_statistics_stays():
    model = Layers(block)
    model.bn1 = nn.BatchNorm2d(8, track_running_stats=False)
    program = fr.lower(export(randomize(model).eval(), (X,)))
    assert [row.pattern for row in fr.report(program)] == ["", "conv+norm+add+act"]
    same(model, program, X)


def test_wrong_calls_say_what_is_wrong(monkeypatch):
    with pytest.raises(TypeError, match=r"torch\.export\.export returns, not Layers"):
        fr.lower(Layers(block))
    with pytest.raises(ValueError, match="or an exported program"):
        fr.report(3)
    program = exported(Layers(block), X)
    monkeypatch.setattr(native, "missing", lambda part: "it was not built")
    with pytest.raises(RuntimeError, match="lower\\(\\) needs the native library's CPU part: it was not built"):
        fr.lower(program)


# Model -> launches of raw operators.
ZOO = {"resnet50": 53, "resnext50_32x4d": 53, "mobilenet_v2": 52, "timm:resnet26t": 31,
       "timm:seresnet50": 69}


@pytest.mark.gate
@pytest.mark.parametrize("name", ZOO)
def test_model_zoo(name):
    zoo, _, short = name.rpartition(":")
    module = pytest.importorskip(zoo or "torchvision")
    model = module.create_model(short) if zoo else getattr(module.models, short)(weights=None)
    _, patterns = lowered(model, torch.randn(2, 3, 64, 64))
    assert sum(map(bool, patterns)) == ZOO[name]


def test_resnet18_is_lowered_whole():
    torchvision = pytest.importorskip("torchvision")
    _, patterns = lowered(torchvision.models.resnet18(weights=None), torch.randn(2, 3, 32, 32))
    assert patterns[0] == "conv+norm+act+maxpool" and len(patterns) == 20 and all(patterns)
    assert patterns.count("conv+norm+add+act") == 8
