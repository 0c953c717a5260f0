"""What timm asks of every model it lists, for every name: restated from the tests of timm itself, each with a number.

Names differ in width, and in being one of four kinds of network. What depends on the width is tested with the registered
networks on small images; the rest with slim ones.
"""

import copy
import itertools
import math
import pickle

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from tnt_timm.models import TNT, DistilledTNT
from tnt_timm.models.variants import DISTILLED, VARIANTS
from tnt_timm.ops import inner_transformer

NAMES = [*VARIANTS, *DISTILLED]
KINDS = ["tnt_ti", "tnt_ti_se", "tnt_s_sparse4", "tnt_ti_distilled"]
GRID = (2, 3)
SLIM = dict(img_size=(32, 48), num_classes=5, embed_dim=24, inner_dim=6, num_heads_inner=2, num_heads_outer=3)


def slim(name, depth=3, **kwargs):
    torch.manual_seed(0)
    if "sparse" in name:
        kwargs.setdefault("inner_blocks", (1, 3)[: depth - 1])
    return timm.create_model(name, **{**SLIM, "depth": depth, **kwargs})


def some_images(batch=2, chans=3, size=(32, 48), dtype=torch.float32):
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(model, images):
    with torch.no_grad():
        return model(images)


@pytest.fixture(scope="module", params=NAMES)
def registered(request):
    """A registered network for 64x64 images and 42 classes; it is shared, so leave it as it is."""
    torch.manual_seed(0)
    return request.param, timm.create_model(request.param, img_size=64, num_classes=42)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# ------------------------------------------------------------------------------------------ the registered networks


def test_a_step_gives_every_parameter_a_gradient(registered):
    _, model = registered
    logits = model.train()(some_images(size=(64, 64)))
    assert logits.shape == (2, 42) and logits.isfinite().all()
    logits.logsumexp(1).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not 0 < p.grad.abs().sum() < math.inf]
    model.zero_grad(set_to_none=True)
    assert without == []


def test_the_config_describes_the_network(registered):
    name, model = registered
    cfg = model.default_cfg
    assert cfg is model.pretrained_cfg and cfg["architecture"] == name
    size = 384 if name.endswith("384") else 224
    assert cfg["input_size"] == (3, size, size) and cfg["fixed_input_size"]
    assert (cfg["num_classes"], cfg["crop_pct"], cfg["interpolation"]) == (1000, 0.9, "bicubic")
    assert cfg["mean"] == cfg["std"] == (0.5, 0.5, 0.5)
    assert cfg["license"] == "apache-2.0" and cfg["paper_ids"] == "arXiv:2103.00112"

    conv = model.get_submodule(cfg["first_conv"])
    assert isinstance(conv, nn.Conv2d) and conv.in_channels == 3
    heads = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert len(heads) == model.num_prefix_tokens
    assert all(model.get_submodule(head).out_features == 42 for head in heads)
    linears = {n for n, module in model.named_modules() if isinstance(module, nn.Linear) and module.out_features == 42}
    assert linears == set(heads)


def test_the_features_are_as_wide_as_the_network_says(registered):
    name, model = registered
    width = (VARIANTS | DISTILLED)[name]["embed_dim"]
    assert model.num_features == model.head_hidden_size == model.embed_dim == width
    with torch.no_grad():
        features = model.eval().forward_features(some_images(size=(64, 64)))
        assert features.shape == (2, model.num_prefix_tokens + 16, width)
        assert model.forward_head(features, pre_logits=True).shape == (2, width)
    assert [info["num_chs"] for info in model.feature_info] == [width] * 12
    assert [info["reduction"] for info in model.feature_info] == [16] * 12
    assert [model.get_submodule(info["module"]) for info in model.feature_info] == list(model.blocks)


def test_layer_decay_goes_through_the_blocks_in_order(registered):
    _, model = registered
    groups = create_optimizer_v2(model, opt="sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    found = {name: -math.log2(scale[id(p)]) for name, p in model.named_parameters()}
    for name, steps in found.items():
        part, *rest = name.split(".")
        behind = 12 - int(rest[0]) if part == "blocks" else dict(head=0, head_dist=0, norm=1).get(part, 13)
        assert steps == behind, name


def test_no_decay_for_tokens_positions_and_what_has_one_dimension(registered):
    _, model = registered
    tokens = {name for name, p in model.named_parameters() if name.endswith(("_token", "_pos"))}
    assert len(tokens) == 2 + model.num_prefix_tokens
    assert tokens == model.no_weight_decay() & {name for name, _ in model.named_parameters()}
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in free} == tokens | {
        n for n, p in model.named_parameters() if p.ndim == 1
    }


