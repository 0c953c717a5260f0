"""The network is the released one: same names, same numbers; and every argument acts."""

import subprocess
import sys

import pytest
import timm
import torch

from tnt_timm.models.tnt import TNT
from tnt_timm.models.variants import DISTILLED, VARIANTS

SMALL = dict(img_size=32, num_classes=5, embed_dim=24, inner_dim=6, depth=3, num_heads_inner=2, num_heads_outer=3)


def small(**kwargs) -> TNT:
    torch.manual_seed(0)
    return timm.create_model("tnt_ti", **{**SMALL, **kwargs})


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
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected, got = reference(images), ours(images)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_equal_timms():
    from timm.models.tnt import TNT as TimmTNT

    torch.manual_seed(2)
    reference, ours = TimmTNT(**SMALL), small()
    ours.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(3, 3, 32, 32)
    for model in (reference, ours):
        model(images).square().sum().backward()
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


@pytest.mark.parametrize(
    "argument",
    [
        dict(mlp_ratio=2.0),
        dict(qkv_bias=True),
        dict(first_stride=2),
        dict(patch_size=8),
        dict(num_heads_inner=1),
        dict(num_heads_outer=1),
        dict(global_pool="avg"),
        dict(se=True),
        dict(depth=2),
        dict(in_chans=1),
    ],
    ids=str,
)
def test_every_argument_has_its_effect(argument):
    chans = argument.get("in_chans", 3)
    images = torch.ones(1, chans, 32, 32)
    plain, changed = small().eval(), small(**argument).eval()
    if changed.state_dict().keys() == plain.state_dict().keys() and all(
        v.shape == plain.state_dict()[k].shape for k, v in changed.state_dict().items()
    ):
        changed.load_state_dict(plain.state_dict())
        assert not torch.equal(changed(images), plain(images))
    else:
        assert changed(images).isfinite().all()


def test_mlp_ratio_reaches_the_inner_mlp():
    assert small(mlp_ratio=2.0).blocks[0].mlp_in.fc1.out_features == 12
    assert small(mlp_ratio=2.0).blocks[0].mlp.fc1.out_features == 48


@pytest.mark.parametrize("rate", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_every_dropout_acts_in_training_only(rate):
    images = torch.randn(2, 3, 32, 32)
    model = small(**{rate: 0.5}).train()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_stochastic_depth_drops_sentences_one_by_one_and_rises_over_the_blocks():
    model = small(drop_path_rate=0.4).train()
    assert [block.drop_path.drop_prob for block in model.blocks] == pytest.approx([0.0, 0.2, 0.4])
    block = model.blocks[2]
    words = torch.randn(400, 16, 6)
    changed = (block.inner(words) - words).abs().flatten(1).amax(1) > 0
    assert 0.75 < changed.float().mean() < 0.93  # a sentence stays as it is only when both residuals drop: 0.4 * 0.4


def test_fused_and_plain_attention_agree():
    model = small().eval()
    images = torch.randn(2, 3, 32, 32)
    fused = model(images)
    for block in model.blocks:
        assert block.attn_out.fused_attn
        block.attn_out.fused_attn = False
    torch.testing.assert_close(model(images), fused)


def test_no_word_sees_across_a_patch_border():
    model = small().eval()
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, :16, :16] += 1.0
    same = (model.pixel_embed(images, model.pixel_pos) == model.pixel_embed(changed, model.pixel_pos)).all(2).all(1)
    assert same.tolist() == [False, True, True, True]


def test_start_of_training():
    model = timm.create_model("tnt_s")
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.patch_pos.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].mlp.fc1.bias.abs().max() == 0
    bound = 1 / (3 * 49) ** 0.5  # PyTorch's start of a convolution
    assert 0.9 * bound < model.pixel_embed.proj.weight.abs().max() <= bound
