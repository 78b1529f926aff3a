"""Batch normalisation over the batches of all processes of a group: torch.distributed carries the sums."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from freezekit.nn.batch_kernels import batch_norm_backward, batch_norm_forward, channel_dims
from freezekit.nn.batchnorm import _OwnForward
from freezekit.nn.checks import check_operands, check_rank
from freezekit.nn.kernels import compute_dtype, dense, differentiate, is_differentiated, mean_of, stand_in

__all__ = ["SyncBatchNorm"]

_REFUSED = -1.0
"""What a rank gives as its number of values if its input does not fit the layer."""


class _Exchange:
    """One forward's talk with the other ranks, and the backward's that belongs to it.

    Args:
        group: the ranks.
        n: values per channel on this rank.
        graph: 2 where the input needs a gradient, 1 where only a parameter does, 0 without a graph.
    """

    def __init__(self, group: Any, n: int, graph: int) -> None:
        self.group, self.n, self.graph = group, n, graph
        self.total = 0
        """Values per channel on all ranks."""
        self.graphs: list[int] = []

    @property
    def returns(self) -> bool:
        """Whether the backward, too, has something to exchange: it has if any rank's input needs a gradient.

        Every rank knows it of every other, so they agree whatever differs between them.
        """
        return 2 in self.graphs

    def shared(self, pivot: Tensor, rest: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, mean beyond the pivot, and biased variance of the whole batch."""
        # In float64 throughout: neither a mean far from zero nor a count is rounded, every rank computes the
        # same bits, and ranks of different dtypes send messages of one size, so that they find out.
        facts = (self.n, self.graph, pivot.dtype.itemsize)
        own_mean = mean_of(pivot.double(), rest.double())
        means, variances, counts, heads = _gather(own_mean, var, facts, self.group)
        self._check(heads)
        # Chan, Golub and LeVeque 1979, equation 2.1b, for any number of parts.
        shares = counts / max(self.total, 1)
        mean = (shares * means).sum(0)
        joined = (shares * (variances + (means - mean).square())).sum(0)
        return mean.to(pivot.dtype), (mean - pivot).to(pivot.dtype), joined.to(pivot.dtype)

    def _check(self, heads: list[list[float]]) -> None:
        """Raise on every rank what stops any: a rank that went on would wait for the others."""
        refused = [rank for rank, (count, *_) in enumerate(heads) if count == _REFUSED]
        if refused:
            raise RuntimeError(
                f"SyncBatchNorm cannot run: the input on rank {self._names(refused)} does not fit its layer. "
                "Remedy: see the error raised there"
            )
        widths = [int(width) for *_, width in heads]
        if len(set(widths)) > 1:
            raise RuntimeError(
                f"SyncBatchNorm cannot run: ranks compute in different dtypes, of {widths} bytes by rank. "
                "Remedy: give every rank inputs of one dtype"
            )
        self.total = sum(int(count) for count, *_ in heads)
        self.graphs = [int(graph) for _, graph, _ in heads]
        if self.total == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, "
                f"got 1 on all {len(heads)} ranks together"
            )

    def totalled(self, d_weight: Tensor, d_bias: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the sums over all ranks of the gradients of weight and bias, and the values per channel."""
        absent = [rank for rank, graph in enumerate(self.graphs) if graph == 0]
        if absent:
            raise RuntimeError(
                f"the input's gradient needs every rank, but rank {self._names(absent)} ran SyncBatchNorm "
                "without a graph. Remedy: run the layer on all ranks alike, with gradients or without"
            )
        message = torch.cat([d_weight, d_bias])
        dist.all_reduce(message, group=self.group)
        all_weight, all_bias = message.chunk(2)
        return all_weight, all_bias, max(self.total, 1)

    def differentiable(self) -> None:
        """Refuse to differentiate a backward that not all ranks run alike."""
        if len({graph == 2 for graph in self.graphs}) > 1 or 0 in self.graphs:
            raise RuntimeError(
                "SyncBatchNorm's backward cannot be differentiated: the input requires a gradient on some "
                "ranks only. Remedy: let it require one on all of them"
            )

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(str(dist.get_global_rank(self.group, rank)) for rank in ranks)


def _gather(
    mean: Tensor, var: Tensor, facts: tuple[float, float, float], group: Any
) -> tuple[Tensor, Tensor, Tensor, list[list[float]]]:
    """Exchange means, variances and facts: in tensors with a row a rank, the facts as numbers too."""
    own = torch.cat([mean.double(), var.double(), mean.new_tensor(facts, dtype=torch.float64)])
    told = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather(list(told.unbind()), own, group=group)
    heads = told[:, -len(facts) :]
    means, variances = told[:, : -len(facts)].chunk(2, dim=1)
    return means, variances, heads[:, :1], heads.tolist()


class _Sum(torch.autograd.Function):
    """Sum over the ranks, whose gradient is the sum of theirs; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any) -> Tensor:
        ctx.group = group
        output = input.clone()
        dist.all_reduce(output, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        summed: Tensor = _Sum.apply(grads[0].contiguous(), ctx.group)
        return summed, None


def _plain(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, mean: Tensor, exchange: _Exchange
) -> tuple[Tensor, ...]:
    """Compute as :class:`_BatchNormSync` does, op by op, for further differentiation."""
    x = input.to(compute_dtype(input))
    dims, shape = channel_dims(x)
    n = max(exchange.total, 1)
    centred = x - mean.reshape(shape)  # known to float32 only, so what is left is taken out, too
    rest: Tensor = _Sum.apply(centred.sum(dims), exchange.group)
    centred = centred - (rest / n).reshape(shape)
    squares: Tensor = _Sum.apply(centred.square().sum(dims), exchange.group)
    scale = (squares / n + eps).rsqrt()
    y = centred * (scale if weight is None else scale * weight).reshape(shape)
    return (y if bias is None else y + bias.reshape(shape),)


class _BatchNormSync(torch.autograd.Function):
    """Normalise this rank's part of the batch by the statistics of all.

    Returns the output, and outside the graph the mean and the biased variance.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, exchange: _Exchange
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = dense(input.to(compute_dtype(input)))
        saved: list[Tensor] = []
        if x.numel() == 0:
            nothing = x.new_zeros(x.size(1))
            y, (mean, _, var) = torch.empty_like(x), exchange.shared(nothing, nothing, nothing)
        else:
            y, mean, var, *saved = batch_norm_forward(x, weight, bias, eps, exchange.shared)
        ctx.save_for_backward(input, weight, mean, *saved)
        ctx.eps, ctx.exchange = eps, exchange
        ctx.mark_non_differentiable(mean, var)
        return y.to(input.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad, *_), (input, weight, mean, *saved), exchange = grads, ctx.saved_tensors, ctx.exchange
        if is_differentiated(grad):
            exchange.differentiable()
            bias = stand_in(ctx.needs_input_grad[2], [input.size(1)], mean)
            found = differentiate(_plain, (input, weight, bias), (ctx.eps, mean, exchange), grad)
            return *found, None, None
        x = dense(input.to(compute_dtype(input)))
        dx: Tensor | None
        if saved:
            dx, d_weight, d_bias = batch_norm_backward(
                grad.to(x.dtype), x, exchange.returns, saved, exchange.totalled
            )
        else:
            dx, d_weight, d_bias = torch.empty_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
            if exchange.returns:  # the others wait for this rank's sums, be they zeros
                exchange.totalled(d_weight, d_bias)
        return (
            dx.to(input.dtype) if dx is not None and ctx.needs_input_grad[0] else None,
            d_weight if ctx.needs_input_grad[1] else None,
            d_bias if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


class SyncBatchNorm(_OwnForward):
    """Batch normalisation by the joined batch of all ranks, in the place of ``torch.nn.SyncBatchNorm``.

    ``y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias``

    In train mode, in a process group of more than one rank, mean and variance are those of all ranks'
    batches together, and so the running statistics are the same on every rank, to the bit. In eval mode, in
    one process or without a process group it is an ordinary BN layer for input of any rank, without
    collectives; a frozen one has none either. It runs on the CPU (gloo) and on GPUs (nccl).

    The forward is one ``all_gather`` of ``2 C + 3`` float64 numbers a rank. The backward is one
    ``all_reduce`` of ``2 C`` numbers, and none if the input needs a gradient on no rank: the ranks tell each
    other in the forward, so they agree.

    Gradients are those of the sum of all ranks' losses with respect to this rank's input; those of weight and
    bias are this rank's part, which DDP averages. Batches may differ in size, and be empty on some ranks.

    Every rank of the group has to run the layer as often as the others, backward included: where a rank's
    output does not enter its loss, the others wait for it. What one rank can tell is wrong (an input of
    other channels or another dtype, a single value in all) is an error on every rank, not a wait. Layers of
    different C are not found out: their messages differ in size, on which gloo ends the process.

    It is no subclass of ``torch.nn.SyncBatchNorm``, because ``DistributedDataParallel`` refuses any on the
    CPU; constructor and ``state_dict`` are the same. :func:`freezekit.convert_batchnorm` makes BN layers of a
    model synchronised in place. ``torch.compile`` breaks the graph at the layer. Where activations are
    checkpointed the forward's collective runs twice. CUDA graphs cannot capture the layer, as the host reads
    the counts.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; ``None`` for the cumulative average.
        affine: whether there are a ``weight`` and a ``bias``.
        track_running_stats: whether there are running statistics; without, the rank's own batch normalises in
            eval mode.
        process_group: the ranks to join the batches of; all of them by default.
        device: where the parameters and statistics are made.
        dtype: their dtype.
        bias: whether an affine layer has a ``bias``; also on a torch whose own layer does not take it.

    Shape:
        (N, C, *), output the same, in the input's dtype and memory format.

    Raises:
        ValueError: the input has less than two dimensions, or there is one value per channel on all ranks
            together while the batch is the statistic.
        RuntimeError: this rank's input does not fit the layer's channels or dtype, or another rank's.

    >>> layer = SyncBatchNorm(2, momentum=0.3)
    >>> layer(torch.ones(3, 2, 2, 2)).shape, layer.running_mean, layer.running_var
    (torch.Size([3, 2, 2, 2]), tensor([0.3000, 0.3000]), tensor([0.7000, 0.7000]))

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1; Chan, Golub and LeVeque 1979, "Updating
    formulae and a pairwise algorithm for computing sample variances", equation 2.1;
    https://pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        check_rank(input, ())
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def _normalise(self, input: Tensor) -> Tensor:
        group = self._group(input)
        if group is None:
            return super()._normalise(input)
        output: Tensor = self._synchronised(input, group)
        return output

    def _group(self, input: Tensor) -> Any | None:
        """Return the ranks to talk to, if there are any."""
        if not self.training or not dist.is_available() or not dist.is_initialized() or input.is_meta:
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None  # -1 on a rank outside of the group

    # torch.compiler.disable, but for the two seconds that importing it with the compiler would take.
    @_disable_dynamo
    def _synchronised(self, input: Tensor, group: Any) -> Tensor:
        self._count()
        try:
            self._check(input)
        except Exception:
            nothing = torch.zeros(self.num_features, device=input.device)
            _gather(nothing, nothing, (_REFUSED, 0, 0), group)
            raise
        weight, bias = (
            None if parameter is None else parameter.to(compute_dtype(input))
            for parameter in (self.weight, self.bias)
        )
        graph = 0
        if torch.is_grad_enabled():
            graph = 2 if input.requires_grad else int(any(p.requires_grad for p in self.parameters()))
        exchange = _Exchange(group, input.numel() // input.size(1), graph)
        output: Tensor
        output, mean, var = _BatchNormSync.apply(input, weight, bias, self.eps, exchange)
        self._track(mean, var, exchange.total)
        return output

    def _check(self, input: Tensor) -> None:
        self._check_input_dim(input)
        mean, var = self._running()
        if self.eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {self.eps}")
        if input.size(1) != self.num_features:  # whatever tensors the layer has: messages are of one size
            raise RuntimeError(
                f"SyncBatchNorm should be given {self.num_features} channels: "
                f"the input of shape {tuple(input.shape)} has {input.size(1)}"
            )
        statistics = {"running_mean": mean, "running_var": var} if self._tracks() else {}
        check_operands(input, weight=self.weight, bias=self.bias, **statistics)
