"""What tools do with the own layers: derivatives, transforms, compilers, tracers, exporters, checkpointing.

Wherever torch's own layer works, the own one must; torch's is the oracle.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from norms import CASES, DEVICES, Case, assert_same, every_case, every_mode, outcome, run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import freezekit

# torch 2.6 warns of its own configuration when it compiles under a log capture, as pytest's is.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning"
    ),
    # torch's own forward-mode derivatives are scripts, and newer torch deprecates those.
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def small(case: Case) -> Tensor:
    """The numeric checks cost the square of the size."""
    return case.data(torch.float64, batch=2)


def pure(layer: Any, names: list[str]) -> Callable[..., Tensor]:
    """The layer as a function of its input and parameters; its statistics are those it has now, each time."""
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True)) | {k: v.clone() for k, v in buffers.items()}
        output: Tensor = functional_call(layer, state, (x,))
        return output

    return function


# --- Derivatives


@every_case
@every_mode
def test_gradcheck_and_gradgradcheck(case: Case, training: bool) -> None:
    mine = case.mine(dtype=torch.float64).train(training)
    function = pure(mine, [name for name, _ in mine.named_parameters()])
    inputs = (small(case).requires_grad_(), *(p.detach().requires_grad_() for p in mine.parameters()))
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@every_case
@every_mode
@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives_equal_torchs(case: Case, training: bool, device: str) -> None:
    seen = []
    x0, direction = case.data(torch.float64, device), case.data(torch.float64, device)
    for layer in case.pair(dtype=torch.float64, device=device):
        x = x0.clone().requires_grad_()
        leaves = [x, *layer.parameters()]
        first = torch.autograd.grad(layer.train(training)(x).sin().sum(), leaves, create_graph=True)
        loss = (first[0] * direction).sum() + sum(g.square().sum() for g in first[1:])
        second = torch.autograd.grad(loss, leaves, allow_unused=True)
        seen.append([torch.zeros(()) if g is None else g for g in second])
    assert_same(*seen, 1e-8)


@every_case
@every_mode
def test_forward_mode(case: Case, training: bool) -> None:
    x, tangent = case.data(torch.float64), case.data(torch.float64)
    seen = []
    for layer in case.pair(dtype=torch.float64):
        with forward_ad.dual_level():
            output = layer.train(training)(forward_ad.make_dual(x, tangent))
            seen.append(forward_ad.unpack_dual(output).tangent)
            for name, buffer in layer.named_buffers():
                assert forward_ad.unpack_dual(buffer).tangent is None, name
        seen.append({name: buffer.clone() for name, buffer in layer.named_buffers()})
    assert_same(seen[0], seen[2], 1e-9)
    assert_same(seen[1], seen[3])


# --- torch.func. Name: (function of the layer, its parameters and an input, whether each mapping holds in
# training with running statistics: no one can update one buffer by each of many samples)


def per_sample(layer: Any, parameters: dict[str, Tensor], x: Tensor) -> Any:
    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sample,)).sin().sum()

    return vmap(grad(loss), in_dims=(None, 0))(parameters, torch.stack([x, x * 2 + 1, x.sin()]))


def ensemble(layer: Any, parameters: dict[str, Tensor], x: Tensor) -> Any:
    stacked = {key: torch.stack([value, value * 2 + 1]) for key, value in parameters.items()}
    return vmap(lambda p, x: functional_call(layer, p, (x,)), in_dims=(0, None))(stacked, x)


TRANSFORMS: dict[str, Callable[[Any, dict[str, Tensor], Tensor], Any]] = {
    "functional_call": lambda layer, p, x: functional_call(layer, {k: v * 2 for k, v in p.items()}, (x,)),
    "grad": lambda layer, p, x: grad(lambda p, x: functional_call(layer, p, (x,)).sin().sum(), (0, 1))(p, x),
    "jvp": lambda layer, p, x: jvp(lambda p, x: functional_call(layer, p, (x,)), (p, x), (p, x.cos())),
    "jacrev": lambda layer, p, x: jacrev(lambda p, x: functional_call(layer, p, (x,)), (0, 1))(p, x),
    "jacfwd": lambda layer, p, x: jacfwd(lambda p, x: functional_call(layer, p, (x,)), (0, 1))(p, x),
    "hessian": lambda layer, p, x: jacfwd(jacrev(lambda x: layer(x).sin().sum()))(x),
    "vmap": lambda layer, p, x: vmap(layer)(torch.stack([x, x * 2 + 1, x.sin()])),
    "vmap, other dimension": lambda layer, p, x: vmap(layer, in_dims=1, out_dims=2)(
        torch.stack([x, x.sin()], 1)
    ),
    "per-sample gradients": per_sample,
    "ensemble": ensemble,
}


@every_case
@every_mode
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform: str, case: Case, training: bool) -> None:
    x = small(case)
    if transform == "ensemble" and not list(case.mine().parameters()):
        pytest.skip("no parameters to stack")
    seen = []
    for layer in case.pair(dtype=torch.float64):
        layer.train(training)
        parameters = {key: value.detach() for key, value in layer.named_parameters()}
        seen.append(outcome(lambda layer=layer, p=parameters: TRANSFORMS[transform](layer, p, x)))
    got, expected = seen
    if expected[0] is None:
        assert got[0] is None, got[1]
        assert_same(got[1], expected[1], 1e-8)
    else:
        # A statistic cannot follow many samples at once, nor be written to inside a transform: torch says
        # so, and so must the own layer, rather than keep a wrong one.
        assert training
        assert case.tracks
        assert expected[0] is RuntimeError
        assert got[0] is RuntimeError


# --- Fake tensors


@every_case
@every_mode
def test_fake_tensors(case: Case, training: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        mine, theirs = (
            getattr(module, case.name)(*case.args, **case.kwargs).train(training)
            for module in (freezekit.nn, nn)
        )
        x = torch.empty(case.shape)
        got, expected = run(mine, x), run(theirs, x)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].fake_mode is mode
        assert (got[key].shape, got[key].stride(), got[key].dtype) == (
            value.shape,
            value.stride(),
            value.dtype,
        )


# --- Compilers


def model_of(layer: Any) -> nn.Sequential:
    return nn.Sequential(nn.Identity(), layer)


@every_case
@pytest.mark.parametrize("device", DEVICES)
def test_compile_and_switch_without_recompiling(case: Case, device: str) -> None:
    model = model_of(case.mine(device=device))
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def round_trip() -> None:
        for training in (True, False):
            x = case.data(device=device)
            got, expected = run(compiled.train(training), x), run(eager.train(training), x)
            got = {key.replace("_orig_mod.", ""): value for key, value in got.items()}
            assert_same(got, expected, 1e-5)
        if "BatchNorm" in case.name and not case.tracks:
            return  # cannot be frozen
        x = case.data(device=device)
        frozen, frozen_eager = freezekit.freeze(model, "1"), freezekit.freeze(eager, "1")
        before = copy.deepcopy(model.state_dict())
        assert_same(compiled.train()(x), eager.train()(x), 1e-5)
        assert_same(model.state_dict(), before, 0)
        frozen.undo()
        frozen_eager.undo()

    round_trip()
    with torch._dynamo.config.patch(error_on_recompile=True):
        round_trip()
        # What this would raise if it had recompiled, so that it is known to be on.
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(case.data(torch.float64, device))


@pytest.mark.parametrize("case", ["bn2", "in2-track", "ln", "gn"])
def test_inductor(case: str) -> None:
    mine = CASES[case].mine()
    eager, x = copy.deepcopy(mine), CASES[case].data()
    got = run(torch.compile(mine, fullgraph=True), x)
    assert_same({key.replace("_orig_mod.", ""): value for key, value in got.items()}, run(eager, x), 1e-4)


@every_case
@every_mode
def test_export(case: Case, training: bool) -> None:
    mine, x = case.mine().train(training), case.data()
    expected_layer = copy.deepcopy(mine)
    program = torch.export.export(model_of(mine), (x,))
    exported = program.module()
    for _ in range(2):
        y = case.data()
        assert_same(exported(y), expected_layer(y), 1e-5)
    state = {key.removeprefix("1."): value for key, value in exported.state_dict().items()}
    expected = dict(expected_layer.state_dict())
    assert expected.keys() - state.keys() <= {"num_batches_tracked"}  # torch 2.6 drops what is not used
    assert_same(state, {key: expected[key] for key in state}, 1e-5)


@every_case
def test_export_with_a_dynamic_batch(case: Case) -> None:
    mine = case.mine().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model_of(mine), (case.data(),), dynamic_shapes=[{0: batch}])
    x = case.data(batch=7)
    assert_same(program.module()(x), mine(x), 1e-5)


# --- Tracers


@every_case
@every_mode
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(case: Case, training: bool) -> None:
    mine, theirs = (layer.train(training) for layer in case.pair())
    before = copy.deepcopy(mine.state_dict())
    traced = torch.jit.trace(mine, case.data(), check_trace=False)
    mine.load_state_dict(before)
    x = case.data()
    assert_same(traced(x), theirs(x), 1e-5)
    assert_same(dict(mine.named_buffers()), dict(theirs.named_buffers()), 1e-5)  # also in training


@every_case
def test_symbolic_trace(case: Case) -> None:
    mine, theirs = case.pair(dtype=torch.float64)
    graph = torch.fx.symbolic_trace(model_of(mine))
    expected = torch.fx.symbolic_trace(model_of(theirs))
    assert [node.op for node in expected.graph.nodes].count("call_module") == 2  # what one node a layer means
    assert [node.op for node in graph.graph.nodes].count("call_function") == 1
    for twin in (graph, copy.deepcopy(graph)):
        twin.load_state_dict(expected.state_dict())
        reference = copy.deepcopy(expected)
        for training in (True, False):  # the graph follows the mode, as it does with torch's layers
            x = case.data(torch.float64)
            assert_same(run(twin.train(training), x), run(reference.train(training), x))


@every_case
def test_symbolic_trace_of_the_frozen_layer(case: Case) -> None:
    model = model_of(case.mine(dtype=torch.float64)).eval()
    x = case.data(torch.float64)
    expected = model(x)
    if "BatchNorm" in case.name and not case.tracks:
        return_code = outcome(lambda: freezekit.freeze(model, "1"))
        assert return_code[0] is not None  # its output depends on the batch: nothing can freeze it
        return
    freezekit.freeze(model, "1")
    graph = torch.fx.symbolic_trace(model.train())
    before = copy.deepcopy(graph.state_dict())
    assert torch.equal(graph.train()(x), expected)
    assert_same(graph.state_dict(), before, 0)


# --- Training


@every_case
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(case: Case, use_reentrant: bool) -> None:
    mine, theirs = case.pair(dtype=torch.float64)
    x0, once = case.data(torch.float64), copy.deepcopy(theirs)
    once(x0)
    seen = []
    for layer in (mine, theirs):
        x = x0.clone().requires_grad_()
        output = checkpoint(model_of(layer), x, use_reentrant=use_reentrant)
        output.sin().sum().backward()
        seen.append([output.detach(), x.grad, *(p.grad for p in layer.parameters())])
    assert_same(*seen)
    for name, buffer in mine.named_buffers():
        twice = theirs.get_buffer(name)
        # Recomputing may stop before the statistics are updated a second time, which is only better.
        nearer = min((once.get_buffer(name), twice), key=lambda other: float((other - buffer).abs().max()))
        assert_same(buffer, twice if use_reentrant else nearer)


@every_case
@every_mode
def test_frozen_in_a_model_that_trains(case: Case, training: bool) -> None:
    if "BatchNorm" in case.name and not case.tracks:
        pytest.skip("cannot be frozen: its output depends on the batch")
    model = nn.Sequential(case.mine(), nn.Identity()).eval()
    x = case.data()
    expected = model(x)
    freezekit.freeze(model, "0")
    before = copy.deepcopy(model.state_dict())
    leaf = x.clone().requires_grad_()
    output = model.train(training)(leaf)
    assert torch.equal(output, expected)
    output.sin().sum().backward()
    assert leaf.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same(model.state_dict(), before, 0)
    assert_same(pickle_round_trip(model)(x), expected, 0)


def pickle_round_trip(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


# --- ONNX


@pytest.mark.parametrize("case", ["bn2", "in2-track", "in2", "ln", "gn"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "eval"])
def test_onnx(case: str, frozen: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages themselves
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        x = CASES[case].data()
        model = nn.Sequential(
            nn.Conv2d(4, 4, 1) if x.dim() == 4 else nn.Linear(5, 5), CASES[case].mine()
        ).eval()
        expected = model(x).detach()
        if frozen:
            freezekit.freeze(model, "*")
            model.train()
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same(torch.from_numpy(got), expected, 1e-4)
