"""The network is the released one, with the same names and numbers, and every argument has its effect."""

import subprocess
import sys
from functools import partial

import networks
import pytest
import timm
import torch
from networks import some_images
from timm.models.tnt import TNT as TimmTNT

from tnt_timm.models.variants import DISTILLED, VARIANTS

SMALL = {**networks.SMALL, "img_size": 32, "depth": 3}
small = partial(networks.small, img_size=32, depth=3)


def test_import_registers_the_variants_and_leaves_timms_alone():
    code = (
        "import warnings; warnings.simplefilter('error'); import timm; before = timm.model_entrypoint('tnt_s_patch16_224');"
        "import tnt_timm; assert timm.model_entrypoint('tnt_s_patch16_224') is before;"
        "print(*timm.list_models('tnt*'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""  # nothing printed or warned at import
    assert {*VARIANTS, *DISTILLED} | {"tnt_s_patch16_224", "tnt_b_patch16_224"} <= set(done.stdout.split())


@pytest.mark.parametrize("name, timms", [("tnt_s", "tnt_s_patch16_224"), ("tnt_b", "tnt_b_patch16_224")])
def test_timms_weights_give_timms_logits(name, timms):
    torch.manual_seed(1)
    reference, ours = timm.create_model(timms).eval(), timm.create_model(name).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    with torch.inference_mode():
        expected, got = reference(some_images(224)), ours(some_images(224))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_equal_timms():
    torch.manual_seed(2)
    reference, ours = TimmTNT(**SMALL), small()
    reference.load_state_dict(ours.state_dict(), strict=True)
    for model in (reference, ours):
        model(some_images(32)).square().sum().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_se_gates_the_outer_mlp_as_released():
    block = small(se=True).blocks[0].eval()
    tokens = torch.randn(2, 5, 24)
    out = block.mlp(block.norm_mlp(tokens + block.attn_out(block.norm_out(tokens))))
    gate = torch.nn.functional.layer_norm(out.mean(1, keepdim=True), (24,), block.se.norm.weight, block.se.norm.bias)
    gate = torch.tanh(block.se.fc2(torch.relu(block.se.fc1(gate))))
    expected = tokens + block.attn_out(block.norm_out(tokens)) + out + out * gate
    torch.testing.assert_close(block.outer(tokens), expected)


ARGUMENTS = [
    *(dict(mlp_ratio=2.0), dict(qkv_bias=True), dict(first_stride=2), dict(patch_size=8), dict(num_heads_inner=1)),
    *(dict(num_heads_outer=1), dict(global_pool="avg"), dict(se=True), dict(depth=2), dict(in_chans=1)),
]


@pytest.mark.parametrize("argument", ARGUMENTS, ids=str)
def test_every_argument_has_its_effect(argument):
    images = torch.ones(1, argument.get("in_chans", 3), 32, 32)
    plain, changed = small().eval(), small(**argument).eval()
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (plain, changed)]
    if shapes[0] == shapes[1]:
        changed.load_state_dict(plain.state_dict())
        assert not torch.equal(changed(images), plain(images))
    else:
        assert changed(images).isfinite().all()


def test_mlp_ratio_reaches_both_mlps():
    block = small(mlp_ratio=2.0).blocks[0]
    assert (block.mlp_in.fc1.out_features, block.mlp.fc1.out_features) == (12, 48)


@pytest.mark.parametrize("rate", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_every_dropout_acts_in_training_only(rate):
    model, images = small(**{rate: 0.5}).train(), some_images(32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_stochastic_depth_drops_each_sentence_by_itself_and_rises_over_the_blocks():
    model = small(drop_path_rate=0.4).train()
    assert [block.drop_path.drop_prob for block in model.blocks] == pytest.approx([0.0, 0.2, 0.4])
    block = model.blocks[2]
    words = torch.randn(400, 16, 6)
    changed = (block.inner(words) - words).abs().flatten(1).amax(1) > 0
    assert 0.75 < changed.float().mean() < 0.93  # a sentence stays unchanged if both residuals are dropped: 0.4 * 0.4


def test_fused_and_plain_attention_agree():
    model, images = small().eval(), some_images(32)
    fused = model(images)
    for block in model.blocks:
        assert block.attn_out.fused_attn
        block.attn_out.fused_attn = False
    torch.testing.assert_close(model(images), fused)


def test_no_word_sees_across_a_patch_border():
    model, images = small().eval(), some_images(32, batch=1)
    changed = images.clone()
    changed[:, :, :16, :16] += 1.0
    same = (model.pixel_embed(images, model.pixel_pos) == model.pixel_embed(changed, model.pixel_pos)).all(2).all(1)
    assert same.tolist() == [False, True, True, True]


def test_initial_weights():
    model = timm.create_model("tnt_s")
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.patch_pos.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].mlp.fc1.bias.abs().max() == 0
    bound = 1 / (3 * 49) ** 0.5  # PyTorch's initialization of a convolution
    assert 0.9 * bound < model.pixel_embed.proj.weight.abs().max() <= bound
