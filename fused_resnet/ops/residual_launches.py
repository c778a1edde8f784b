"""The residual branch as launches of our own families: normalised activations and their gradients are never stored.

Forward, stage by stage: `conv_bn_stats` reads u of the stage before through its norm and activation; `bn_act` ends
the block. Backward: `bn_act_sums` and `bn_act_grad` at the end, then per stage `conv_wgrad` and `conv_dgrad`,
each taking the gradient of the norm as it loads. With `recompute` the last convolution's output is made again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fused_resnet import backends
from fused_resnet.numerics import NAMES
from fused_resnet.ops import bn_act, conv_bn_act, conv_bn_stats, conv_grad  # noqa: F401 - these register their families
from fused_resnet.ops.bn_act import NormOperands
from fused_resnet.ops.residual_parts import Branch, Kept, Parts, Stage
from fused_resnet.problem import ConvOperands, ConvProblem, GradOperands, NormProblem

CHANNELS_LAST = torch.channels_last


class Source(NamedTuple):
    """A tensor in channels_last memory, and the norm and activation that its readers apply, if any."""

    x: torch.Tensor
    stage: Stage | None = None
    part: Parts | None = None
    mean: torch.Tensor | None = None
    var: torch.Tensor | None = None


def _device(x: torch.Tensor) -> str:
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type


def _dtype(x: torch.Tensor) -> str:
    dtype = NAMES[x.dtype]
    return "tf32" if dtype == "fp32" and x.is_cuda and torch.backends.cudnn.allow_tf32 else dtype


def conv_problem(x: torch.Tensor, stage: Stage, part: Parts, prologue: str) -> ConvProblem:
    n, c, h, w = x.shape
    k, _, r, s = part.weight.shape
    return ConvProblem(_device(x), _dtype(x), n, h, w, c, k, r, s, stage.stride, stage.padding, stage.dilation,
                       stage.groups, part.bias is not None, False, False, "identity", prologue)


def _ahead(before: Source) -> dict[str, Any]:
    """The operands that describe the norm of a convolution's input."""
    if before.stage is None or before.part is None:
        return {}
    return {"pre_gamma": before.part.gamma, "pre_beta": before.part.beta, "pre_mean": before.mean,
            "pre_var": before.var, "pre_eps": before.stage.eps}


def _prologue(before: Source) -> str:
    return before.stage.activation if before.stage is not None else ""


def convolve(before: Source, stage: Stage, part: Parts) -> torch.Tensor:
    """u alone."""
    problem = conv_problem(before.x, stage, part, _prologue(before))
    return backends.run("conv_bn_act", problem, ConvOperands(before.x, part.weight, part.bias, **_ahead(before)))


def statistics(before: Source, stage: Stage, part: Parts, group: Any) -> Source:
    """u of a stage with its norm: of the batch's statistics, over the process group where there is one, or fixed ones.

    Updates the running statistics.
    """
    if not stage.batch:
        return Source(convolve(before, stage, part), stage, part, part.running_mean, part.running_var)
    problem = conv_problem(before.x, stage, part, _prologue(before))
    u, mean, var = backends.run("conv_bn_stats", problem, ConvOperands(
        before.x, part.weight, part.bias, mean=part.running_mean, **_ahead(before)))
    count = u.numel() // u.shape[1]
    if group is not None:
        mean, var, count = join(mean, var, count, group)
    if part.running_mean is not None and part.running_var is not None:
        weight = stage.momentum
        part.running_mean.mul_(1 - weight).add_(mean.to(part.running_mean.dtype), alpha=weight)
        part.running_var.mul_(1 - weight).add_(var.to(part.running_var.dtype), alpha=weight * count / max(count - 1, 1))
    return Source(u, stage, part, mean, var)


