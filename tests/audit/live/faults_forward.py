"""Faults that strike while the model computes: train-mode norms, layers with own state, recomputation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from fault_scene import Fault, Pool, Scene, freeze_by_hand, net, norm2d, plain, scene, train_body
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import scramble

from freezekit.nn import BatchNorm2d as OurBatchNorm2d

TRAIN, OWN, RECOMPUTE = "train-mode forward", "own forward", "recompute"


def timm_norm() -> nn.Module:
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(4)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (5,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (3, 3, 3)),
    "BatchNorm2d without affine":
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)), (5, 5)),
    "BatchNorm2d of momentum None": (lambda: nn.BatchNorm2d(4, momentum=None), (5, 5)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), (5, 5)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, track_running_stats=True, affine=True), (5,)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, track_running_stats=True, affine=True), (5, 5)),
    "timm BatchNormAct2d": (timm_norm, (5, 5)),
    "freezekit BatchNorm2d": (lambda: OurBatchNorm2d(4), (5, 5)),
}  # fmt: skip

norms = [
    Fault(
        f"{name} in train mode",
        lambda make=make, spread=spread: norm2d(make(), spread=spread),
        "FK101 body.norm" + (".1" if "without affine" in name else ""),
        TRAIN,
        "the layer's forward ran in train mode: only that moves running statistics",
        norm=True,
        needs="timm" if "timm" in name else None,
    )
    for name, (make, spread) in NORMS.items()
]


# -- ways into train mode ----------------------------------------------------------------------------------


def eval_helper(s: Scene) -> None:
    was = s.model.training
    s.model.train()  # meant to be .eval()
    with torch.no_grad():
        s.model(s.x)
    s.model.train(was)
    s.model.body.eval()


def calibrate(s: Scene) -> None:
    s.model.train()
    with torch.no_grad():
        for _ in range(3):
            s.model(torch.randn_like(s.x))
    s.model.eval()


def teacher_pass(s: Scene) -> None:
    s.model.body.train()
    with torch.no_grad():
        s.model.body(s.x)
    s.model.body.eval()


class Override(nn.Sequential):
    """Keeps its body in eval mode, as long as it is this ``train()`` that is called."""

    def train(self, mode: bool = True) -> Override:
        super().train(mode)
        self.body.eval()
        return self


def override() -> Scene:
    model = freeze_by_hand(scramble(Override()))
    for name, child in plain().named_children():
        model.add_module(name, child)
    return scene(model, before=lambda s: [setattr(m, "training", True) for m in s.model.modules()])


def in_autocast(s: Scene) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return s.model(s.x)


def compiled(backend: str) -> Scene:
    torch.compiler.reset()
    made = scene(net(norm=nn.BatchNorm2d(4), pool=Pool()), torch.randn(6, 4, 3, 3) + 1)
    fast = torch.compile(made.model, backend=backend)
    made.forward = lambda s: fast(s.x)
    made.before = train_body
    return made


def functional_call(s: Scene) -> Tensor:
    state = {**dict(s.model.named_parameters()), **dict(s.model.named_buffers())}
    return torch.func.functional_call(s.model, state, (s.x,))


def bypass_hooks(s: Scene) -> Tensor:
    h = s.x
    for layer in s.model.body:
        h = layer.forward(h)  # as code that wants to skip hooks does
    return s.model.head(h)


def accumulate(s: Scene) -> Tensor:
    for part in s.x.chunk(2):
        s.model(part).square().mean().backward()
    return s.model(s.x)


def second_model(s: Scene) -> None:
    other = nn.Sequential(s.model.body, nn.Linear(4, 1)).train()
    other(s.x).sum().backward()
    s.model.body.eval()


def in_thread(s: Scene) -> None:
    from threading import Thread

    thread = Thread(target=teacher_pass, args=(s,))
    thread.start()
    thread.join()


def functional_norm(training: bool) -> Scene:
    """The parent normalises with the child's statistics; the child's own forward never runs."""

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)
            self.always = False

        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn
            by_batch = self.always or self.training
            return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, by_batch)

    if training:
        return scene(net(own=Parent()), before=train_body)
    return scene(net(own=Parent()), before=lambda s: setattr(s.model.body.own, "always", True))


ways = [
    Fault(name, build, "FK101 body.bn", TRAIN, why, norm=True)
    for name, build, why in (
        ("model.train() in an evaluation helper", lambda: scene(before=eval_helper),
         "its forward ran in train mode inside the helper, which put the mode back"),
        ("calibration pass under no_grad", lambda: scene(before=calibrate),
         "no_grad stops gradients, not statistics: three train-mode forwards"),
        ("teacher pass under no_grad", lambda: scene(before=teacher_pass), "a train-mode forward"),
        ("teacher pass behind the step", lambda: scene(after=teacher_pass), "a train-mode forward"),
        ("train-mode pass in a thread", lambda: scene(before=in_thread), "a train-mode forward, in a thread"),
        (".training = True", lambda: scene(before=lambda s: setattr(s.model.body.bn, "training", True)),
         "the forward ran in train mode, which .training set without .train()"),
        ("train() override that is bypassed", override, "a train-mode forward; the override was not asked"),
        ("train mode under autocast bf16", lambda: scene(before=train_body, forward=in_autocast),
         "a train-mode forward"),
        ("train mode with accumulation", lambda: scene(before=train_body, forward=accumulate),
         "three train-mode forwards in one step"),
        ("train mode through functional_call", lambda: scene(before=train_body, forward=functional_call),
         "functional_call runs the module's forward, in train mode"),
        ("train mode through .forward()", lambda: scene(before=train_body, forward=bypass_hooks),
         "the forward ran in train mode, though no hook saw it"),
        ("body shared with a second model", lambda: scene(before=second_model),
         "the other model ran the shared body in train mode"),
    )
]  # fmt: skip
ways = [
    f if "behind" not in f.name else Fault(f.name, f.build, f.finds, f.causes, f.why, late=True, norm=True)
    for f in ways
]

compiles = [
    Fault(
        f"train mode under torch.compile {backend}",
        partial(compiled, backend),
        "FK101 body.norm",
        TRAIN,
        "the compiled forward is that of train mode",
        norm=True,
    )
    for backend in ("eager", "aot_eager")
]

functional = [
    Fault("F.batch_norm on a child's statistics, train mode", partial(functional_norm, True),
          "FK101 body.own.bn", TRAIN, "the parent ran in train mode and normalised by the batch", norm=True),
    Fault("F.batch_norm on a child's statistics, training=True", partial(functional_norm, False),
          "FK101 body.own.bn", OWN, "the parent's forward does so in eval mode", norm=True),
]  # fmt: skip


# -- recomputation -----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A frozen body below a trained stem, recomputed in the backward pass."""

    def __init__(self, reentrant: bool, layer: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.body = nn.Sequential(
            nn.Linear(4, 4), layer, nn.Tanh()
        )  # recomputing stops at the last tensor saved
        self.head = nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.body, self.stem(x), use_reentrant=self.reentrant)
        return self.head(h)


