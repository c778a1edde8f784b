"""When a plan must step aside, and that stock's answer, effects and errors come out then."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet as fr
from fused_resnet.fusing import plans
from fused_resnet.nn import executor
from tests.fusing.helpers import agree, counts, equal, same_strides, twice
from tests.nets import randomize

X = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A block with everything that a guard may watch."""

    def __init__(self, channels=8, project=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu, self.drop, self.tail = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Identity()
        self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if project else None
        self.scale = 1.0
        self.use_drop = True

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        out = self.relu(out) * self.scale
        return self.tail(self.drop(out) if self.use_drop else out)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1, self.layer2 = Block(), nn.Sequential(Block(project=True), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def stock():
    return randomize(Net()).eval().requires_grad_(False)


@pytest.fixture
def fused(stock):
    model = fr.fuse(stock)
    model(X)
    return model


def aside(fused):
    """The reasons for which the outermost plan stepped aside."""
    return list(plans(fused)[""].fallbacks)


def both(stock, fused, change):
    """Applies one change to both models."""
    torch.manual_seed(5)
    change(stock)
    torch.manual_seed(5)
    change(fused)


def test_training_runs_stock_bit_for_bit():
    stock = randomize(Net()).train()
    fused = fr.fuse(stock).train()
    losses = []
    with pytest.warns(UserWarning, match="gradients are needed") as seen:
        for model in (stock, fused):
            x = X.clone().requires_grad_()
            torch.manual_seed(0)
            loss = model(x).square().sum()
            loss.backward()
            losses.append((loss, x.grad))
        fused(X)
    assert len(seen) == 1
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])
    stock(X)
    for (name, a), b in zip(stock.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(stock.named_buffers(), fused.buffers(), strict=True):
        assert name.endswith("tracked") or a.shape == b.shape
    assert any("gradients" in note for note in fr.report(fused).notes)


def test_train_mode_without_gradients_runs_stock(stock, fused):
    with pytest.warns(UserWarning, match="training mode"):
        both(stock, fused, lambda m: m.train()(X))
    for a, b in zip(stock.buffers(), fused.buffers(), strict=True):
        assert torch.equal(a, b)
    twice(stock.eval(), fused.eval(), X)


@pytest.mark.parametrize("tracked", [True, False])
def test_statistics_that_training_wrote_are_used(stock, fused, tracked):
    """batch_norm writes the running statistics without a new version of the tensors."""
    for steps in range(3):
        for model in (stock, fused):
            for bn in (model.stem[1], model.layer1.bn1):
                bn.train()
                bn(X * (steps + 2)) if tracked else model.layer1(X * (steps + 2))
            model.eval()
        twice(stock, fused, X)


def test_a_fused_call_between_forward_and_backward():
    stock = randomize(Net()).eval()
    fused = fr.fuse(stock)
    for _ in range(2):
        loss = fused(X).sum()
        with torch.no_grad():
            fused(X)
        loss.backward()
        fused.train()(X)
        fused.eval()


@pytest.mark.parametrize("part", ["layer1.bn1", "layer1.drop", "layer1", "stem.1", "head"])
def test_a_part_in_training_mode_trains(stock, fused, part):
    both(stock, fused, lambda m: m.get_submodule(part).train())
    outputs = []
    for model in (stock, fused):
        torch.manual_seed(0)
        outputs.append(model(X))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for a, b in zip(stock.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert aside(fused) == [executor.TRAINING]


@pytest.mark.parametrize("who", ["x", "weight", "bias", "gamma", "head"])
def test_gradients_run_stock(stock, fused, who):
    names = {"weight": "layer1.conv1.weight", "bias": "layer1.conv2.bias", "gamma": "stem.1.weight", "head": "head.bias"}
    grads = []
    for model in (stock, fused):
        x = X.clone()
        leaf = x if who == "x" else model.get_parameter(names[who])
        leaf.requires_grad_()
        model(x).sum().backward()
        grads.append(leaf.grad)
        leaf.requires_grad_(False)
    assert torch.equal(*grads) or who != "x"  # in front of the parameter nothing needs gradients: that part may fuse
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    assert aside(fused) == [executor.GRAD]
    with torch.no_grad():
        agree(stock, fused, X.clone().requires_grad_())
    assert len(aside(fused)) == 1


def test_frozen_parameters_fuse_with_gradients_enabled(stock, fused):
    assert torch.is_grad_enabled() and not aside(fused)
    agree(stock, fused, X)
    assert not aside(fused)


PLACES = ["", "stem", "stem.0", "layer1", "layer1.relu", "layer1.bn2", "layer1.tail", "layer1.drop", "layer2",
          "layer2.0.downsample", "layer2.0.downsample.1", "head"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_forward_hooks_see_what_stock_shows_them(stock, fused, place, memory_format):
    x = X.contiguous(memory_format=memory_format)
    seen = []
    for model in (stock, fused):
        log = []
        module = model.get_submodule(place)
        handles = [module.register_forward_pre_hook(lambda m, a, log=log: log.append(a[0].clone())),
                   module.register_forward_hook(lambda m, a, out, log=log: log.append(out.clone()))]
        model(x)
        seen.append(log)
        for handle in handles:
            handle.remove()
    assert len(seen[0]) == len(seen[1]) > 0
    for a, b in zip(*seen):
        same_strides(b, a)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    before = sum(plans(fused)[""].fallbacks.values())
    fused(x)
    assert sum(plans(fused)[""].fallbacks.values()) == before, "without hooks the plan answers again"


def test_hooks_may_change_the_result_and_the_input(stock, fused):
    def change(model):
        model.layer1.bn1.register_forward_hook(lambda m, a, out: out * 2)
        model.layer2[1].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
        model.stem.register_forward_hook(lambda m, a, kw, out: out + 1, with_kwargs=True)

    both(stock, fused, change)
    agree(stock, fused, X)


def test_global_hooks_see_every_module(stock, fused):
    logs = [], []
    for model, log in zip((stock, fused), logs):
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, out, log=log: log.append(type(m).__name__))
        model(X)
        handle.remove()
    assert logs[0] == logs[1] and "BatchNorm2d" in logs[0]


def test_backward_hooks_fire(stock, fused):
    logs = [], []
    for model, log in zip((stock, fused), logs):
        model.layer1.bn2.register_full_backward_hook(lambda m, i, o, log=log: log.append(o[0].shape))
        model(X.clone().requires_grad_()).sum().backward()
    assert logs[0] == logs[1] != []


def replaced(name, make):
    def change(model):
        *path, last = name.split(".")
        setattr(model.get_submodule(".".join(path)), last, randomize(make()).eval().requires_grad_(False))
    return change


def weight_norm(model):
    torch.nn.utils.parametrizations.weight_norm(model.layer1.conv1)
    model.requires_grad_(False)


def old_weight_norm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model.layer1.conv1)
    model.requires_grad_(False)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def new_forward(model):
    relu = model.layer1.bn1
    relu.forward = lambda x, relu=relu: type(relu).forward(relu, x) + 1


CHANGES = {
    "conv": replaced("layer1.conv1", lambda: nn.Conv2d(8, 8, 5, padding=2)),
    "activation": replaced("layer1.relu", nn.GELU), "identity": replaced("layer1.tail", nn.Tanh),
    "dropout": replaced("layer1.drop", nn.Sigmoid), "norm": replaced("stem.1", lambda: nn.GroupNorm(2, 8)),
    "block": replaced("layer2.1", lambda: Block(project=True)),
    "none_to_module": replaced("layer1.downsample", lambda: nn.Conv2d(8, 8, 1)),
    "module_to_none": lambda m: setattr(m.layer2[0], "downsample", None),
    "appended": lambda m: m.layer2.append(nn.Sigmoid()), "scalar": lambda m: setattr(m.layer1, "scale", 3.0),
    "flag": lambda m: setattr(m.layer1, "use_drop", False), "forward": new_forward,
    "class": lambda m: setattr(m.layer1.relu, "__class__", nn.Sigmoid),
    "sync_batch_norm": lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m).eval(),
    "parametrize": lambda m: parametrize.register_parametrization(m.layer1.conv1, "weight", Halved()),
    "parametrize_norm": lambda m: parametrize.register_parametrization(m.layer1.bn1, "weight", Halved()),
    "weight_norm": weight_norm, "old_weight_norm": old_weight_norm,
    "prune": lambda m: prune.random_unstructured(m.layer1.conv1, "weight", 0.5) and m.requires_grad_(False),
    "no_statistics": lambda m: (setattr(m.stem[1], "running_mean", None), setattr(m.stem[1], "running_var", None)),
    "stride_as_int": lambda m: setattr(m.stem[0], "stride", 2), "eps": lambda m: setattr(m.layer1.bn1, "eps", 0.1),
    "no_bias": lambda m: setattr(m.stem[0], "bias", None), "no_affine": lambda m: setattr(m.layer1.bn1, "weight", None),
    "padding_mode": lambda m: setattr(m.layer2, "0", fr.unfuse(m.layer2[0])),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before_first_call", "after", "then_copied"])
def test_modules_changed_after_fuse_are_obeyed(stock, change, when):
    fused = fr.fuse(stock)
    if when != "before_first_call":
        fused(X)
    both(stock, fused, CHANGES[change])
    stock.requires_grad_(False), fused.requires_grad_(False)
    if when == "then_copied" and change not in ("forward", "old_weight_norm", "prune"):
        fused = copy.deepcopy(fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            agree(stock, fused, X)


UPDATES = {
    "copy_": lambda m: m.stem[0].weight.copy_(torch.ones(8, 8, 1, 1)), "add_": lambda m: m.layer1.bn1.bias.add_(1),
    "running_mean": lambda m: m.layer1.bn2.running_mean.sub_(1), "running_var": lambda m: m.stem[1].running_var.mul_(3),
    "data": lambda m: setattr(m.layer1.conv1.weight, "data", torch.ones(8, 8, 3, 3)),
    "assigned": lambda m: setattr(m.layer1.conv1, "weight", nn.Parameter(torch.ones(8, 8, 3, 3), False)),
    "loaded": lambda m: m.load_state_dict(randomize(Net(), 3).state_dict()),
    "assign": lambda m: m.load_state_dict(randomize(Net(), 3).state_dict(), assign=True) and m.requires_grad_(False),
    "double": lambda m: m.double(), "bfloat16": lambda m: m.bfloat16(), "half": lambda m: m.half(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "one_channels_last": lambda m: m.layer2.to(memory_format=torch.channels_last),
    "nan_weight": lambda m: m.stem[0].weight[3].fill_(float("nan")),
    "inf_weight": lambda m: m.layer1.conv2.weight[0, 0].fill_(float("inf")),
    "nan_statistic": lambda m: m.layer1.bn1.running_mean[2].fill_(float("nan")),
    "negative_variance": lambda m: m.layer1.bn2.running_var[1].fill_(-1),
    "nan_residual": lambda m: m.layer2[0].downsample[1].weight[1].fill_(float("nan")),
}


@pytest.mark.parametrize("update", UPDATES)
@torch.no_grad()
def test_weights_are_read_live(stock, fused, update):
    both(stock, fused, UPDATES[update])
    x = X.to(stock.stem[0].weight.dtype)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        twice(stock, fused, given)
    a, b = stock.layer2(stock.layer1(stock.stem(x))), fused.layer2(fused.layer1(fused.stem(x)))
    same_strides(b, a)


def test_writes_that_nobody_sees_show_after_refresh(stock, fused):
    for model in (stock, fused):
        model.layer1.conv1.weight.detach().numpy()[:] *= 2
        model.stem[1].weight.data.copy_(torch.ones(8))
    assert fr.refresh(fused) > 0
    twice(stock, fused, X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_autocast_gives_stocks_dtypes(dtype, frozen):
    from torchvision.ops.misc import FrozenBatchNorm2d

    class Promotes(Block):
        def forward(self, x):
            out = F.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            return out, F.relu(out + x), x

    for net in (Promotes(), Block(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), Block())):
        stock = randomize(net).eval()
        if frozen:
            for block in stock.modules():
                if isinstance(block, Block):
                    block.bn1 = randomize(FrozenBatchNorm2d(8))
        fused = fr.fuse(stock)
        agree(stock, fused, X)
        with torch.autocast("cpu", dtype=dtype):
            for x in (X, X.to(dtype)):
                expected, result = stock(x), fused(x)
                same_strides(result, expected)
                same_strides(fused(x), expected)
        agree(stock, fused, X)
        assert counts(fused)[0] > 0


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.ops.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Counter, Functions])
def test_modes_see_stocks_operators(stock, fused, mode):
    with mode() as first:
        stock(X)
    with mode() as second:
        fused(X)
    names = "conv", "batch_norm", "relu"
    wanted = [op for op in first.ops if any(n in op for n in names)]
    assert wanted == [op for op in second.ops if any(n in op for n in names)] != []


def test_a_default_device_does_not_stop_fusion(fused):
    with torch.device("cpu"):
        fused(X)
    assert not aside(fused)


def test_flops_are_counted(stock, fused):
    with FlopCounterMode(display=False) as first:
        stock(X)
    with FlopCounterMode(display=False) as second:
        fused(X)
    assert first.get_total_flops() == second.get_total_flops() > 0


def test_functorch_transforms(stock, fused):
    batch = X[None].repeat(3, 1, 1, 1, 1)
    torch.testing.assert_close(torch.vmap(fused)(batch), torch.vmap(stock)(batch))
    a, b = (torch.func.grad(lambda x, m=m: m(x).sum())(X) for m in (stock, fused))
    assert torch.equal(a, b)
    a, b = (torch.func.jvp(m, (X,), (torch.ones_like(X),)) for m in (stock, fused))
    assert torch.equal(a[1], b[1])
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        assert torch.autograd.forward_ad.unpack_dual(fused(dual)).tangent is not None or torch.autograd.forward_ad.unpack_dual(
            stock(dual)).tangent is None


def test_functional_call_takes_the_given_tensors(stock, fused):
    other = {k: v + 0.1 if v.is_floating_point() else v for k, v in stock.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(fused, other, X), torch.func.functional_call(stock, other, X),
                               rtol=1e-4, atol=1e-4)
    agree(stock, fused, X)


def test_inference_mode(stock, fused):
    with torch.inference_mode():
        result = fused(X)
        assert result.is_inference()
        torch.testing.assert_close(result, stock(X), rtol=1e-4, atol=1e-4)
        made = randomize(Net()).eval()
        twice(made, fr.fuse(made), X.clone())
    assert not fused(X).is_inference() and not aside(fused)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled, saved])