def test_a_name_makes_the_network_of_its_name(registered):
    name, model = registered
    assert type(model) is (DistilledTNT if name in DISTILLED else TNT)
    assert timm.model_entrypoint(name).__name__ == name
    assert name in timm.list_models("tnt*", module="variants")
    blocks = {i for i, block in enumerate(model.blocks, start=1) if block.has_inner}
    assert blocks == ({1, 4, 8, 12} if name == "tnt_s_sparse4" else set(range(1, 13)))
    assert all((block.se is not None) == name.endswith("_se") for block in model.blocks)


def test_the_names_with_published_weights():
    names = {n.removesuffix(".in1k") for n in timm.list_models("tnt*", module="variants", pretrained=True)}
    assert names == {"tnt_s", "tnt_b", "tnt_s_384", "tnt_b_384"}


def test_slim_networks_are_of_the_four_kinds(name):
    def shapes(model):
        return {key: value.shape for key, value in model.state_dict().items()}

    assert shapes(slim(name)) in [shapes(slim(kind)) for kind in KINDS]


# --------------------------------------------------------------------------------------------------------------- heads


def test_no_classes_give_the_pooled_features(name):
    model = slim(name).eval()
    pooled = run(lambda x: model.forward_head(model.forward_features(x), pre_logits=True), some_images())
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(run(model, some_images()), pooled)
    headless = slim(name, num_classes=0).eval()
    missing, unexpected = headless.load_state_dict(model.state_dict())
    assert torch.equal(run(headless, some_images()), pooled)


def test_no_pooling_gives_all_tokens(name):
    model = slim(name).eval()
    features = run(model.forward_features, some_images())
    model.reset_classifier(0, "")
    assert torch.equal(run(model, some_images()), features)
    bare = slim(name, num_classes=0, global_pool="").eval()
    bare.load_state_dict(model.state_dict())
    assert torch.equal(run(bare, some_images()), features)


def test_logits_are_the_head_of_the_pooled_tokens(name):
    model = slim(name).eval()
    features, logits = run(model.forward_features, some_images()), run(model, some_images())
    expected = model.head(features[:, 0])
    if name in DISTILLED:
        expected = (expected + model.head_dist(features[:, 1])) / 2
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_average_pooling_leaves_the_class_token_out(name):
    model = slim(name, global_pool="avg").eval()
    features = run(model.forward_features, some_images())
    torch.testing.assert_close(run(model, some_images()), model.head(features[:, 1:].mean(1)))


def test_a_new_head_has_the_place_precision_and_mode_of_the_model(name):
    model = slim(name, dtype=torch.bfloat16).eval()
    model.reset_classifier(9)
    heads = model.get_classifier() if name in DISTILLED else (model.get_classifier(),)
    assert [(h.out_features, h.weight.dtype, h.training) for h in heads] == [(9, torch.bfloat16, False)] * len(heads)
    assert run(model, some_images(dtype=torch.bfloat16)).shape == (2, 9)
    meta = slim(name, device="meta")
    meta.reset_classifier(9)
    assert all(p.is_meta for p in meta.parameters())


# ------------------------------------------------------------------------------------------------------ feature maps


def tokens_after_blocks(model, images):
    """What leaves each block, and the final features, as the modules themselves see them."""
    after = []
    hooks = [block.register_forward_hook(lambda _, __, out: after.append(out[1])) for block in model.blocks]
    final = run(model.forward_features, images)
    for hook in hooks:
        hook.remove()
    return after, final


FLAGS = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only", "output_dict")


