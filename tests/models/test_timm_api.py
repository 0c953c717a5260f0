"""What timm requires of every model it lists, after timm's own tests, with a number for each behaviour.

The names differ in width, and each is one of four kinds of TNT or a PyramidTNT. What depends on the width is tested with the
registered networks on small images, the rest with slim networks of each kind. test_pyramid.py has what is a pyramid's own.
"""

import copy
import itertools
import math
import pickle
from functools import partial

import networks
import pytest
import timm
import torch
from networks import run, without_gradient
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
PYRAMID = "pyramid_tnt_ti"
GRID = (2, 3)
some_images = partial(networks.some_images, (32, 48))


def slim(name, depth=3, **kwargs):
    if name == PYRAMID:
        return networks.small(name, **{"img_size": (32, 48), "num_classes": 5, **kwargs})
    if "sparse" in name:
        kwargs.setdefault("inner_blocks", (1, 3)[: depth - 1])
    return networks.small(name, **{"img_size": (32, 48), "num_classes": 5, "depth": depth, **kwargs})


@pytest.fixture(scope="module", params=NAMES)
def registered(request):
    """A registered network for 64x64 images and 42 classes. Tests share it, so leave it as it is."""
    torch.manual_seed(0)
    return request.param, timm.create_model(request.param, img_size=64, num_classes=42)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=[*KINDS, PYRAMID])
def any_kind(request):
    return request.param


# ------------------------------------------------------------------------------------------ the registered networks


def test_a_step_gives_every_parameter_a_gradient(registered):
    _, model = registered
    logits = model.train()(networks.some_images())
    assert logits.shape == (2, 42) and logits.isfinite().all()
    logits.logsumexp(1).sum().backward()
    without = without_gradient(model)
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
    features = run(model.eval().forward_features, networks.some_images())
    assert features.shape == (2, model.num_prefix_tokens + 16, width)
    assert model.forward_head(features, pre_logits=True).shape == (2, width)
    assert [info["num_chs"] for info in model.feature_info] == [width] * 12
    assert [info["reduction"] for info in model.feature_info] == [16] * 12
    assert [model.get_submodule(info["module"]) for info in model.feature_info] == list(model.blocks)