@torch.no_grad()
def test_copies_are_fused_and_independent(clone):
    stock = randomize(tv.resnet18()).eval()
    stock.features = nn.Sequential(Block(3), nn.Conv2d(3, 3, 1), nn.ReLU())
    fused = fr.fuse(stock)
    x = torch.randn(1, 3, 40, 40)
    for called in (False, True):
        twin = clone(fused)
        assert all(plan.module is twin.get_submodule(name) for name, plan in plans(twin).items()) and plans(twin)
        twice(stock, twin, x)
        assert counts(twin)[0] == counts(fused)[0] and not fr.report(twin).notes
        twin.layer1[0].relu = nn.GELU()
        twin.layer2[0].conv1.weight.mul_(2)
        if called:
            assert not torch.allclose(twin(x), stock(x))
        twice(stock, fused, x)


def test_functions_without_a_public_name_of_their_own_are_pickled():
    class_ = globals()["Pools"]
    stock = randomize(class_()).eval().requires_grad_(False)
    twice(stock, pickled(fr.fuse(stock)), X)


class Pools(Block):
    def forward(self, x):
        out = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        return torch.cat([F.adaptive_avg_pool2d(out, 1), F.adaptive_max_pool2d(out, 1)], 1) * torch.sigmoid(self.bn2.bias[0])