@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
def test_intermediates_are_what_leaves_the_blocks(kind, fmt):
    model, images = slim(kind).eval(), some_images()
    after, final = tokens_after_blocks(model, images)
    prefixes = model.num_prefix_tokens
    calls = []
    model.blocks[2].register_forward_hook(lambda *_: calls.append(1))

    choices = {None: [0, 1, 2], 1: [2], 2: [1, 2], (0,): [0], (0, 2): [0, 2], (-2,): [1]}
    for (indices, taken), flags in itertools.product(choices.items(), itertools.product((False, True), repeat=5)):
        options = dict(zip(FLAGS, flags))
        calls.clear()
        with torch.no_grad():
            indices = list(indices) if isinstance(indices, tuple) else indices
            found = model.forward_intermediates(images, indices, output_fmt=fmt, **options)
        early = options["stop_early"] and taken[-1] < 2
        assert len(calls) == (0 if early else 1)
        tokens = [model.norm(after[i]) if options["norm"] else after[i] for i in taken]
        maps = [one[:, prefixes:] for one in tokens]
        if fmt == "NCHW":
            maps = [one.unflatten(1, GRID).movedim(-1, 1) for one in maps]
        fronts = [one[:, :prefixes] for one in tokens]
        last = model.norm(after[taken[-1]]) if early else final

        if options["output_dict"]:
            expected = {"image_intermediates": maps}
            if options["return_prefix_tokens"]:
                expected["image_intermediates_prefix"] = fronts
            if not options["intermediates_only"]:
                expected["image_features"] = last
        else:
            expected = list(zip(maps, fronts)) if options["return_prefix_tokens"] else maps
            if not options["intermediates_only"]:
                expected = (last, expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_intermediates_of_a_wrong_block_or_format_are_refused():
    model = slim("tnt_ti")
    with pytest.raises(ValueError, match="output_fmt 'NHWC' is none of 'NCHW', 'NLC'"):
        model.forward_intermediates(some_images(), output_fmt="NHWC")
    with pytest.raises(AssertionError):
        model.forward_intermediates(some_images(), indices=[3])


def test_intermediates_under_gradient_checkpointing(name):
    model, images = slim(name).train(), some_images()
    plain = model.forward_intermediates(images)
    model.set_grad_checkpointing()
    saving = model.forward_intermediates(images)
    torch.testing.assert_close(saving, plain, rtol=0, atol=0)
    saving[1][0].sum().backward()
    assert model.pixel_embed.proj.weight.grad.abs().sum() > 0


def test_intermediate_layers_by_dinos_name(name):
    model, images = slim(name).eval(), some_images()
    after, _ = tokens_after_blocks(model, images)
    prefixes = model.num_prefix_tokens
    for n, taken in ((1, [2]), (3, [0, 1, 2]), ([0, 1], [0, 1]), ((2,), [2])):
        with torch.no_grad():
            flat = model.get_intermediate_layers(images, n)
            mapped = model.get_intermediate_layers(images, n, reshape=True, return_prefix_tokens=True, norm=True)
        assert len(flat) == len(mapped) == len(taken)
        for i, tokens, (feature, front) in zip(taken, flat, mapped):
            assert torch.equal(tokens, after[i][:, prefixes:])
            normed = model.norm(after[i])
            assert torch.equal(feature, normed[:, prefixes:].unflatten(1, GRID).movedim(-1, 1))
            assert torch.equal(front, normed[:, :prefixes])


def test_pruning_leaves_the_blocks_up_to_the_last_chosen(name):
    images = some_images()
    after, _ = tokens_after_blocks(slim(name).eval(), images)

    model = slim(name).eval()
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.blocks) == 2 and model.num_classes == 0 and model.global_pool == ""
    assert torch.equal(run(model, images), model.norm(after[1]))

    model = slim(name).eval()
    model.prune_intermediate_layers([0], prune_norm=True)
    assert torch.equal(run(model, images), after[0])

    model = slim(name).eval()
    logits = run(model, images)
    assert model.prune_intermediate_layers(1, prune_head=False) == [2]
    assert torch.equal(run(model, images), logits)


def test_features_only(name):
    whole = slim(name).eval()
    after, _ = tokens_after_blocks(whole, some_images())
    maps = [tokens[:, whole.num_prefix_tokens :].unflatten(1, GRID).movedim(-1, 1) for tokens in after]
    for kwargs, taken in (({}, [0, 1, 2]), (dict(out_indices=(0, 2)), [0, 2]), (dict(out_indices=1), [2])):
        backbone = slim(name, features_only=True, **kwargs).eval()
        assert backbone.feature_info.channels() == [24] * len(taken)
        assert backbone.feature_info.reduction() == [16] * len(taken)
        assert backbone.feature_info.module_name() == [f"blocks.{i}" for i in taken]
        torch.testing.assert_close(run(backbone, some_images()), [maps[i] for i in taken], rtol=0, atol=0)


