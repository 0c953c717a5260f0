"""TNT with a distillation token: a second token and a second head, for timm's distillation."""

import copy
from functools import partial

import networks
import pytest
import timm
import torch
from networks import some_images, without_gradient
from timm.task import TokenDistillationTask
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tnt_timm.models.variants import DISTILLED

IMAGES, TARGETS = some_images(32, batch=4), torch.tensor([0, 1, 2, 3])
plain = partial(networks.small, img_size=32, num_classes=4)
small = partial(plain, "tnt_ti_distilled")


@pytest.mark.parametrize("name", DISTILLED)
def test_only_a_token_its_position_and_a_head_are_new(name):
    model, base = (timm.create_model(n, device="meta") for n in (name, name.removesuffix("_distilled")))
    width = model.embed_dim
    assert model.num_prefix_tokens == 2 and base.num_prefix_tokens == 1
    assert model.patch_pos.shape == (1, 2 + 196, width)
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (model, base))
    assert ours - theirs == width + width + 1000 * width + 1000
    new = {n for n, _ in model.named_parameters()} - {n for n, _ in base.named_parameters()}
    assert new == {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert model.get_classifier() == (model.head, model.head_dist)


def test_the_tokens_come_first_and_have_no_words():
    model = small().eval()
    words, tokens = model.embed(IMAGES)
    assert tokens.shape == (4, 2 + 4, 24)
    front = torch.cat([model.cls_token, model.dist_token], dim=1) + model.patch_pos[:, :2]
    assert torch.equal(tokens[:, :2], front.expand(4, -1, -1))
    folded = model.blocks[0].fold(words, tokens)
    assert torch.equal(folded[:, :2], tokens[:, :2])
    assert (folded[:, 2:] != tokens[:, 2:]).any(2).all()


def test_the_distillation_token_is_initialized_like_the_other_tokens():
    token = timm.create_model("tnt_b_distilled", depth=1).dist_token
    assert token.std().item() == pytest.approx(0.02, rel=0.1) and token.abs().max() < 0.1


def test_it_returns_both_heads_during_distillation_and_their_mean_otherwise():
    model = small()
    features = model.forward_features(IMAGES)
    both = model.head(features[:, 0]), model.head_dist(features[:, 1])
    mean = (both[0] + both[1]) / 2
    for training, distilled, expected in ((True, False, mean), (True, True, both), (False, True, mean)):
        model.train(training).set_distilled_training(distilled)
        torch.testing.assert_close(model(IMAGES), expected)
    model.train().set_distilled_training(False)
    torch.testing.assert_close(model(IMAGES), mean)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, :2].mean(1))


def test_both_heads_are_replaced():
    model = small().eval()
    model.reset_classifier(7)
    assert model.head.out_features == model.head_dist.out_features == 7 and model(IMAGES).shape == (4, 7)
    assert not torch.equal(model.head.weight, model.head_dist.weight)
    model.reset_classifier(0)
    assert not {"head.weight", "head_dist.weight"} & model.state_dict().keys()


def test_average_pooling_is_refused():
    for call in (lambda: small(global_pool="avg"), lambda: small().reset_classifier(4, "avg")):
        with pytest.raises(ValueError, match="global_pool 'avg' is none of 'token', ''"):
            call()


@pytest.mark.parametrize("kwargs", [dict(se=True), dict(inner_blocks=(2,)), dict(sentence_start="zeros")], ids=str)
def test_ablations_of_the_distilled_network_train(kwargs):
    model = small(**kwargs)
    model(IMAGES).square().sum().backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_step_of_timms_distillation_with_a_frozen_teacher(kind):
    student, teacher = small(), plain(depth=1, drop_rate=0.5)
    frozen = copy.deepcopy(teacher.state_dict())
    task = TokenDistillationTask(
        student, teacher, criterion=torch.nn.CrossEntropyLoss(), distill_type=kind, temperature=2.0, verbose=False
    ).train()
    result = task(IMAGES, TARGETS)

    to_class, to_teacher = student(IMAGES)
    with torch.no_grad():
        taught = teacher.eval()(IMAGES)
    if kind == "hard":
        distilled = cross_entropy(to_teacher, taught.argmax(1))
    else:
        pair = log_softmax(to_teacher / 2, 1), log_softmax(taught / 2, 1)
        distilled = 4 * kl_div(*pair, reduction="batchmean", log_target=True)
    torch.testing.assert_close(result["loss"], cross_entropy(to_class, TARGETS) + distilled)

    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.01)
    result["loss"].backward()
    assert without_gradient(student) == []
    optimizer.step()
    assert task(IMAGES, TARGETS)["loss"] < result["loss"]
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("weight, learning", [(1.0, "head"), (0.0, "head_dist")])
def test_each_head_learns_from_its_own_teacher(weight, learning):
    student = small()
    task = TokenDistillationTask(student, plain(), criterion=torch.nn.CrossEntropyLoss(), task_loss_weight=weight)
    task(IMAGES, TARGETS)["loss"].backward()
    moved = {name for name in ("head", "head_dist") if student.get_submodule(name).weight.grad.abs().sum() > 0}
    assert moved == {learning}


def test_the_plain_network_cannot_be_the_student():
    with pytest.raises(ValueError, match="does not have 'set_distilled_training' method"):
        TokenDistillationTask(plain(), plain(), criterion=torch.nn.CrossEntropyLoss())