def test_layer_decay_goes_through_the_blocks_in_order(registered):
    _, model = registered
    groups = create_optimizer_v2(model, opt="sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        part, *rest = name.split(".")
        layers_above = 12 - int(rest[0]) if part == "blocks" else dict(head=0, head_dist=0, norm=1).get(part, 13)
        assert -math.log2(scale[id(parameter)]) == layers_above, name


def test_no_weight_decay_for_tokens_positions_and_parameters_of_one_dimension(registered):
    _, model = registered
    tokens = {name for name, p in model.named_parameters() if name.endswith(("_token", "_pos"))}
    assert len(tokens) == 2 + model.num_prefix_tokens
    assert tokens == model.no_weight_decay() & {name for name, _ in model.named_parameters()}
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    one_dimension = {n for n, p in model.named_parameters() if p.ndim == 1}
    assert {n for n, p in model.named_parameters() if id(p) in free} == tokens | one_dimension


def test_a_name_creates_its_network(registered):
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


def test_slim_networks_are_of_the_four_kinds():
    def shapes(name):
        return {key: value.shape for key, value in slim(name).state_dict().items()}

    assert all(shapes(name) in [shapes(kind) for kind in KINDS] for name in NAMES)


# --------------------------------------------------------------------------------------------------------------- heads


def test_without_classes_the_output_is_the_pooled_features(kind):
    model = slim(kind).eval()
    pooled = run(lambda x: model.forward_head(model.forward_features(x), pre_logits=True), some_images())
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(run(model, some_images()), pooled)
    headless = slim(kind, num_classes=0).eval()
    headless.load_state_dict(model.state_dict())
    assert torch.equal(run(headless, some_images()), pooled)


def test_without_pooling_the_output_is_all_tokens(kind):
    model = slim(kind).eval()
    features = run(model.forward_features, some_images())
    model.reset_classifier(0, "")
    assert torch.equal(run(model, some_images()), features)
    bare = slim(kind, num_classes=0, global_pool="").eval()
    bare.load_state_dict(model.state_dict())
    assert torch.equal(run(bare, some_images()), features)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_logits_are_the_head_of_the_pooled_tokens(kind, pool):
    if kind in DISTILLED and pool == "avg":
        pytest.skip("refused; see test_distilled.py")
    model = slim(kind, global_pool=pool).eval()
    features, logits = run(model.forward_features, some_images()), run(model, some_images())
    expected = model.head(features[:, 0] if pool == "token" else features[:, 1:].mean(1))
    if kind in DISTILLED:
        expected = (expected + model.head_dist(features[:, 1])) / 2
    torch.testing.assert_close(logits, expected)


def test_a_new_head_has_the_device_precision_and_mode_of_the_model(kind):
    model = slim(kind, dtype=torch.bfloat16).eval()
    model.reset_classifier(9)
    heads = model.get_classifier() if kind in DISTILLED else (model.get_classifier(),)
    assert [(h.out_features, h.weight.dtype, h.training) for h in heads] == [(9, torch.bfloat16, False)] * len(heads)
    assert run(model, some_images(dtype=torch.bfloat16)).shape == (2, 9)
    meta = slim(kind, device="meta")
    meta.reset_classifier(9)
    assert all(p.is_meta for p in meta.parameters())


# ------------------------------------------------------------------------------------------------------ feature maps


def tokens_after_blocks(model, images):
    """Return what leaves each block, as the modules see it, and the final features."""
    after = []
    hooks = [block.register_forward_hook(lambda _, __, out: after.append(out[1])) for block in model.blocks]
    final = run(model.forward_features, images)
    for hook in hooks:
        hook.remove()
    return after, final


def as_map(tokens):
    return tokens.unflatten(1, GRID).movedim(-1, 1)


FLAGS = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only")


@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
def test_intermediates_are_what_leaves_the_blocks(kind, fmt):
    model, images = slim(kind).eval(), some_images()
    after, final = tokens_after_blocks(model, images)
    prefixes = model.num_prefix_tokens
    calls = []
    model.blocks[2].register_forward_hook(lambda *_: calls.append(1))

    choices = {None: [0, 1, 2], 1: [2], 2: [1, 2], (0,): [0], (0, 2): [0, 2], (-2,): [1]}
    for (indices, taken), flags in itertools.product(choices.items(), itertools.product((False, True), repeat=4)):
        options = dict(zip(FLAGS, flags))
        indices = list(indices) if isinstance(indices, tuple) else indices
        calls.clear()
        found = run(partial(model.forward_intermediates, indices=indices, output_fmt=fmt, **options), images)
        early = options["stop_early"] and taken[-1] < 2
        assert len(calls) == (0 if early else 1)
        tokens = [model.norm(after[i]) if options["norm"] else after[i] for i in taken]
        expected = [one[:, prefixes:] if fmt == "NLC" else as_map(one[:, prefixes:]) for one in tokens]
        if options["return_prefix_tokens"]:
            expected = list(zip(expected, [one[:, :prefixes] for one in tokens]))
        if not options["intermediates_only"]:
            expected = (model.norm(after[taken[-1]]) if early else final, expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_intermediates_of_a_wrong_block_or_format_are_refused():
    model = slim("tnt_ti")
    with pytest.raises(ValueError, match="output_fmt 'NHWC' is none of 'NCHW', 'NLC'"):
        model.forward_intermediates(some_images(), output_fmt="NHWC")
    with pytest.raises(AssertionError):
        model.forward_intermediates(some_images(), indices=[3])


def test_intermediates_under_gradient_checkpointing(kind):
    model, images = slim(kind).train(), some_images()
    plain = model.forward_intermediates(images)
    model.set_grad_checkpointing()
    saving = model.forward_intermediates(images)
    torch.testing.assert_close(saving, plain, rtol=0, atol=0)
    saving[1][0].sum().backward()
    assert model.pixel_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("n, taken", [(1, [2]), (3, [0, 1, 2]), ([0, 1], [0, 1]), ((2,), [2])], ids=str)
def test_intermediate_layers_by_dinos_name(kind, n, taken):
    model, images = slim(kind).eval(), some_images()
    after, _ = tokens_after_blocks(model, images)
    prefixes = model.num_prefix_tokens
    flat = run(partial(model.get_intermediate_layers, n=n), images)
    options = dict(n=n, reshape=True, return_prefix_tokens=True, norm=True)
    mapped = run(partial(model.get_intermediate_layers, **options), images)
    expected = [(as_map(model.norm(after[i])[:, prefixes:]), model.norm(after[i])[:, :prefixes]) for i in taken]
    torch.testing.assert_close(flat, [after[i][:, prefixes:] for i in taken], rtol=0, atol=0)
    torch.testing.assert_close(mapped, expected, rtol=0, atol=0)


def test_pruning_leaves_the_blocks_up_to_the_last_chosen(kind):
    whole, images = slim(kind).eval(), some_images()
    after, _ = tokens_after_blocks(whole, images)
    cases = [
        (dict(indices=[0, 1]), [0, 1], whole.norm(after[1])),
        (dict(indices=[0], prune_norm=True), [0], after[0]),
        (dict(indices=1, prune_head=False), [2], run(whole, images)),
    ]
    for kwargs, kept, expected in cases:
        model = slim(kind).eval()
        assert model.prune_intermediate_layers(**kwargs) == kept and len(model.blocks) == kept[-1] + 1
        assert torch.equal(run(model, images), expected)
        assert (model.num_classes, model.global_pool) == ((0, "") if kwargs.get("prune_head", True) else (5, "token"))


def test_features_only(kind):
    whole = slim(kind).eval()
    after, _ = tokens_after_blocks(whole, some_images())
    for kwargs, taken in (({}, [0, 1, 2]), (dict(out_indices=(0, 2)), [0, 2]), (dict(out_indices=1), [2])):
        backbone = slim(kind, features_only=True, **kwargs).eval()
        assert backbone.feature_info.channels() == [24] * len(taken)
        assert backbone.feature_info.reduction() == [16] * len(taken)
        assert backbone.feature_info.module_name() == [f"blocks.{i}" for i in taken]
        expected = [as_map(after[i][:, whole.num_prefix_tokens :]) for i in taken]
        torch.testing.assert_close(run(backbone, some_images()), expected, rtol=0, atol=0)


def test_features_only_of_the_registered_widths():
    maps = timm.create_model("tnt_b", img_size=32, features_only=True, device="meta")
    assert maps.feature_info.channels() == [640] * 3
    assert [tuple(one.shape) for one in maps(torch.empty(1, 3, 32, 32, device="meta"))] == [(1, 640, 2, 2)] * 3


# ------------------------------------------------------------------------------------- devices, precision, channels


def first_conv(model):
    return model.get_submodule(model.default_cfg["first_conv"])


def gradients(model, forward):
    forward(some_images()).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(any_kind):
    found = []
    for enable in (False, True):
        model = slim(any_kind, drop_path_rate=0.3, drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        found.append(gradients(model, model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_model_has_the_device_and_precision_it_is_created_with(any_kind):
    for device in ("meta", "cpu"):
        assert {p.device.type for p in slim(any_kind, device=device).parameters()} == {device}
    single, half = slim(any_kind).eval(), slim(any_kind, device="cpu", dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.load_state_dict(single.state_dict())
    got = run(half, some_images(dtype=torch.bfloat16))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), run(single, some_images()), rtol=0.05, atol=0.02)


def test_automatic_mixed_precision(any_kind):
    model = slim(any_kind).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(some_images())
    torch.testing.assert_close(logits.float(), model(some_images()), rtol=0.05, atol=0.02)
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("chans", [1, 4])
def test_images_of_any_number_of_channels(any_kind, chans):
    model, images = slim(any_kind, in_chans=chans).eval(), some_images(chans=chans)
    logits = run(model, images)
    assert logits.shape == (2, 5) and model.in_chans == first_conv(model).in_channels == chans
    for i in range(chans):
        changed = images.clone()
        changed[:, i] += 1
        assert not torch.equal(run(model, changed), logits)


def test_channels_last_changes_nothing(any_kind):
    model, images = slim(any_kind).eval(), some_images()
    logits = run(model, images)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(run(model, images.to(memory_format=torch.channels_last)), logits)


# -------------------------------------------------------------------------------------- copies, traces and compilers


def test_copies_are_equal_and_independent(any_kind):
    model = slim(any_kind).eval()
    logits = run(model, some_images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and twin.pretrained_cfg == model.pretrained_cfg
        assert torch.equal(run(twin, some_images()), logits)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert not torch.equal(run(twin, some_images()), logits)
    assert torch.equal(run(model, some_images()), logits)


def test_the_moving_average_follows_every_parameter(any_kind):
    model = slim(any_kind)
    before = copy.deepcopy(model.state_dict())
    ema = ModelEmaV3(model, decay=0.75)
    changed = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    with torch.no_grad():
        for tensor in changed.values():  # parameters, and statistics of batch norms
            tensor.add_(1)
    ema.update(model)
    for key, average in ema.module.state_dict().items():
        torch.testing.assert_close(average, before[key] + 0.25 if key in changed else before[key])
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


def test_fx_gives_the_same_logits_and_gradients(any_kind):
    graph, twin = traced(slim(any_kind)), slim(any_kind)
    inner_calls = [node for node in graph.eval().graph.nodes if node.target is inner_transformer]
    assert len(inner_calls) == sum(getattr(module, "has_inner", False) for module in twin.modules())
    for copied in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        (logits,) = run(copied.eval(), some_images()).values()
        assert torch.equal(logits, run(twin.eval(), some_images()))  # timm's tests ask for the same operator
    found = gradients(graph.train(), lambda x: next(iter(graph(x).values())))
    torch.testing.assert_close(found, gradients(twin, twin.train()))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_gives_the_same_logits(any_kind):
    model = slim(any_kind, depth=2, scriptable=True).eval()
    logits = run(model, some_images())
    scripted = torch.jit.script(model)
    torch.testing.assert_close(run(scripted, some_images()), logits)
    assert scripted.no_weight_decay() == model.no_weight_decay()  # timm's train.py asks a scripted model too
    (of_graph,) = run(torch.jit.script(traced(model).eval()), some_images()).values()
    torch.testing.assert_close(of_graph, logits)


def test_compiles_as_one_graph_with_the_same_gradients(any_kind):
    torch._dynamo.reset()
    model, twin = slim(any_kind, depth=2), slim(any_kind, depth=2)
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, compiled), gradients(twin, twin.train()))
    model.eval()
    for count in (4, 5):
        torch.testing.assert_close(run(compiled, some_images(count)), run(twin.eval(), some_images(count)))


def test_compiles_as_one_graph_with_stochastic_depth():
    torch._dynamo.reset()
    model = slim("tnt_ti", depth=2, drop_path_rate=0.1).train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(some_images(4)).sum().backward()
    assert without_gradient(model) == []


@pytest.mark.cuda  # on a CPU, compiling the C++ of 23 kernels takes 40 s; the tests above check the graph
def test_inductor_computes_the_same():
    torch._dynamo.reset()
    model, images = slim("tnt_ti", depth=1).cuda(), some_images().cuda()
    found = torch.compile(model, fullgraph=True)(images)
    assert (found - model(images)).abs().max() <= 1e-3  # TF32


def test_exports_for_batches_of_any_size(any_kind):
    model = slim(any_kind, depth=2, exportable=True).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (some_images(),), dynamic_shapes=({0: batch},))
    for count in (1, 2, 5):
        torch.testing.assert_close(run(program.module(), some_images(count)), run(model, some_images(count)))