def test_a_replica_for_data_parallel_is_stock(stock, fused):
    replica = fused.layer1._replicate_for_data_parallel()
    assert not plans(replica) and plans(fused.layer1)
    replica.conv1, replica.scale = nn.Conv2d(8, 8, 3, padding=1), 2.0
    assert not torch.equal(replica(X), fused.layer1(X))
    assert "_replicate_for_data_parallel" not in vars(fr.unfuse(fused).layer1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(stock, fused, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(X), stock(X), rtol=1e-4, atol=1e-4)


def test_exports(stock, fused):
    for strict in (False, True):
        program = torch.export.export(fused, (X,), strict=strict)
        torch.testing.assert_close(program.module()(X), stock(X), rtol=1e-4, atol=1e-4)
        assert any("batch_norm" in str(n.target) for n in program.graph.nodes)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_traces_stock(stock, fused):
    traced = torch.jit.trace(fused, X)
    assert "batch_norm" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X), stock(X), rtol=1e-4, atol=1e-4)


def test_symbolic_trace_sees_stock(stock, fused):
    def names(model):
        return [n.target for n in torch.fx.symbolic_trace(model).graph.nodes]

    assert names(fused) == names(stock)


def test_fake_and_meta_tensors(stock, fused):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fused(mode.from_tensor(X)).shape == (2, 5)
    with torch.device("meta"):
        empty = fr.fuse(Net().eval())
    assert empty(X.to("meta")).shape == (2, 5)
    agree(stock, fused, X)


