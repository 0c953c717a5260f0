"""A small PyramidTNT on digits, through the commands as a user types them."""

import csv
import json

import pytest
import timm
import torch

RUN = """--config configs/digits.yaml --model pyramid_tnt_ti --model-kwargs depths=[1,2,1,1] embed_dim=32 inner_dim=4
    --epochs 3 --warmup-epochs 1 --cooldown-epochs 0 --workers 0 --device cpu --experiment small""".split()


@pytest.fixture(scope="module")
def trained(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pyramid")
    run = launch(folder / "log", [*RUN, "--output", folder])
    assert run.wait() == 0, run.err
    return folder / "small"


def test_it_learns_and_validation_gives_the_same_figure(trained, start, tmp_path):
    rows = list(csv.DictReader((trained / "summary.csv").open()))
    best = max(float(row["eval_ema_top1"]) for row in rows)
    assert len(rows) == 3 and best > 80
    results = tmp_path / "results.json"
    run = start([trained, "--results-file", results, "--workers", 0], program="validate")
    assert run.wait() == 0, run.err
    assert json.loads(results.read_text())["top1"] == pytest.approx(best, abs=1e-3)


def test_exports_compute_the_same(trained, run_script, tmp_path):
    status, out, err = run_script("export", trained, "--output", tmp_path / "out", "--formats", "timm", "torch-export")
    assert status == 0 and out.count("largest difference") == 2, err
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("figure", ["feature-maps", "positions"])
def test_figures_of_it(run_script, trained, tmp_path, figure):
    image = ["--image", "digits/3"] if figure == "feature-maps" else []
    status, _, err = run_script("figures", figure, trained, *image, "--output", tmp_path / "figure.png")
    assert status == 0 and (tmp_path / "figure.png").stat().st_size > 1000, err


@pytest.mark.parametrize(
    "command, line",
    [
        ("figures attention {} --image digits/3 --output figure.png", "this figure does not support PyramidTNT"),
        ("figures word-maps {} --image digits/3 --output figure.png", "this figure does not support PyramidTNT"),
        ("export {} --output out --formats timm --timm-names", "timm has no PyramidTNT; leave --timm-names out"),
        ("benchmark pyramid_tnt_ti --parts", "not a TNT of this package; --parts measures only those"),
        ("complexity pyramid_tnt_ti --img-size 100", "img_size (100, 100) is not a multiple of 8"),
    ],
)
def test_what_it_has_not_is_one_line(run_script, trained, monkeypatch, tmp_path, command, line):
    monkeypatch.chdir(tmp_path)
    status, out, err = run_script(*command.format(trained).split())
    assert status in (1, 2) and out == "" and line in err and err.count("error:") == 1
    assert list(tmp_path.iterdir()) == []