def test_features_only_of_the_registered_widths():
    maps = timm.create_model("tnt_b", img_size=32, features_only=True, device="meta")
    assert maps.feature_info.channels() == [640] * 3
    assert [tuple(one.shape) for one in maps(torch.empty(1, 3, 32, 32, device="meta"))] == [(1, 640, 2, 2)] * 3


# --------------------------------------------------------------------------------------------------- ways to make one


def test_gradient_checkpointing_gives_the_same_gradients(name):
    grads = []
    for enable in (False, True):
        model = slim(name, drop_path_rate=0.3, drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(some_images()).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_a_model_is_made_where_and_in_what_precision_one_asks(name):
    assert {p.device.type for p in slim(name, device="meta").parameters()} == {"meta"}
    assert {p.device.type for p in slim(name, device="cpu").parameters()} == {"cpu"}
    single, half = slim(name).eval(), slim(name, device="cpu", dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.load_state_dict(single.state_dict())
    got = run(half, some_images(dtype=torch.bfloat16))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), run(single, some_images()), rtol=0.05, atol=0.02)


def test_automatic_mixed_precision(name):
    model = slim(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(some_images())
    torch.testing.assert_close(logits.float(), model(some_images()), rtol=0.05, atol=0.02)
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("chans", [1, 4])
def test_images_of_any_number_of_channels(name, chans):
    model = slim(name, in_chans=chans).eval()
    images = some_images(chans=chans)
    logits = run(model, images)
    assert logits.shape == (2, 5) and model.in_chans == model.pixel_embed.proj.in_channels == chans
    for i in range(chans):
        changed = images.clone()
        changed[:, i] += 1
        assert not torch.equal(run(model, changed), logits)


def test_channels_last_changes_nothing(name):
    model, images = slim(name).eval(), some_images()
    logits = run(model, images)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(run(model, images.to(memory_format=torch.channels_last)), logits)


# -------------------------------------------------------------------------------------- copies, traces and compilers


def test_copies_are_equal_and_independent(name):
    model = slim(name).eval()
    logits = run(model, some_images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and twin.pretrained_cfg == model.pretrained_cfg
        assert torch.equal(run(twin, some_images()), logits)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert not torch.equal(run(twin, some_images()), logits)
    assert torch.equal(run(model, some_images()), logits)


def test_the_moving_average_follows_every_parameter(name):
    model = slim(name)
    before = copy.deepcopy(model.state_dict())
    ema = ModelEmaV3(model, decay=0.75)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update(model)
    for key, average in ema.module.state_dict().items():
        torch.testing.assert_close(average, before[key] + 0.25)
    assert run(ema.eval(), some_images()).isfinite().all()


def traced(model):
    """The model as torch.fx sees it, traced as timm's tests do."""
    options = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=options)
    return create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=options
    )


def gradients(model, forward):
    forward(some_images()).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_fx_gives_the_same_logits_and_gradients(kind):
    graph = traced(slim(kind))
    inner_calls = [node for node in graph.eval().graph.nodes if node.target is inner_transformer]
    assert len(inner_calls) == sum(block.has_inner for block in slim(kind).blocks)
    for copied in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        (logits,) = run(copied.eval(), some_images()).values()
        assert torch.equal(logits, run(slim(kind).eval(), some_images()))  # the same operator, as timm's tests want it
    found = gradients(graph.train(), lambda x: next(iter(graph(x).values())))
    twin = slim(kind)
    torch.testing.assert_close(found, gradients(twin, twin.train()))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_gives_the_same_logits(kind):
    model = slim(kind, depth=2, scriptable=True).eval()
    logits = run(model, some_images())
    torch.testing.assert_close(run(torch.jit.script(model), some_images()), logits)
    (of_graph,) = run(torch.jit.script(traced(model).eval()), some_images()).values()
    torch.testing.assert_close(of_graph, logits)


def test_compiles_as_one_graph_with_the_same_gradients(kind):
    torch._dynamo.reset()
    model, twin = slim(kind, depth=2), slim(kind, depth=2)
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, compiled), gradients(twin, twin.train()))


def test_exports_for_batches_of_any_size(kind):
    model = slim(kind, depth=2, exportable=True).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (some_images(),), dynamic_shapes=({0: batch},))
    for count in (1, 2, 5):
        torch.testing.assert_close(run(program.module(), some_images(count)), run(model, some_images(count)))