@torch.no_grad()
def test_eight_threads_call_first_at_once(stock):
    class Slow(Block):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    stock.layer2.append(Slow().eval())
    fused, results = fr.fuse(stock), []
    start = threading.Barrier(8)

    def work(i):
        start.wait()
        results.append((i, [fused(X + i) for _ in range(3)]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for i, outputs in results:
        for out in outputs:
            torch.testing.assert_close(out, stock(X + i), rtol=1e-4, atol=1e-4)
    assert not any(plan.broken for plan in plans(fused).values()) and not executor.state.stock


def test_fuse_twice_and_unfuse(stock):
    fused = fr.fuse(stock)
    again = fr.fuse(fused)
    twice(stock, again, X)
    twice(stock, fused, X)
    assert len(plans(again)) == len(plans(fused))
    equal(stock, fr.unfuse(fused), X)
    assert not plans(fused) and "forward" not in vars(fused)
    with pytest.raises(ValueError, match=r"fuse\(\) returned"):
        fr.report(fused)
    assert fr.fuse(stock, inplace=True) is stock
    assert plans(fr.unfuse(again.layer1)) == {}
    twice(stock, again, X)


def test_a_part_may_be_fused_again(stock, fused):
    fr.fuse(fused.layer2, inplace=True)
    twice(stock, fused, X)


def test_filter(stock):
    fused = fr.fuse(stock, filter=lambda name, module: not name.startswith("layer2"))
    assert {r.name for r in fr.report(fused) if r.status == "fused"} == {"stem.0", "layer1.conv1", "layer1.conv2"}
    assert any("left out by the filter" in row.reason for row in fr.report(fused))
    assert not plans(fused.layer2) and plans(fused)[""].opaque
    for _ in range(2):
        agree(stock, fused, X)
    assert counts(fr.fuse(stock, filter=lambda name, module: name != "head")) == counts(fr.fuse(stock))


def test_strict_names_what_was_skipped(stock):
    assert fr.fuse(stock, strict=True) is not stock
    with pytest.raises(ValueError, match=r"layer1\.conv1"):
        fr.fuse(stock, strict=True, filter=lambda name, module: name != "layer1")


@pytest.mark.parametrize("wrong", [None, lambda x: x, nn.Module, "model"])
def test_fuse_takes_modules_only(wrong):
    with pytest.raises(ValueError, match="nn.Module"):
        fr.fuse(wrong)
    with pytest.raises(ValueError, match="memory_format"):
        fr.fuse(nn.ReLU(), memory_format=torch.preserve_format)


@torch.no_grad()
def test_channels_last_throughout():
    stock = randomize(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), Block(16))).eval()
    fused = fr.fuse(stock, memory_format=torch.channels_last)
    for size in (9, 3):
        x = torch.randn(2, 8, size, size)
        for _ in range(2):
            out = fused(x)
            same_strides(out, stock(x.contiguous(memory_format=torch.channels_last)))
            torch.testing.assert_close(out, stock(x), rtol=1e-4, atol=1e-4)
    assert not any(plan.broken for plan in plans(fused).values())


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_values_that_are_not_finite_come_through(stock, fused, value):
    x = X.clone()
    x[0, 3, 0, 0] = value
    a, b = stock.layer1(stock.stem(x)), fused.layer1(fused.stem(x))
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()) and (a.isnan().any() or value == 1e38)
    agree(stock, fused, x)


