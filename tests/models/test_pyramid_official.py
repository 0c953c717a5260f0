"""PyramidTNT computes and learns what the official code does.

golden_pyramid.json holds logits and losses of the official code. Where the code is at hand, it is compared directly, too:

    git clone https://github.com/huawei-noah/Efficient-AI-Backbones
    TNT_OFFICIAL=Efficient-AI-Backbones/tnt_pytorch pytest tests/models/test_pyramid_official.py

With RECORD=1, golden_pyramid.json is written anew.
"""

import json
import os
import re
import sys
import types
import zlib
from pathlib import Path

import networks
import numpy as np
import pytest
import timm
import torch
from networks import run
from torch.nn.functional import cross_entropy

from tnt_timm.models import official_pyramid
from tnt_timm.models.variants import PYRAMIDS

GOLDEN = Path(__file__).with_name("golden_pyramid.json")
OFFICIAL = os.environ.get("TNT_OFFICIAL")
needs_official = pytest.mark.skipif(not OFFICIAL, reason="TNT_OFFICIAL does not name a folder with the official code")
# the second stage has a second inner transformer
LEARNING = dict(
    img_size=64, num_classes=10, embed_dim=16, inner_dim=4, depths=(1, 7, 1, 2), num_heads_inner=1, num_heads_outer=2
)
STEPS = 50
DROP_PATH = 0.1


def official_module():
    """Import the official file; it needs timm 0.3, of which it uses little that has changed."""
    names = {"timm.models.helpers": "load_pretrained", "timm.models.registry": "register_model"}
    stubs = {module: types.SimpleNamespace(**{name: lambda x: x}) for module, name in names.items()}
    stubs["timm.models.layers"] = timm.layers
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        module = types.ModuleType("official_pyramid_tnt")
        exec(Path(OFFICIAL, "pyramid_tnt.py").read_text(), module.__dict__)
        return module
    finally:
        for name, old in before.items():
            sys.modules.pop(name) if old is None else sys.modules.update({name: old})


def official(name):
    size = 192 if name.endswith("ti") else 256
    return getattr(official_module(), f"ptnt_{name.removeprefix('pyramid_tnt_')}_patch16_{size}")()


def small_official():
    widths = [[width * factor for factor in (1, 2, 4, 4)] for width in (16, 4, 2, 1)]
    configs = dict(zip(("outer_dims", "inner_dims", "outer_heads", "inner_heads"), widths), depths=LEARNING["depths"])
    return official_module().PyramidTNT(configs, img_size=64, num_classes=10, drop_path_rate=DROP_PATH)


def small_ours():
    return networks.small("pyramid_tnt_ti", **LEARNING, drop_path_rate=DROP_PATH)


def official_names(model):
    """Return our state dict under official names; the values are shared where nothing was joined."""
    theirs, named = {ours: official for official, ours in official_pyramid.OFFICIAL.items()}, {}
    for name, tensor in model.state_dict().items():
        if merge := re.fullmatch(r"stages\.(\d)\.(word_merge|sentence_merge)\.(norm|conv)(\..*)", name):
            number, kind, part, last = merge.groups()
            name = f"{kind}s.{int(number) - 1}.{part}{'.0' * (part == 'conv')}{last}"
        name = ".".join(theirs.get(part, part) for part in name.split("."))
        if name == "inner_pos":
            tensor = tensor.flatten(2).transpose(1, 2)
        if ".inner_attn.qk." in name:
            named[name.replace(".qk.", ".q.")], k = tensor.chunk(2)
            named[name.replace(".qk.", ".k.")] = k
        else:
            named[name] = tensor
    for name in [name for name in named if ".inner_attn.k." in name]:
        v = named.pop(name.replace(".k.", ".v."))
        named[name.replace(".k.", ".kv.")] = torch.cat([named.pop(name), v])
    return named


def drawn(shapes):
    """Return weights that depend on nothing but their official names and shapes."""
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32).copy())
        if name.endswith("running_var"):
            values = 1 + 0.1 * values.abs()
        elif len(shape) == 1:
            values = 0.1 * values + name.endswith("weight")  # of a norm
        elif name.endswith("relative_pos"):
            values = 0.5 * values
        elif len(shape) in (2, 4):
            values = values / np.sqrt(np.prod(shape[1:]))
        weights[name] = torch.tensor(7) if name.endswith("num_batches_tracked") else values
    return weights


def with_drawn_weights(model):
    named = official_names(model) if hasattr(model, "stem") else model.state_dict()
    model.load_state_dict(drawn({name: tensor.shape for name, tensor in named.items()}))
    return model


def some_images(size, batch):
    values = np.random.default_rng(5).standard_normal((batch, 3, size, size), dtype=np.float32)
    return torch.from_numpy(values)


def logits(model, name):
    return run(with_drawn_weights(model).eval(), some_images(192 if name.endswith("ti") else 256, 1))[0]


def losses(model):
    """Return the losses of AdamW with the official weight decay: none for vectors and for the positions."""
    with_drawn_weights(model).train()
    free = model.no_weight_decay()
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and name not in free]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or name in free]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=0.05), dict(params=others, weight_decay=0)], lr=1e-3
    )
    images, targets, found = some_images(64, 6), torch.tensor([0, 1, 2, 3, 4, 5]), []
    torch.manual_seed(3)  # of stochastic depth
    for _ in range(STEPS):
        loss = cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def golden():
    return json.loads(GOLDEN.read_text())


def close(found, expected, tolerance):
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return (found - expected).abs().max() <= tolerance * expected.abs().max()


@needs_official
@pytest.mark.parametrize("name", PYRAMIDS)
def test_logits_equal_the_official_codes(name):
    theirs = official(name)
    expected = logits(theirs, name)
    ours = timm.create_model(name)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert close(run(ours.eval(), some_images(192 if name.endswith("ti") else 256, 1))[0], expected, 1e-5)
    assert expected.std() > 0.1


@needs_official
def test_fifty_steps_equal_the_official_codes():
    torch.testing.assert_close(losses(small_ours()), losses(small_official()), rtol=1e-3, atol=0)


@needs_official
@pytest.mark.skipif(not os.environ.get("RECORD"), reason="RECORD is not set")
def test_record():
    names = ("pyramid_tnt_ti", "pyramid_tnt_s")
    found = {name: [round(x, 6) for x in logits(official(name), name).tolist()[:50]] for name in names}
    GOLDEN.write_text(json.dumps(found | {"losses": losses(small_official())}, indent=1) + "\n")


@pytest.mark.parametrize("name", ["pyramid_tnt_ti", "pyramid_tnt_s"])
def test_logits_are_the_recorded_ones(name):
    assert close(logits(timm.create_model(name), name)[:50], golden()[name], 1e-4)


def test_fifty_steps_have_the_recorded_losses():
    expected = golden()["losses"]
    assert len(expected) == STEPS and expected[-1] < 0.1 * expected[0]
    torch.testing.assert_close(losses(small_ours()), expected, rtol=1e-3, atol=0)


def test_official_names_are_all_converted():
    """Weights go to official names and back without a change."""
    ours = small_ours()
    weights = {name: value.clone() for name, value in ours.state_dict().items()}
    named = official_names(ours)
    assert "stages.1.blocks.1.inner_attn.kv.weight" in named and "word_merges.2.conv.0.bias" in named
    again = networks.small("pyramid_tnt_ti", **LEARNING)
    again.load_state_dict(named)
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