def checkpointed(reentrant: bool, only_again: bool) -> Scene:
    # the other kind of checkpointing refuses a BatchNorm whose mode changed in between
    layer = Counter("add_") if only_again and not reentrant else nn.BatchNorm1d(4)
    model = freeze_by_hand(scramble(Checkpointed(reentrant, layer)))
    return scene(model, midway=train_body) if only_again else scene(model, before=train_body)


recomputes = [
    Fault(
        f"{'recompute alone' if alone else 'train mode'} under checkpointing, use_reentrant={reentrant}",
        partial(checkpointed, reentrant, alone),
        "FK104 body.1.seen" if alone and not reentrant else "FK101 body.1",
        RECOMPUTE if alone else (TRAIN, RECOMPUTE),
        "the forward was in eval mode, the body in train mode when backward ran it again"
        if alone
        else "the forward moved it, and the second one in backward again",
        norm=not alone or reentrant,
    )
    for alone in (False, True)
    for reentrant in (False, True)
]


# -- layers with state of their own -----------------------------------------------------------------------


class Counter(nn.Module):
    """Writes to a buffer in its forward, in one of several ways: in train mode, or once it is told to."""

    def __init__(self, how: str, *, persistent: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("seen", torch.randn(4), persistent=persistent)
        self.how = how
        self.always = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.always:
            mean = x.detach().mean(0)
            if self.how == "+=":
                self.seen += mean
            elif self.how == "add_":
                self.seen.add_(mean)
            elif self.how == ".data":
                self.seen.data.add_(mean)
            elif self.how == "copy_":
                self.seen.copy_(self.seen * 0.9 + mean * 0.1)
            elif self.how == "another tensor":
                self.seen = self.seen * 0.9 + mean * 0.1
        return x * self.weight + self.seen


class Codebook(nn.Module):
    """Vector quantisation whose codes are a plain attribute, moved as an average in train mode."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.codes = torch.randn(5, 4)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, self.codes).argmin(1)
        if self.training:
            if self.in_place:
                self.codes[nearest] = self.codes[nearest] * 0.9 + x.detach() * 0.1
            else:
                self.codes = self.codes * 0.9 + x.detach().mean(0) * 0.1
        return self.codes[nearest] * self.scale


class Memory(nn.Module):
    """A memory bank: tensors in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.bank = [torch.randn(4), torch.randn(4)]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.bank[1].lerp_(x.detach().mean(0), 0.1)
        return x * self.weight + self.bank[1]


def always(s: Scene) -> None:
    s.model.body.own.always = True


def spectral(parametrized: bool) -> Scene:
    norm = nn.utils.parametrizations.spectral_norm if parametrized else nn.utils.spectral_norm
    return scene(net(lin=norm(nn.Linear(4, 4))), before=train_body)


def observed() -> Scene:
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    fake = FakeQuantize(MovingAverageMinMaxObserver)
    model = net(lin=nn.Linear(4, 4), fake=fake)
    x = torch.randn(8, 4) * 2 + 1
    model(x)  # its first batch sets the range
    fake.disable_observer()
    return scene(model, x * 3, before=lambda s: s.model.body.fake.enable_observer())


class Router(nn.Module):
    """Mixture of experts without an auxiliary loss: a bias that balances the load, moved in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.register_buffer("balance", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x) + self.balance
        if self.training:
            load = F.one_hot(scores.argmax(1), 3).float().mean(0)
            with torch.no_grad():
                self.balance.sub_(0.01 * torch.sign(load - 1 / 3))
        return x * scores.softmax(1).amax(1, keepdim=True)


own = [
    Fault(
        f"buffer moved by {how}, {'in eval mode too' if eval_too else 'in train mode'}",
        lambda how=how, eval_too=eval_too: scene(
            net(own=Counter(how)), before=always if eval_too else train_body
        ),
        "FK104 body.own.seen",
        OWN if eval_too else TRAIN,
        "the layer's own forward writes to it whatever its mode"
        if eval_too
        else "the layer's forward writes to it in train mode only, in which it was",
    )
    for how in ("+=", "add_", ".data", "copy_", "another tensor")
    for eval_too in (False, True)
] + [
    Fault("non-persistent buffer in train mode",
          lambda: scene(net(own=Counter("add_", persistent=False)), before=train_body),
          "FK104 body.own.seen", TRAIN, "as with a persistent one"),
    Fault("codebook attribute in place", lambda: scene(net(own=Codebook(True)), before=train_body),
          "FK104 body.own.codes", TRAIN, "its forward writes rows of it in train mode"),
    Fault("codebook attribute re-assigned", lambda: scene(net(own=Codebook(False)), before=train_body),
          "FK104 body.own.codes", TRAIN, "its forward assigns another in train mode"),
    Fault("tensor in a list", lambda: scene(net(own=Memory()), before=train_body),
          "FK104 body.own.bank.1", TRAIN, "its forward writes to it in train mode"),
    Fault("spectral norm as a parametrization", partial(spectral, True),
          "FK104 body.lin.parametrizations.weight.0._u", TRAIN, "a train-mode forward is a power iteration"),
    Fault("spectral norm as a hook", partial(spectral, False),
          "FK104 body.lin.weight_u", TRAIN, "the hook iterates when the layer is in train mode"),
    Fault("observer of fake quantisation", observed,
          "FK104 body.fake.activation_post_process.min_val", OWN, "an observer observes in eval mode too"),
    Fault("load balance of a router", lambda: scene(net(own=Router()), before=train_body),
          "FK104 body.own.balance", TRAIN, "its forward writes to it in train mode"),
]  # fmt: skip


def rounds_in_eval() -> bool:
    """Tell whether this torch's InstanceNorm writes its statistics back in eval mode (2.6 does)."""
    norm = nn.InstanceNorm1d(4, track_running_stats=True).eval()
    before = norm.running_mean._version
    norm(torch.randn(7, 4, 5))
    return norm.running_mean._version > before


def eval_instance_norm() -> Scene:
    made = norm2d(nn.InstanceNorm2d(4, track_running_stats=True, affine=True))
    made.before = lambda s: setattr(s, "x", torch.randn(7, 4, 5, 5))
    return made


if rounds_in_eval():
    own.append(Fault("InstanceNorm2d in eval mode", eval_instance_norm, "FK101 body.norm", OWN,
                     "this torch writes the mean of seven copies back, rounded", norm=True))  # fmt: skip

FAULTS = [*norms, *ways, *compiles, *functional, *recomputes, *own]