LAYOUTS = {
    "sliced": lambda x: x[:, :, ::2, ::2], "transposed": lambda x: x.transpose(2, 3), "expanded": lambda x: x[:1].expand_as(x),
    "channel_slice": lambda x: torch.cat([x, x], 1)[:, ::2], "offset": lambda x: torch.cat(
        [torch.zeros(1), x.flatten()])[1:].view_as(x), "one_pixel": lambda x: x[:, :, :1, :1],
    "row": lambda x: x[:, :, :1], "one_image": lambda x: x[:1], "empty": lambda x: x[:0], "permuted": lambda x: x.permute(
        3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), "channels_last": lambda x: x.contiguous(
            memory_format=torch.channels_last), "parameter": lambda x: nn.Parameter(x, False)}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_layout_gets_stocks_strides(stock, fused, layout):
    for s, f in ((stock, fused), (stock.layer1, fused.layer1), (stock.layer2, fused.layer2), (stock.stem, fused.stem)):
        twice(s, f, LAYOUTS[layout](X))


WRONG = {
    "3d": lambda: (X[0],), "5d": lambda: (X[None],), "2d": lambda: (X[0, 0],), "channels": lambda: (X[:, :5],),
    "double": lambda: (X.double(),), "int": lambda: (X.int(),), "complex": lambda: (X.to(torch.complex64),),
    "none": lambda: (None,), "list": lambda: (X.tolist(),), "array": lambda: (X.numpy(),), "nothing": lambda: (),
    "two": lambda: (X, X), "sparse": lambda: (X.to_sparse(),), "meta": lambda: (X.to("meta"),),
    "bf16": lambda: (X.bfloat16(),), "no_rows": lambda: (X[:, :, :0],)}


