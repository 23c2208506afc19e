"""Every network can be taken away: as its folder, and as ONNX, it says what the node's own says."""

from __future__ import annotations

from pathlib import Path

import learning
import numpy as np
import pytest
from every_method import card_of, plan_for

from hsl_node.train import export
from hsl_node.train.networks.fedppkt import TeacherAndStudent
from hsl_node.train.predictor import of_bundle, of_model
from hsl_node.train.site import initial_model


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        ("fedavg", "efficientnet_lite0"),
        ("hsl", "vit_tiny"),
        ("fedtp", "vit_tiny"),
        ("frozen", "tiny"),
        ("fedktl", "tiny"),
        ("fedppkt", "tiny"),
    ],
)
def test_a_model_that_is_taken_away_says_the_same_also_as_onnx(tmp_path: Path, method: str, backbone: str) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    from onnx.reference import ReferenceEvaluator

    plan = plan_for(method, backbone=backbone)
    site = learning.site(plan)
    model = initial_model(plan, site.method, site.backbone_weights).eval()
    secret = known = b""
    if isinstance(model, TeacherAndStudent):
        model.distils.fill_(1)  # a student is asked: its teacher stays
        secret = model.teacher.trunk.net.layer2.conv1.weight.detach().numpy().tobytes()[:400]
        known = model.student.trunk.net.layer2.conv1.weight.detach().numpy().tobytes()[:400]
    here = of_model(model, card_of(plan), learning.CPU, learning.anchor())
    _, missing = export.export_model(tmp_path / "out", predictor=here, facts={}, onnx=True)
    assert missing == ""
    taken = b"".join(file.read_bytes() for file in (tmp_path / "out").iterdir())
    assert known in taken and not (secret and secret in taken)

    images = learning.dataset().images[:3]
    expected = here(images)
    np.testing.assert_array_equal(of_bundle(tmp_path / "out")(images), expected)
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(graph)
    pixels = np.repeat(images[:, None], 3, axis=1).astype(np.float32) / 255
    (found,) = ReferenceEvaluator(graph).run(None, {"pixels": pixels})
    np.testing.assert_allclose(found, expected[:, 1], atol=1e-4)
