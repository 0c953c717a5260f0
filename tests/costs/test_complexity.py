"""Counted parameters and multiply-adds are correct, and a difference from a published value is marked."""

import csv
import functools

import pytest
import timm
import torch
from torch import nn

from tnt_timm.costs import complexity
from tnt_timm.costs.complexity import HEADER, Cost, Published, cost, count, create_for_size, published, rows


def test_a_network_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 5, 7))
    model[0].bias.requires_grad = False  # frozen parameters do not count
    by_hand = (3 * 8 * 9 + 8 * 25 * 7 + 7, 25 * 8 * 27 + 8 * 25 * 7)
    assert count(model, (3, 10, 10)) == by_hand
    assert count(model.to("meta"), (3, 10, 10)) == by_hand


def test_attention_counts_alike_fused_and_not():
    model = timm.create_model("deit_tiny_patch16_224", depth=2, device="meta")
    fused = count(model, (3, 224, 224))
    for block in model.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    assert count(model, (3, 224, 224)) == fused


@pytest.mark.parametrize(
    "name, params, gmacs",
    [("resnet50", 25_557_032, 4.089), ("deit_small_patch16_224", 22_050_664, 4.598), ("tnt_b", 65_428_680, 14.049)],
)
def test_known_models(name, params, gmacs):
    found = cost(name)
    assert found.image_size == 224 and found.params_m * 1e6 == pytest.approx(params, abs=0.5)
    assert found.gmacs == pytest.approx(gmacs, abs=0.005)


@pytest.mark.parametrize("name", ["tnt_ti", "resnet18"])  # with and without an argument img_size
def test_another_image_size(name):
    small, large = cost(name, 160), cost(name, 320)
    assert (small.image_size, large.image_size) == (160, 320)
    assert 3.9 < large.gmacs / small.gmacs < 6
    model, input_size = create_for_size(name, 160)
    assert input_size == (3, 160, 160) and model(torch.zeros(1, *input_size)).shape == (1, 1000)


def test_counting_takes_no_memory_for_weights():
    before = torch.get_rng_state()
    cost("vit_huge_patch14_224")  # would take 2.5 GB
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------------------------------- what is published


def test_each_published_row_is_complete():
    found = published()
    assert len({row.model for row in found}) == len(found)
    for row in found:
        assert row.model and row.source and row.image_size >= 192
        assert row.top1 and 50 < row.top1 < 90 and (row.top5 is None or row.top1 < row.top5 < 100)
        assert not row.timm_name or timm.is_model(row.timm_name)
    by_name = {row.model: row for row in found}
    assert by_name["TNT-S"][1:7] == ("tnt_s", 224, 23.8, 5.2, 81.5, 95.7)
    assert by_name["PVT-Small"].timm_name == "" and by_name["DeiT-S"].top5 is None


@pytest.mark.parametrize(
    "params, gmacs, differs",
    [(6.1, 1.4, ""), (6.2, 1.4, "params"), (6.1, 1.5, "gmacs"), (6.0, 1.3, "params gmacs"), (None, None, "")],
)
def test_differences_are_marked_after_rounding(params, gmacs, differs):
    known = Published("Some", "some", 224, params, gmacs, 80.0, None, "a paper")
    cells = dict(zip(HEADER, rows([Cost("Some", "some", 224, 6.0764, 1.3991, known)])[0]))
    assert cells["differs"] == differs
    assert (cells["params_m"], cells["gmacs"]) == ("6.08", "1.40")
    assert cells["published_params_m"] == ("" if params is None else f"{params:.1f}")


# ------------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run_complexity(run_script):
    return functools.partial(run_script, "complexity")


def test_the_papers_tables(run_complexity, monkeypatch, tmp_path):
    wanted = ("TNT-Ti", "TNT-B", "DeiT-S", "PVT-Small")
    monkeypatch.setattr(complexity, "published", lambda: [row for row in published() if row.model in wanted])
    status, out, err = run_complexity()
    lines = out.splitlines()
    assert (status, err) == (0, "") and lines[0].split() == HEADER
    assert [line.split("  ")[0] for line in lines[1:]] == ["TNT-Ti", "TNT-B", "DeiT-S"]  # timm has no PVT-Small
    assert ["params" in line for line in lines[1:]] == [False, True, False]

    status, out, _ = run_complexity("--format", "csv", "--output", tmp_path / "costs.csv")
    found = next(csv.DictReader((tmp_path / "costs.csv").open()))
    assert (status, out) == (0, "")
    assert (found["published_gmacs"], found["gmacs"], found["params_m"]) == ("1.4", "1.40", "6.08")

    _, out, _ = run_complexity("--format", "markdown")
    assert out.splitlines()[1] == "|" + "---|" * len(HEADER) and out.count("\n| ") == 3


def test_other_models(run_complexity):
    status, out, _ = run_complexity("resnet18", "tnt_s.in1k", "--img-size", "160")
    assert status == 0
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [[x, x, "160"] for x in ("resnet18", "tnt_s.in1k")]


@pytest.mark.parametrize(
    "argv, status, line",
    [
        ("resnet5", 2, "no such model; perhaps you meant resnet50"),
        ("--img-size 160", 2, "name a MODEL with it"),
        ("tnt_s --img-size 100", 1, "tnt_s: cannot be counted: img_size (100, 100) is not a multiple"),
        ("tnt_ti --format xml", 2, "expected 'table', 'markdown' or 'csv'"),
        ("resnet18 --output /no/such/folder/file", 2, "/no/such/folder/file: no such folder"),
    ],
)
def test_mistakes_are_one_line(run_complexity, argv, status, line):
    found, out, err = run_complexity(*argv.split())
    assert (found, out) == (status, "") and line in err and err.count("\n") == 1
