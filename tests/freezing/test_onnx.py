"""A frozen model leaves torch as it is: through ONNX, run by onnxruntime."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
import zoo

import freezekit

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("convert", [None, "affine", "fold"])
def test_frozen_resnet18(convert: str | None) -> None:
    model = zoo.make("resnet18")
    x = zoo.images("resnet18", batch=2)
    with torch.no_grad():
        expected = model.eval()(x)
    freezekit.freeze_backbone(model.train(), convert=convert)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    kinds = [node.op_type for node in program.model.graph]
    assert kinds.count("Conv") == 20
    if convert == "fold":
        assert "BatchNormalization" not in kinds
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)
