"""Any state dict survives the trip through a file; damage to one raises nothing but CheckpointError."""

import io

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from freezekit.audit.checkpoint import read_checkpoint
from freezekit.errors import CheckpointError

FORMATS = ("zip", "legacy", "safetensors")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
RELAXED = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)

names = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    tensor = (tensor * 3).to(draw(st.sampled_from(DTYPES)))
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, draw(st.integers(1, tensor.dim() - 1)))
    return tensor


def written(state, form):
    if form == "safetensors":
        return safetensors_bytes({name: tensor.contiguous() for name, tensor in state.items()})
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


@pytest.mark.parametrize("form", FORMATS)
@RELAXED
@given(state=st.dictionaries(names, tensors(), min_size=1, max_size=6))
def test_round_trip(form, state, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(written(state, form))
    # wrappers' prefixes are stripped on purpose; here they would only be chance
    if all(name.startswith("module.") for name in state) or any("_orig_mod" in name for name in state):
        return
    table = read_checkpoint(path)
    assert set(table) == set(state)
    for name, tensor in state.items():
        assert table[name].shape == tuple(tensor.shape)
        assert table[name].dtype == str(tensor.dtype).removeprefix("torch.")
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert table[name].read() == raw


STATE = {
    "state_dict": {
        "conv.weight": torch.nn.Parameter(torch.randn(2, 3, 1, 1)),
        "bn.running_mean": torch.randn(3),
        "bn.num_batches_tracked": torch.tensor(3),
        "view": torch.randn(4, 3).t(),
    },
    "epoch": 3,
    "lr": 0.1,
}
FILES = {
    "zip": written(STATE, "zip"),
    "legacy": written(STATE, "legacy"),
    "safetensors": written(STATE["state_dict"], "safetensors"),
}


@pytest.mark.parametrize("form", FORMATS)
@RELAXED
@given(data=st.data())
def test_damage(form, data, tmp_path):
    raw = bytearray(FILES[form])
    for _ in range(data.draw(st.integers(0, 4))):
        # most of a small file is padding and values; the beginning and the end decide
        where = data.draw(st.one_of(st.integers(0, len(raw) - 1), st.integers(0, min(900, len(raw) - 1))))
        if data.draw(st.booleans()):
            raw[where] = data.draw(st.integers(0, 255))
        else:
            raw[where:where] = data.draw(st.binary(max_size=4))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path / "a"
    path.write_bytes(raw)
    table = or_refusal(lambda: read_checkpoint(path))
    for tensor in table.values() if table else ():
        or_refusal(tensor.read)


def or_refusal(read):
    """Return what is read, or nothing after a CheckpointError in one line; anything else fails the test."""
    refusal = None
    try:
        return read()
    except CheckpointError as error:
        refusal = str(error)
    assert refusal.isprintable()
    return None
