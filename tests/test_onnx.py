"""A folded model as ONNX: standard operators only, the same outputs."""

import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from test_fold import network
from truth import normal

import weightalign_cuda as wa


def test_folded_model():
    folded, images = wa.fold(network()).eval(), normal(2, 3, 9, 8)
    program = torch.onnx.export(folded, (images,), dynamo=True)
    assert {node.domain for node in program.model.graph} <= {"", "ai.onnx"}
    (found,) = ReferenceEvaluator(program.model_proto).run(None, {program.model.graph.inputs[0].name: images.numpy()})
    np.testing.assert_allclose(found, folded(images).detach().numpy(), rtol=1e-4, atol=1e-5)
