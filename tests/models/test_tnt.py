"""The network is the released one: same names, same numbers, same counts."""

import subprocess
import sys
import warnings

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize(
    "name, parameters, gflops",
    [
        ("tnt_ti", 6_076_408, 1.4),
        ("tnt_s", 23_768_584, 5.2),
        ("tnt_b", 65_428_680, 14.1),
        ("tnt_s_se", 24_668_296, 5.2),
    ],
)
def test_parameters_and_flops_are_the_papers(name, parameters, gflops):
    model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.02)  # the paper counts multiply-adds


@pytest.mark.parametrize("name", [*VARIANTS, *DISTILLED])
def test_every_variant_trains(name):
    model = timm.create_model(name, img_size=32, num_classes=4, drop_path_rate=0.1).train()
    model(torch.randn(2, 3, 32, 32)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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


def test_no_weight_decay_on_tokens_positions_norms_and_biases():
    from timm.optim import create_optimizer_v2

    model = small()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups
    free = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {"cls_token", "patch_pos", "pixel_pos", "norm.weight", "blocks.0.mlp.fc1.bias"} <= free
    assert not {"head.weight", "pixel_embed.proj.weight", "blocks.0.attn_in.qk.weight"} & free


def test_layer_decay_sees_the_blocks_in_order():
    from timm.optim import create_optimizer_v2

    model = small()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5).param_groups
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale["pixel_pos"] < scale["blocks.0.proj.weight"] < scale["blocks.1.proj.weight"] < scale["head.weight"]
    assert scale["blocks.1.attn_in.proj.weight"] == scale["blocks.1.mlp.fc1.weight"]


def test_gradient_checkpointing_changes_no_gradient():
    images = torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model = small(drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_heads():
    model = small().eval()
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert features.shape == (2, 5, 24)
    assert model.forward_head(features, pre_logits=True).shape == (2, 24)
    model.reset_classifier(7, "avg")
    assert model(images).shape == (2, 7) and model.get_classifier().out_features == 7
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 5, 24)
    assert small(num_classes=0)(images).shape == (2, 24)


def test_refusals_say_what_is_wrong():
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        small(img_size=30)
    with pytest.raises(ValueError, match="cannot be split into 5 heads"):
        small(num_heads_outer=5)
    with pytest.raises(ValueError, match="global_pool 'max'"):
        small(global_pool="max")
    with pytest.raises(AssertionError, match="image height 48 given to a model built for 32"):
        small()(torch.randn(1, 3, 48, 48))
    with pytest.raises(TypeError, match="dpeth"):
        small(dpeth=3)


def test_rectangular_images_and_devices_at_creation():
    assert small(img_size=(32, 48))(torch.randn(1, 3, 32, 48)).shape == (1, 5)
    model = small(device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert {p.dtype for p in small(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_scripts_and_compiles_without_graph_breaks():
    model = small().eval()
    images = torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(model)(images), model(images))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))
