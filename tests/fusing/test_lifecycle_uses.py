"""What PyTorch does with a module: hooks, transforms, modes, odd inputs. Stock and fused models must show the same."""

import contextlib
import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.fusing.beside import EVERY, beside, quietly, step
from tests.fusing.nets import X


def hooked(place, kinds, remove=False):
    """Hooks of these kinds at one module; the log tells who was called, in order, and with what."""
    def item(model):
        module, log = model.get_submodule(place), []

        def note(kind):
            return lambda m, *values: log.append((kind, described(values)))

        add = {"forward": lambda: module.register_forward_hook(note("forward")),
               "pre": lambda: module.register_forward_pre_hook(note("pre")),
               "kwargs": lambda: module.register_forward_hook(note("kwargs"), with_kwargs=True, prepend=True),
               "always": lambda: module.register_forward_hook(note("always"), always_call=True),
               "backward": lambda: module.register_full_backward_hook(note("backward")),
               "backward_pre": lambda: module.register_full_backward_pre_hook(note("backward_pre")),
               "old": lambda: module.register_backward_hook(note("old"))}
        handles = [add[kind]() for kind in kinds]
        seen = []
        for _ in range(2):
            torch.manual_seed(0)
            out = model(X.clone().requires_grad_())
            out.sum().backward()
            seen.append(out.detach())
            with torch.no_grad():
                model(X)
        model.zero_grad()
        if remove:
            for handle in handles:
                handle.remove()
        return log, seen
    return item


def described(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    return [described(v) for v in value] if isinstance(value, list | tuple) else isinstance(value, nn.Module) or value


def raising(model):
    def fail(module, args):
        raise KeyError("from a hook")

    handle = model.layer2[0].register_forward_pre_hook(fail)
    try:
        model(X)
    finally:
        handle.remove()


def everywhere(model):
    """As summaries of a model work: a hook on every module writes down the shape of what came out."""
    seen = []
    handles = [m.register_forward_hook(lambda m, a, out, name=name: seen.append((name, described(out))))
               for name, m in model.named_modules()]
    model(X)
    for handle in handles:
        handle.remove()
    return seen


PLACES = ["", "stem", "stem.0", "stem.1", "layer1", "layer1.conv1", "layer1.bn2", "layer1.relu", "layer2",
          "layer2.0.downsample.1", "head"]
KINDS = {"forward": ("forward", "pre", "kwargs", "always"), "backward": ("backward", "backward_pre"), "old": ("old",)}
HOOKS = {f"{kind}_{place or 'root'}": hooked(place, KINDS[kind]) for kind in KINDS for place in PLACES} | {
    "removed": hooked("layer1.bn1", KINDS["forward"], remove=True), "raising": raising, "everywhere": everywhere,
    "removed_backward": hooked("layer1.conv1", KINDS["backward"], remove=True),
    "of_a_tensor": lambda m: m.layer1.bn1.weight.register_hook(lambda g: g * 2) and None,
    "after_accumulating": lambda m: m.stem[0].weight.register_post_accumulate_grad_hook(lambda p: None) and None,
}


def called_functionally(model):
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    other = {key: v * 0.5 + 1 if v.is_floating_point() else v.clone() for key, v in values.items()}
    out = [torch.func.functional_call(model, other, X)]
    with torch.no_grad():
        out.append(torch.func.functional_call(model, {k: other[k] for k in list(other)[:5]}, (X,), strict=False))
    return [o.detach() for o in out], {key: other[key] for key, _ in model.named_buffers()}


def ensemble(model):
    """torch.func's recipe for several models in one vmap."""
    models = [model, copy.deepcopy(model)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(model).to("meta")
    out = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (X,)))(parameters, buffers)
    return out.detach()


def detached(model):
    return {k: v.detach() for k, v in model.named_parameters()}, {k: v.clone() for k, v in model.named_buffers()}


def loss_of(model, parameters, buffers, x):
    return torch.func.functional_call(model, (parameters, buffers), (x,)).square().mean()


def per_sample(model):
    parameters, buffers = detached(model)

    def loss(p, x):
        return loss_of(model, p, buffers, x[None])

    return torch.vmap(torch.func.grad(loss), (None, 0))(parameters, X)


def hessian_times_vector(model):
    parameters, buffers = detached(model)
    ones = {k: torch.ones_like(v) for k, v in parameters.items()}
    return torch.func.jvp(torch.func.grad(lambda p: loss_of(model, p, buffers, X)), (parameters,), (ones,))


def dual(model):
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))
        return [t.detach() for t in torch.autograd.forward_ad.unpack_dual(out) if t is not None]


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for i in range(3):
        step(model, X + i)
        average.update_parameters(model)
    torch.optim.swa_utils.update_bn([X, X + 1], average)
    return average


def exponential(model):
    """The other way to keep an average: a copy whose data is written."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for i in range(3):
        step(model, X + i)
        for a, b in zip(twin.state_dict().values(), model.state_dict().values()):
            a.copy_(b if not b.is_floating_point() else 0.9 * a + 0.1 * b)
        twin(X)
    return twin


def with_(context, call=lambda m: m(X).detach()):
    def item(model):
        with context():
            return [call(model) for _ in range(2)]
    return item


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic(warn_only=False):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def flag(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Ops(TorchDispatchMode):
    """Which operators ran, and what they were given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((str(func), described(args)))
        return func(*args, **(kwargs or {}))


