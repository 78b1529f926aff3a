"""Faults by which somebody writes, loads, replaces, moves or reshapes what is frozen."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fault_scene import Fault, Scene, net, plain, scene
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters

WRITE, ASSIGNMENT, MOVE, LOAD = "write", "assignment", "move", "load_state_dict"
LIN, BN = "FK103 body.lin.weight", "FK101 body.bn"
ODDLY = (WRITE, ASSIGNMENT)
"""``.data =`` puts another tensor's memory under the same object: both words are true of it."""


def case(
    name: str, cause: str | tuple[str, ...], why: str, strike: Callable[[Any], object],
    finds: str | tuple[str, ...] = LIN, **more: Any,
) -> Fault:  # fmt: skip
    """Make a fault that strikes behind the backward, when nothing is computed any more in this step."""
    make = more.pop("make", plain)
    x = more.pop("x", None)
    return Fault(name, lambda: scene(make(), x() if x else None, between=lambda s: strike(s.model.body)),
                 finds, cause, why, norm=finds == BN, **more)  # fmt: skip


def quietly(strike: Callable[[Any], object]) -> Callable[[Any], object]:
    return torch.no_grad()(strike)


# -- writes ------------------------------------------------------------------------------------------------


def through_numpy(b: Any) -> None:
    b.lin.weight.detach().numpy()[0, 0] += 1


def kept_view(b: Any) -> None:
    b.lin.weight.detach()[1].zero_()


def new_data(b: Any) -> None:
    b.lin.weight.data = b.lin.weight.data * 2


def swap_data(b: Any) -> None:
    b.lin.weight.data += torch.randn(4, 1) @ torch.randn(1, 4)  # a LoRA merged in


def inference(b: Any) -> None:
    with torch.inference_mode():
        b.lin.weight.mul_(2)


def foreach(b: Any) -> None:
    torch._foreach_add_(list(b.lin.parameters()), 1.0)


def init(b: Any) -> None:
    b.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None)


def from_vector(b: Any) -> None:
    vector_to_parameters(parameters_to_vector(b.parameters()) * 1.1, b.parameters())


def resize(b: Any) -> None:
    b.bn.running_mean.resize_(3)


writes = [
    case("in place under no_grad", WRITE, "an in-place write", quietly(lambda b: b.lin.weight.add_(1))),
    case("in place under inference_mode", WRITE, "an in-place write", inference),
    case("several at once", WRITE, "an in-place write", quietly(foreach)),
    case("through .data", WRITE, "a write through .data", lambda b: b.lin.weight.data.add_(1), hint=False),
    case("weights clamped through .data", WRITE, "a write through .data",
         lambda b: b.lin.weight.data.clamp_(-0.01, 0.01), hint=False),
    case("through numpy", WRITE, "a write through memory shared with numpy", through_numpy, hint=False),
    case("through a view kept of it", WRITE, "a write through a view", quietly(kept_view)),
    case("param.data = new", ODDLY, "its memory was exchanged", new_data),
    case("param.data += delta", WRITE, "a write through .data", swap_data, hint=False),
    case("vector_to_parameters", ODDLY, "it sets .data to views of a vector", from_vector),
    case("init functions re-applied", WRITE, "nn.init writes in place", init),
    case("reset_parameters", WRITE, "it writes in place", lambda b: b.lin.reset_parameters()),
    case("reset_running_stats", WRITE, "it writes in place", lambda b: b.bn.reset_running_stats(), BN),
    case("statistics in place", WRITE, "an in-place write", lambda b: b.bn.running_mean.add_(1), BN),
    case("statistics through .data", WRITE, "a write through .data",
         lambda b: b.bn.running_var.data.mul_(2), BN),
    case("statistics through numpy", WRITE, "a write through shared memory",
         lambda b: b.bn.running_var.numpy().__setitem__(1, 9.0), BN),
    case("counter alone", WRITE, "an in-place write",
         lambda b: b.bn.num_batches_tracked.add_(1), "FK102 body.bn"),
    case("buffer resized in place", WRITE, "an in-place resize", resize, "FK105 body.bn.running_mean"),
]  # fmt: skip


# -- one bit of a large parameter, without a trace ---------------------------------------------------------