def join(mean: torch.Tensor, var: torch.Tensor, count: int, group: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Statistics of the joint batch of all processes (Chan, Golub and LeVeque 1983), and how many elements it has."""
    size = torch.distributed.get_world_size(group)
    mine = torch.cat((mean, var, mean.new_tensor([count])))
    all_ = [torch.empty_like(mine) for _ in range(size)]
    torch.distributed.all_gather(all_, mine, group=group)
    means, variances, counts = torch.stack(all_).split([mean.numel(), mean.numel(), 1], dim=1)
    total = counts.sum()
    share = counts / total
    joint = (means * share).sum(0)
    return joint, ((variances + (means - joint).square()) * share).sum(0), int(total)


def forward(spec: Branch, x: torch.Tensor, shortcut: torch.Tensor | None,
            parts: list[Parts]) -> tuple[torch.Tensor, torch.Tensor | None, list[Kept]]:
    """(y, mask, what each stage keeps)."""
    kept: list[Kept] = []
    before = _plain(x)
    for stage, part in zip(spec.stages, parts, strict=False):
        before = statistics(before, stage, part, spec.group)
        kept.append(_keep(before))
    operands = _end(before)
    residual, form = shortcut, "tensor" if shortcut is not None else ""
    if spec.projection is not None and shortcut is not None:
        other = statistics(_plain(shortcut), spec.projection, parts[-1], spec.group)
        kept.append(_keep(other))
        residual, operands, form = other.x, operands | _other(other), "norm"
    elif residual is not None:
        residual = residual.contiguous(memory_format=CHANNELS_LAST)
    problem = norm_problem(before.x, spec.stages[-1].activation, form)
    y, mask = backends.run("bn_act", problem, NormOperands(**operands, residual=residual))
    if spec.recompute:
        kept[len(spec.stages) - 1] = kept[len(spec.stages) - 1]._replace(u=None)
        if spec.projection is not None:
            kept[-1] = kept[-1]._replace(u=None)
    return y, mask, kept


def _keep(source: Source) -> Kept:
    """Fixed statistics are given again to backward."""
    batch = source.stage is not None and source.stage.batch
    return Kept(source.x, None, source.mean, source.var) if batch else Kept(source.x, None, None)


def norm_problem(x: torch.Tensor, activation: str, shortcut: str) -> NormProblem:
    n, c, h, w = x.shape
    return NormProblem(_device(x), _dtype(x), n, h, w, c, activation, shortcut)


def _plain(x: torch.Tensor) -> Source:
    return Source(x.contiguous(memory_format=CHANNELS_LAST))


def _end(source: Source) -> dict[str, Any]:
    assert source.stage is not None and source.part is not None
    return {"x": source.x, "gamma": source.part.gamma, "beta": source.part.beta, "mean": source.mean,
            "var": source.var, "eps": source.stage.eps}


def _other(source: Source) -> dict[str, Any]:
    return {f"r_{name}": value for name, value in _end(source).items() if name != "x"}


def _means(sums: torch.Tensor, stage: Stage, u: torch.Tensor, group: Any) -> torch.Tensor:
    """s0 and s1: the sums over the batch, joint over the process group, or zeros for fixed statistics."""
    if not stage.batch:
        return torch.zeros_like(sums)
    count = u.numel() // u.shape[1]
    if group is not None:
        row = torch.cat((sums.flatten(), sums.new_tensor([count])))
        torch.distributed.all_reduce(row, group=group)
        return row[:-1].view_as(sums) / row[-1]
    return sums / count


def backward(spec: Branch, dy: torch.Tensor, x: torch.Tensor, reads: torch.Tensor | None, mask: torch.Tensor | None,
             parts: list[Parts], kept: list[Kept], needs: tuple[bool, ...], shared: bool, adds: bool) -> list[Any]:
    """Gradients of (x, shortcut, and Parts of every stage); None where `needs` asks for none.

    Args:
        needs: for x, for the shortcut, then for every tensor of `parts`.
        shared: the shortcut is x.
        adds: there is a shortcut.
    """
    return _Backward(spec, dy, x, reads, mask, parts, kept, needs, shared, adds).run()


class _Backward:
    """One backward pass; a class because its steps share a dozen values."""

    def __init__(self, spec: Branch, dy: torch.Tensor, x: torch.Tensor, reads: torch.Tensor | None,
                 mask: torch.Tensor | None, parts: list[Parts], kept: list[Kept], needs: tuple[bool, ...],
                 shared: bool, adds: bool):
        self.spec, self.mask, self.parts, self.kept = spec, mask, parts, kept
        self.dy = dy.contiguous(memory_format=CHANNELS_LAST)
        self.needs, self.shared, self.adds = needs, shared, adds
        self.x = _plain(x)
        self.projected = self.x if shared else _plain(reads) if reads is not None else None
        self.grads: list[Any] = [None] * len(needs)
        self.width = len(parts[0])

    def run(self) -> list[Any]:
        spec, last = self.spec, len(self.spec.stages) - 1
        sources = [self.x] + [self.source(i, self.kept[i].u) for i in range(last)]
        u = self.kept[last].u
        if u is None:
            u = convolve(sources[last], spec.stages[last], self.parts[last])
        operands = _end(self.source(last, u))
        du, dr = self.end(operands, u)
        dx = self.through(last, du, None, None, sources)
        if self.adds and spec.projection is None and not self.shared and self.needs[1]:
            self.grads[1] = dr
        if spec.projection is not None and dr is not None:
            self.project(dr, dx)
        elif dx is not None:
            self.grads[0] = dx
        return self.grads

    def end(self, operands: dict[str, Any], u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(du of the last convolution, gradient of what was added: of the projection's convolution, or dz)."""
        spec, form, last = self.spec, "", len(self.spec.stages) - 1
        residual = None
        if spec.projection is not None:
            mine = self.kept[-1]
            residual = mine.u if mine.u is not None else convolve(self.projected, spec.projection, self.parts[-1])  # type: ignore
            operands, form = operands | _other(self.source(last + 1, residual)), "norm"
        elif self.adds and not self.shared and self.needs[1]:
            form = "tensor"
        given = NormOperands(**operands, residual=residual, dy=self.dy, mask=self.mask)
        problem = norm_problem(u, spec.stages[-1].activation, form)
        sums = backends.run("bn_act_sums", problem, given)
        self.vectors(last, sums)
        given = given._replace(means=_means(sums[:2], spec.stages[-1], u, spec.group))
        if spec.projection is not None:
            self.vectors(last + 1, sums[::2])
            given = given._replace(r_means=_means(sums[::2], spec.projection, u, spec.group))
        return backends.run("bn_act_grad", problem, given)  # type: ignore[return-value]

    def vectors(self, index: int, sums: torch.Tensor) -> None:
        """dgamma, dbeta, and the gradient of the convolution's bias."""
        part, first = self.parts[index], 2 + index * self.width
        if part.gamma is not None:
            self.grads[first + 2] = sums[1].to(part.gamma.dtype)
        if part.beta is not None:
            self.grads[first + 3] = sums[0].to(part.beta.dtype)
        if part.bias is not None:
            stage = self.stage(index)
            scale = (self.source(index, sums).var + stage.eps).rsqrt() * (1 if part.gamma is None else part.gamma)  # type: ignore
            # A norm with the batch's statistics takes any constant away again.
            self.grads[first + 1] = (scale * sums[0] * (not stage.batch)).to(part.bias.dtype)

    def source(self, index: int, u: torch.Tensor | None) -> Source:
        """u of stage `index` with its norm."""
        stage, part, mine = self.stage(index), self.parts[index], self.kept[index]
        mean, var = (mine.mean, mine.var) if stage.batch else (part.running_mean, part.running_var)
        return Source(u, stage, part, mean, var)  # type: ignore[arg-type]

    def stage(self, index: int) -> Stage:
        return self.spec.stages[index] if index < len(self.spec.stages) else self.spec.projection  # type: ignore

    def through(self, index: int, dz: torch.Tensor, u: torch.Tensor | None, means: torch.Tensor | None,
                sources: list[Source]) -> torch.Tensor | None:
        """From the gradient of stage `index` (of its u, or with `u` of its z) down to that of x, where it is needed."""
        while True:
            stage, part, source = self.stage(index), self.parts[index], sources[index]
            problem = conv_problem(source.x, stage, part, _prologue(source))._replace(bias=False)
            own: dict[str, Any] = {}
            if u is not None:
                _, _, _, mean, var = self.source(index, u)
                own = {"u": u, "gamma": part.gamma, "mean": mean, "var": var, "eps": stage.eps, "means": means}
            operands = GradOperands(dz, part.weight, x=source.x, **own, **_ahead(source))
            first = 2 + index * self.width
            if self.needs[first]:
                self.grads[first] = backends.run("conv_wgrad", problem, operands).to(part.weight.dtype)
            if not any(self.needs[:first] if index else self.needs[:1]):
                return None
            if index == 0 and self.shared and self.spec.projection is None:
                operands = operands._replace(residual=self.dy, mask=self.mask)
            dz, sums = backends.run("conv_dgrad", problem, operands)
            if index == 0:
                return dz
            index, u = index - 1, source.x
            self.vectors(index, sums)
            means = _means(sums, self.stage(index), u, self.spec.group)

    def project(self, dr: torch.Tensor, dx: torch.Tensor | None) -> None:
        """The projection's gradients; that of its input joins x's where both are the same tensor."""
        index = len(self.parts) - 1
        part, stage, source = self.parts[index], self.spec.projection, self.projected
        problem = conv_problem(source.x, stage, part, "")._replace(bias=False)  # type: ignore
        operands = GradOperands(dr, part.weight, x=source.x, residual=dx if self.shared else None)  # type: ignore
        first = 2 + index * self.width
        if self.needs[first]:
            self.grads[first] = backends.run("conv_wgrad", problem, operands).to(part.weight.dtype)
        target = 0 if self.shared else 1
        if self.needs[target]:
            self.grads[target] = backends.run("conv_dgrad", problem, operands)[0]
        if not self.shared:
            self.grads[0] = dx
