"""The MMoE of HeteroSync Learning: its size, its algebra, its variants, its first values, and what of it is shared."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learning import SIZE, small_plan

from hsl_node.errors import FederationMismatch
from hsl_node.federation.plan import Plan
from hsl_node.train.methods import method_of
from hsl_node.train.networks.initial import initialise
from hsl_node.train.networks.mmoe import Experts, MMoE
from hsl_node.train.state_dict import all_tensors, load_weights, to_weights
from hsl_node.train.tasks.classification import outputs, primary_loss, probabilities
from hsl_node.weights.checkpoint_file import schema_of


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def tiny(**settings: object) -> MMoE:
    model = MMoE(backbone="tiny", experts=3, **settings)  # type: ignore[arg-type]
    initialise(model, 1)
    return model


def test_the_published_form_has_as_many_parameters_as_the_paper_adds_up_to() -> None:
    resnet18_without_classifier = 11_176_512
    encoder = resnet18_without_classifier + 512 * 512 + 512
    expert = (1024 * 62 + 62) + (62 * 32 + 32)
    gate = 1024 * 12 + 12
    skip = 512 * 32 + 32
    tower = (32 * 16 + 16) + (16 * 1 + 1)
    expected = 2 * encoder + 12 * expert + 2 * (gate + skip + tower)

    model = method_of("hsl").network.build(Plan(settings={"preset": "published"}))

    assert sum(p.numel() for p in model.parameters()) == expected == 23_723_650
    checkpoint = schema_of(to_weights(model, method_of("hsl").travels(model)))
    assert 94e6 < checkpoint.file_bytes < 96e6  # the 94 MB of the paper, in float32


def test_a_shared_encoder_halves_the_checkpoint() -> None:
    separate, shared = (method_of("hsl").network.build(Plan(settings={"encoder": e})) for e in ("separate", "shared"))
    count = [sum(p.numel() for p in m.parameters()) for m in (separate, shared)]
    assert count[0] - count[1] == 11_176_512 + 512 * 512 + 512


def test_batched_experts_compute_what_a_loop_over_experts_computes() -> None:
    experts = Experts(5, 1024).eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(7, 1024)

    one_by_one = []
    for e in range(5):
        hidden = F.relu(F.linear(x, experts.weight_in[e], experts.bias_in[e]))
        one_by_one.append(F.linear(hidden, experts.weight_out[e], experts.bias_out[e]))

    torch.testing.assert_close(experts(x), torch.stack(one_by_one, dim=1))


def test_the_forward_pass_is_the_published_formula() -> None:
    model = tiny().eval()
    x_p, x_a = images(4, 1), images(4, 2)

    f_p, f_a = model.encoder_primary(x_p), model.encoder_anchor(x_a)
    joint = torch.exp(torch.cat([f_p, f_a], 1) / 3.0)
    joint = joint / joint.sum(dim=1, keepdim=True)
    expert = model.experts(joint)
    for task, f, logits in (("primary", f_p, 0), ("anchor", f_a, 1)):
        gate = F.softmax(getattr(model, f"gate_{task}").linear(joint), dim=1)
        feature = sum(gate[:, e : e + 1] * expert[:, e] for e in range(3)) + getattr(model, f"skip_{task}")(f)
        tower = getattr(model, f"tower_{task}")
        torch.testing.assert_close(model(x_p, x_a)[logits], tower.out(F.relu(tower.hidden(feature))))


def test_a_primary_prediction_beside_an_embedding_is_that_beside_its_image() -> None:
    model = tiny().eval()
    x_p, x_a = images(4, 1), images(4, 2)
    torch.testing.assert_close(
        model.primary_logits(model.encode_primary(x_p), model.encode_anchor(x_a)), model(x_p, x_a)[0]
    )


@pytest.mark.parametrize("encoder", ["separate", "shared"])
@pytest.mark.parametrize("embedding", ["softmax", "layernorm", "softmax_scaled"])
def test_both_losses_reach_what_they_should_in_every_variant(encoder: str, embedding: str) -> None:
    model = tiny(encoder=encoder, embedding=embedding)
    primary, anchor = model(images(4, 1), images(4, 2))
    assert primary.shape == anchor.shape == (4, 1)
    (primary.sum() + anchor.sum()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A tower whose ReLUs all happen to be closed passes nothing on; with this seed none is.
    assert without == []


def test_the_anchor_loss_reaches_the_primary_encoder_directly_only_when_it_is_shared() -> None:
    for encoder, reached in (("separate", False), ("shared", True)):
        model = tiny(encoder=encoder)
        f_a = model.encode_anchor(images(4, 2))
        model.skip_anchor(f_a).sum().backward()
        trunk = (model.encoder if encoder == "shared" else model.encoder_primary).trunk
        assert (trunk.net.conv1.weight.grad is not None) is reached


@pytest.mark.parametrize("training", [True, False])
def test_a_shared_encoder_takes_the_statistics_of_anchor_images_from_their_batch_and_keeps_none(training: bool) -> None:
    model = tiny(encoder="shared").train(training)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    stronger = model.encode_anchor(images(4, 2) * 3)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert all(m.training is training for m in model.modules())
    # Another contrast of all anchor images is taken out by their own statistics.
    torch.testing.assert_close(stronger, model.encode_anchor(images(4, 2)), rtol=1e-3, atol=1e-3)
    assert model.eval().encode_anchor(images(1, 2)).shape == (1, 512)  # one alone has none


def test_temperature_flattens_the_embedding() -> None:
    f = torch.rand(2, 512, generator=torch.Generator().manual_seed(0)) * 10
    sharp, flat = (MMoE(backbone="tiny", temperature=t).joint(f, f) for t in (1.0, 50.0))
    assert sharp.max() > flat.max()
    torch.testing.assert_close(sharp.sum(dim=1), torch.ones(2))


def test_layernorm_embedding_has_mean_0_and_deviation_1() -> None:
    joint = MMoE(backbone="tiny", embedding="layernorm").joint(torch.rand(3, 512), torch.rand(3, 512))
    torch.testing.assert_close(joint.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(joint.var(1, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)


def test_the_scaled_softmax_is_the_published_one_times_the_number_of_features_less_1() -> None:
    f_p, f_a = torch.rand(3, 512), torch.rand(3, 512)
    published, scaled = (MMoE(backbone="tiny", embedding=e).joint(f_p, f_a) for e in ("softmax", "softmax_scaled"))
    assert torch.equal(scaled, published * 1024 - 1)
    torch.testing.assert_close(scaled.mean(1), torch.zeros(3), atol=1e-5, rtol=0)


def test_a_low_gate_temperature_chooses_among_experts_and_1_is_the_published_gate_to_the_bit() -> None:
    joint, expert = torch.rand(4, 1024), torch.rand(4, 5, 32)
    published, sharp = tiny().gate_primary, tiny(gate_temperature=1e-4).gate_primary
    share = torch.softmax(published.linear(joint), dim=1)
    assert torch.equal(published(joint, expert[:, :3]), torch.einsum("be,beo->bo", share, expert[:, :3]))
    chosen = sharp.linear(joint).argmax(1)
    torch.testing.assert_close(sharp(joint, expert[:, :3]), expert[torch.arange(4), chosen])


def test_more_than_two_classes_give_one_output_each_and_cross_entropy() -> None:
    plan = small_plan(classes=("a", "b", "c"))
    assert outputs(plan) == 3
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    loss = primary_loss(logits, torch.tensor([1, 0]))
    by_hand = (np.log(3) + np.log(np.exp(2) + 2) - 2) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    torch.testing.assert_close(probabilities(logits).sum(1), torch.ones(2))


def test_two_classes_give_one_logit_and_binary_cross_entropy() -> None:
    assert outputs(small_plan()) == 1
    loss = primary_loss(torch.tensor([[0.0], [100.0]]), torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((np.log(2) + 100) / 2)  # no overflow where sigmoid + BCE would give infinity
    assert probabilities(torch.tensor([[0.0]])).tolist() == [0.5]


# ---------------------------------------------------------------- first values


def digest_of(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, array in to_weights(model, all_tensors(model)).items():
        found.update(name.encode() + array.tobytes())
    return found.hexdigest()


def test_first_values_follow_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = digest_of(tiny())
    torch.manual_seed(6)
    torch.rand(3)
    assert digest_of(tiny()) == one
    other = MMoE(backbone="tiny", experts=3)
    initialise(other, 2)
    assert digest_of(other) != one


def test_first_values_have_the_published_distributions() -> None:
    model = MMoE(backbone="resnet18", experts=12)
    initialise(model, 1)
    convolution = model.encoder_primary.trunk.net.layer3[0].conv2.weight  # (256, 256, 3, 3): He-normal, fan-out
    assert convolution.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    expert = model.experts.weight_in  # (12, 62, 1024): Xavier-uniform per expert
    bound = (6 / (1024 + 62)) ** 0.5
    assert expert.abs().max().item() == pytest.approx(bound, rel=0.001) and expert.abs().max() <= bound
    assert expert.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not torch.equal(expert[0], expert[1])


# ---------------------------------------------------------------- what is shared


def test_every_tensor_has_a_fusion_rule_and_leaves_the_hospital() -> None:
    model = tiny()
    found = method_of("hsl").travels(model)
    assert found == set(model.state_dict())
    assert {
        f"encoder_primary.trunk.net.bn1.{name}" for name in ("running_var", "num_batches_tracked")
    } < found  # buffers


def test_a_tensor_without_a_rule_is_refused() -> None:
    model = tiny()
    model.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="mask"):
        all_tensors(model)


def test_weights_return_to_a_model_unchanged() -> None:
    source, target = tiny(), tiny()
    source.encoder_primary.trunk.net.bn1.num_batches_tracked += 7
    initialise(target, 9)
    load_weights(target, to_weights(source, all_tensors(source)), all_tensors(target))
    assert digest_of(target) == digest_of(source)


def test_weights_of_another_model_are_refused_and_nothing_is_loaded() -> None:
    model = tiny()
    before = digest_of(model)
    other = MMoE(backbone="tiny", experts=4)
    initialise(other, 3)
    with pytest.raises(FederationMismatch, match="experts"):
        load_weights(model, to_weights(other, all_tensors(other)), all_tensors(model))
    assert digest_of(model) == before