class Large(nn.Module):
    """More than a megabyte of weights, of which one bit flips."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3000, 128)  # 1.5 MB

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)[:, :4]


def large() -> nn.Module:
    return net(big=Large())


def tokens() -> Tensor:
    return torch.randint(0, 3000, (8,))


def bit_by_data(b: Any) -> None:
    b.big.table.weight.data.view(torch.int32)[1507, 61].bitwise_xor_(1)


def bit_by_numpy(b: Any) -> None:
    b.big.table.weight.detach().numpy().view("int32")[1507, 61] ^= 1


def bit_by_storage(b: Any) -> None:
    storage = b.big.table.weight.untyped_storage()
    storage[768_001] = storage[768_001] ^ 1


def bit_by_address(b: Any) -> None:
    address = b.big.table.weight.data_ptr() + 768_004
    ctypes.c_uint8.from_address(address).value ^= 1


def sign_of_zero(s: Scene) -> None:
    s.model.body.lin.bias.data.neg_()


def zero_bias() -> Scene:
    s = scene(between=sign_of_zero)
    s.model.body.lin.bias.zero_()
    return s


bits = [
    Fault("sign of a zero", zero_bias, "FK103 body.lin.bias", WRITE, "a write through .data", hint=False),
] + [
    case(f"one bit of a large parameter, by {how}", WRITE, "a write that torch never hears of", strike,
         "FK103 body.big.table.weight", hint=False, make=large, x=tokens)
    for how, strike in (("data", bit_by_data), ("numpy", bit_by_numpy), ("storage", bit_by_storage),
                        ("address", bit_by_address))
]  # fmt: skip


# -- loading -----------------------------------------------------------------------------------------------


def another(b: Any) -> dict[str, Tensor]:
    return {name: t + 1 for name, t in copy.deepcopy(b).state_dict().items()}


def load_norms(b: Any) -> None:
    state = another(b)
    b.load_state_dict({name: t for name, t in state.items() if name.startswith("bn.running")}, strict=False)


def by_hand(through_data: bool, b: Any) -> None:
    state = another(b)
    with torch.no_grad():
        for name, p in b.named_parameters():
            (p.data if through_data else p).copy_(state[name])


def as_mmengine(b: Any) -> None:
    b.lin._load_from_state_dict(another(b), "lin.", {}, True, [], [], [])


def whole_model(s: Scene) -> None:
    s.model.load_state_dict({name: t + 1 for name, t in s.model.state_dict().items()})


loads = [
    Fault("resume of the whole model", lambda: scene(between=whole_model), (LIN, BN), LOAD,
          "load_state_dict wrote it"),
    case("resume of a submodule", LOAD, "load_state_dict wrote it", lambda b: b.load_state_dict(another(b))),
    case("resume of the norms alone, strict=False", LOAD, "load_state_dict wrote it", load_norms, BN),
    case("resume with assign=True", LOAD, "load_state_dict put other tensors in place",
         lambda b: b.load_state_dict(another(b), assign=True)),
    case("resume through _load_from_state_dict", (LOAD, WRITE), "as mmengine does, under load_state_dict",
         as_mmengine),
    case("resume by hand", WRITE, "copy_ in a loop of one's own", partial(by_hand, False)),
    case("resume by hand through .data", WRITE, "copy_ in a loop of one's own", partial(by_hand, True),
         hint=False),
]  # fmt: skip


# -- other tensors under the names -------------------------------------------------------------------------


def other_parameter(b: Any) -> None:
    b.lin.weight = nn.Parameter(b.lin.weight.detach() + 1, requires_grad=False)


def other_statistics(b: Any) -> None:
    b.bn.running_mean = b.bn.running_mean + 1


def other_module(b: Any) -> None:
    b.lin = nn.Linear(4, 4).requires_grad_(False)


def other_body(s: Scene) -> None:
    s.model.body = plain().body


def in_the_dict(b: Any) -> None:
    b.lin._parameters["weight"] = nn.Parameter(torch.randn(4, 4), requires_grad=False)


def fused(b: Any) -> None:
    b.lin = nn.utils.fusion.fuse_linear_bn_eval(b.lin, b.bn)
    b.bn = nn.Identity()


def prune_it(b: Any) -> None:
    prune.l1_unstructured(b.lin, "weight", amount=0.5)


assignments = [
    case("parameter re-assigned", ASSIGNMENT, "another object under the name", other_parameter),
    case("parameter put in the module's dict", ASSIGNMENT, "another object under the name", in_the_dict),
    case("buffer re-assigned", ASSIGNMENT, "another object under the name", other_statistics, BN),
    case("module replaced", ASSIGNMENT, "another module, so another object under the name", other_module),
    Fault("body replaced", lambda: scene(between=other_body), (LIN, BN), ASSIGNMENT,
          "another module under the name"),
    case("norm folded into the layer before", ASSIGNMENT, "another module under the name", fused),
    case("buffer reshaped", ASSIGNMENT, "another object, of another shape",
         lambda b: setattr(b.bn, "running_mean", torch.zeros(3)), "FK105 body.bn.running_mean"),
    case("buffer set to None", ASSIGNMENT, "None under the name",
         lambda b: setattr(b.bn, "running_var", None), "FK105 body.bn.running_var"),
    case("buffer deleted", ASSIGNMENT, "nothing under the name any more",
         lambda b: delattr(b.bn, "running_mean"), "FK105 body.bn.running_mean"),
    case("buffer added", ASSIGNMENT, "something under a name where nothing was",
         lambda b: b.lin.register_buffer("mask", torch.ones(4)), "FK105 body.lin.mask"),
    case("parameter added", ASSIGNMENT, "something under a name where nothing was",
         lambda b: b.lin.register_parameter("gain", nn.Parameter(torch.ones(4))), "FK105 body.lin.gain"),
    case("weight norm put on", ASSIGNMENT, "the parameter left its name",
         lambda b: parametrizations.weight_norm(b.lin), "FK105 body.lin.weight"),
    case("pruned", ASSIGNMENT, "the parameter left its name for another", prune_it, "FK105 body.lin.weight"),
]  # fmt: skip


# -- moves -------------------------------------------------------------------------------------------------


def swapped(b: Any) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        b.half().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


moves = [
    case("to half and back", MOVE, "the casts rounded the values", lambda b: b.half().float()),
    case("statistics to half and back", MOVE, "the casts rounded the values",
         lambda b: b.bn.half().float(), BN),
    case("to half and back, by swapping", MOVE, "the casts rounded the values", swapped),
    case("to bfloat16", MOVE, "the model was cast", lambda b: b.to(torch.bfloat16),
         ("FK105 body.lin.weight", "FK105 body.bn.running_mean")),
    case("to double", MOVE, "the model was cast", lambda b: b.double(), "FK105 body.lin.weight"),
    case("to the meta device", MOVE, "the model was moved where there are no values", lambda b: b.to("meta"),
         "FK103|FK105 body.lin.weight"),
]  # fmt: skip

FAULTS = [*writes, *bits, *loads, *assignments, *moves]