def dispatched(model):
    with Ops() as ops:
        model(X)
    return ops.seen


def flops(model):
    with FlopCounterMode(model, display=False) as counter:
        model(X)
    return counter.get_total_flops(), sorted(str(n).split(".", 1)[-1] for n in counter.get_flop_counts())


def faked(model):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = model(mode.from_tensor(X))
        return tuple(out.shape), out.stride(), out.dtype


def shapes(model):
    """Shapes of the convolutions that a profiler writes down, of steps on the stock modules."""
    model.train()
    model(X), model(X)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        model(X)
    return sorted(str(e.input_shapes[:2]) for e in seen.events() if e.name == "aten::convolution")


def in_threads(model):
    with ThreadPoolExecutor(4) as pool:  # in training they would move the same statistics
        return list(pool.map(lambda i: model.eval()(X + i).detach(), range(8)))


def checkpointed(model):
    x = X.clone().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(model.layer2, model.stem(x), use_reentrant=False)
    out.sum().backward()
    return out.detach(), x.grad


def per_parameter(model):
    out = model(X)
    return torch.autograd.grad(out.sum(), list(model.parameters()), retain_graph=True, create_graph=False)


def wrapped(model):
    return nn.Sequential(nn.ReLU(), model, nn.Softmax(-1))


class Seen(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


USED = {
    "functional_call": called_functionally, "ensemble": ensemble, "per_sample": per_sample,
    "vmap": lambda m: torch.vmap(m, randomness="different")(X[None].repeat(3, 1, 1, 1, 1)).detach(),
    "grad": lambda m: torch.func.grad(lambda x: m(x).sum())(X),
    "vjp": lambda m: torch.func.vjp(m, X)[1](torch.ones(2, 5)),
    "jvp": lambda m: [t.detach() for t in torch.func.jvp(m, (X,), (torch.ones_like(X),))],
    "jacrev": lambda m: torch.func.jacrev(m)(X[:, :, :4, :4]), "forward_ad": dual,
    "hessian_times_vector": hessian_times_vector, "functionalize": lambda m: torch.func.functionalize(m)(X).detach(),
    "averaged": averaged, "exponential": exponential, "wrapped": wrapped,
    "inference_mode": with_(torch.inference_mode, lambda m: m(X) * 1), "no_grad": with_(torch.no_grad),
    "enable_grad": with_(torch.enable_grad), "autocast": with_(lambda: torch.autocast("cpu", torch.bfloat16)),
    "anomaly": quietly(with_(torch.autograd.detect_anomaly)), "deterministic": with_(deterministic),
    "deterministic_warnings": with_(lambda: deterministic(True)),
    "default_dtype": with_(lambda: default_dtype(torch.float64)), "default_device": with_(lambda: torch.device("cpu")),
    "meta_device": with_(lambda: torch.device("meta")), "no_mkldnn": with_(lambda: torch.backends.mkldnn.flags(False)),
    "flush_denormal": lambda m: (torch.set_flush_denormal(True), m(X).detach(), torch.set_flush_denormal(False)),
    "saved_tensor_hooks": with_(lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)),
    "on_cpu": with_(torch.autograd.graph.save_on_cpu), "dispatch_mode": dispatched, "flops": flops, "fake": faked,
    "profiler": shapes, "threads": in_threads, "checkpoint": checkpointed, "autograd_grad": per_parameter,
    "data_parallel": lambda m: nn.DataParallel(m), "repr": repr, "str_of_a_part": lambda m: repr(m.layer2),
    "signature": lambda m: (str(inspect.signature(m.forward)), inspect.signature(type(m).forward).return_annotation),
    "keyword": lambda m: m(x=X).detach(), "no_argument": lambda m: m(), "many_arguments": lambda m: m(X, X),
    "none": lambda m: m(None), "a_list": lambda m: m([1.0]), "three_dimensions": lambda m: m(X[0]).detach(),
    "three_channels": lambda m: m(X[:, :3]), "integers": lambda m: m(X.long()), "doubles": lambda m: m(X.double()),
    "nothing": lambda m: m(X[:0]).detach(), "sparse": lambda m: m(X.to_sparse()), "nan": lambda m: m(X / 0).detach(),
    "mkldnn": lambda m: m.stem(X.to_mkldnn()), "one_value": lambda m: m(X[:1, :, :1, :1]).detach(),
    "nested": quietly(lambda m: m(torch.nested.nested_tensor([X[0], X[1]]))),
    "subclass": lambda m: type(m(X.as_subclass(Seen))).__name__, "complex": lambda m: m(X.to(torch.complex64)),
    "modules": lambda m: [(n, [c for c, _ in x.named_children()]) for n, x in m.named_modules()],
    "missing_attribute": lambda m: m.layer9, "get_submodule": lambda m: m.get_submodule("layer1.conv9"),
}


ITEMS = {**HOOKS, **USED}
CLASSES = {"repr", "str_of_a_part"}  # say the names of classes, which are ours in blocks of ours


@pytest.mark.parametrize("name", ITEMS)
def test_item(name):
    beside(ITEMS[name], "called", mode=False)


@pytest.mark.gate
@pytest.mark.parametrize("made, mode", EVERY)
@pytest.mark.parametrize("name", ITEMS)
def test_every_item(name, made, mode):
    if made != "blocks" or name not in CLASSES:
        beside(ITEMS[name], made, mode)