@pytest.mark.parametrize("wrong", WRONG)
@torch.no_grad()
def test_errors_are_stocks(stock, fused, wrong):
    def outcome(model):
        try:
            out = model(*WRONG[wrong]())
        except Exception as error:
            return type(error), str(error).split("\n")[0]
        return out.shape, out.dtype

    for part in ("", "stem", "layer1", "layer2"):
        assert outcome(fused.get_submodule(part)) == outcome(stock.get_submodule(part))
    agree(stock, fused, X)
    assert not executor.state.stock


@torch.no_grad()
def test_kernel_larger_than_its_input():
    stock = randomize(nn.Sequential(nn.Conv2d(8, 8, 5), nn.BatchNorm2d(8), nn.ReLU())).eval()
    fused = fr.fuse(stock)
    agree(stock, fused, X)
    for model in (stock, fused):
        with pytest.raises(RuntimeError, match=r"Kernel size: \(5 x 5\). Kernel size can't be greater"):
            model(X[:, :, :3, :3])


@torch.no_grad()
def test_stride_of_zero_raises_as_stock_does():
    stock = nn.Sequential(nn.Conv2d(8, 8, 3, stride=0), nn.BatchNorm2d(8)).eval()
    for model in (stock, fr.fuse(stock)):
        with pytest.raises(RuntimeError, match="non-positive stride"):
            model(X)


class Defaults(Block):
    def forward(self, x, scale=1.0, *, shift=0.0):
        return super().forward(x) * scale + shift


def test_keyword_calls_and_defaults(stock, fused):
    torch.testing.assert_close(stock(x=X), fused(x=X), rtol=1e-4, atol=1e-4)
    assert "other arguments" in aside(fused)[0]
    stock = randomize(Defaults()).eval().requires_grad_(False)
    fused = fr.fuse(stock)
    assert counts(fused) == (2, 2)
    twice(stock, fused, X)
    equal(stock, fused, X, 3.0)
    assert torch.equal(stock(X, shift=1.0), fused(X, shift=1.0))


@torch.no_grad()
def test_a_region_of_threads_that_fail_leaves_no_trace(stock, fused):
    for _ in range(2):
        with pytest.raises(RuntimeError):
            fused(X[:, :3])
        assert not executor.state.stock and not executor.state.inside
    twice(stock, fused, X)


CONVS = {
    "bias": nn.Conv2d(8, 6, 3), "groups": nn.Conv2d(8, 8, 3, groups=4), "depthwise": nn.Conv2d(8, 16, 3, groups=8),
    "dilated": nn.Conv2d(8, 5, 3, dilation=2, padding=2), "pairs": nn.Conv2d(8, 5, (1, 3), (2, 1), (0, 1)),
    "one": nn.Conv2d(8, 1, 1), "strided": nn.Conv2d(8, 7, 7, 2, 3)}
STOCK_CONVS = {
    "same": nn.Conv2d(8, 8, 3, padding="same"), "reflect": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")}


@pytest.mark.parametrize("name", [*CONVS, *STOCK_CONVS])
@torch.no_grad()
def test_every_convolution(name):
    conv = copy.deepcopy((CONVS | STOCK_CONVS)[name])
    stock = randomize(nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.SiLU())).eval()
    fused = fr.fuse(stock)
    assert counts(fused)[0] == (name in CONVS), str(fr.report(fused))
    for _ in range(2):
        agree(stock, fused, X)
