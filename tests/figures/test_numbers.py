"""The numbers behind feature maps, t-SNE, positions, curves and confusion."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tnt_timm.data.digits import Digits
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.figures import confusion, curves, feature_maps, images, picture, positions, tsne
from tnt_timm.figures.images import ImageSettings
from tnt_timm.settings.config import own_settings


def test_feature_maps_are_the_blocks_outputs(tnt, image):
    found = tnt.feature_maps(image, [3, 1])
    assert [maps.shape for maps in found] == [(1, 24, 3, 2)] * 2
    words, sentences = tnt.model.blocks[0](*tnt.model.embed(image))
    assert np.allclose(found[1].reshape(24, 6), sentences[0, 1:].T.detach().numpy(), atol=1e-5)


def test_twelve_maps_by_seed(tnt, image):
    one, same, other = (feature_maps.choose(tnt, image, None, seed) for seed in (0, 0, 1))
    assert list(one) == [1, 3] and all(block.maps.shape == (12, 3, 2) for block in one.values())
    channels = one[1].channels
    assert np.array_equal(channels, same[1].channels) and not np.array_equal(channels, other[1].channels)
    assert len(set(channels)) == 12


def test_blocks_of_the_paper(named):
    for depth, blocks in ((12, [1, 6, 12]), (1, [1])):
        assert named(timm.create_model("tnt_ti", depth=depth, device="meta")).block_numbers(None) == blocks


def test_the_head_reads_the_class_token(tnt, image):
    found = tnt.head_inputs(torch.cat([image] * 3), batch_size=2)
    assert np.allclose(found, tnt.model.forward_features(image)[:, 0].detach().numpy().repeat(3, 0), atol=1e-5)


def test_tsne_is_a_function_of_its_seed():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(20, 4, 2)), rng.normal(size=(20, 4, 2)) + 20])
    one, same = (tsne.embed("t", rows, 5, 3).points for _ in range(2))
    assert one.shape == (40, 2) and np.array_equal(one, same)
    own, other = (np.linalg.norm(half - half.mean(0), axis=1).max() for half in (one[:20], one[20:]))
    assert np.linalg.norm(one[:20].mean(0) - one[20:].mean(0)) > max(own, other)  # two heaps stay two
    with pytest.raises(ConfigError, match="perplexity: 40: must be below the number of points, 40"):
        tsne.embed("t", rows, 40, 0)
    with pytest.raises(UserError, match="t: 3 points for t-SNE, which needs 4"):
        tsne.embed("t", rows[:3], None, 0)
    with pytest.raises(UserError, match=r"t: maps of one pixel .*; raise --img-size"):
        tsne.embed("t", rows[:, :1, :1], None, 0)
    with pytest.raises(UserError, match="t: some features are not finite numbers"):
        tsne.embed("t", np.where(rows > 20, np.nan, rows), None, 0)


def test_perplexity_and_scale_are_said():
    few, many = (np.random.default_rng(0).normal(size=(count, 5)) for count in (16, 100))
    clouds = [tsne.embed(name, rows, None, 7) for name, rows in (("few", few), ("many", many))]
    assert tsne.how(clouds[:1], 7) == "perplexity 5, seed 7"
    assert tsne.how(clouds, 7) == "perplexity 5 and 30, seed 7, one scale for all panels"
    left, right = tsne.draw(clouds, "c").axes
    assert np.ptp(left.get_xlim()) == pytest.approx(np.ptp(right.get_xlim()))
    assert np.ptp(left.get_ylim()) == pytest.approx(np.ptp(right.get_ylim()))
    assert left.get_aspect() == right.get_aspect() == 1
    for axes in (left, right):
        for (low, high), values in zip((axes.get_xlim(), axes.get_ylim()), axes.collections[0].get_offsets().T):
            assert low < values.min() and values.max() < high


@pytest.mark.parametrize("name, unit", [("tnt_ti", "block"), ("deit_tiny_patch16_224", "block"),
    ("resnet18", "stage"), ("pvt_v2_b0", "stage"), ("efficientnet_b0", "stage")])  # fmt: skip
def test_blocks_or_stages(named, name, unit):
    network = named(timm.create_model(name, device="meta"), "n")
    assert network.unit == unit
    with pytest.raises(ConfigError, match=f"blocks: 99: n has {unit}s 1 to {len(network.model.feature_info)}"):
        network.block_numbers([99])


def test_similarity_of_positions(tnt, named):
    found, model = positions.similarities(tnt), tnt.model
    assert found["sentence"].shape == (3, 2, 3, 2) and found["word"].shape == (4, 4, 4, 4)
    a, b = model.patch_pos[0, 1 + 2 * 2 + 1], model.patch_pos[0, 1 + 1]
    expected = torch.cosine_similarity(a, b, dim=0).item()
    assert found["sentence"][2, 1, 0, 1] == pytest.approx(expected, abs=1e-5)
    a, b = model.pixel_pos[0, :, 3, 0], model.pixel_pos[0, :, 1, 2]
    assert found["word"][3, 0, 1, 2] == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-5)
    assert positions.similarities(named(timm.create_model("deit_tiny_patch16_224", img_size=32))).keys() == {"sentence"}
    with pytest.raises(UserError, match="r: has no learned positions"):
        positions.similarities(named(timm.create_model("resnet18"), "r"))


def test_a_summary_becomes_curves(tmp_path):
    (tmp_path / "summary.csv").write_text("epoch,train_loss,eval_loss,eval_top1,lr\n0,2.5,2.0,10,0.1\n1,1.5,,20,0.1\n")
    run = curves.read_run(tmp_path)
    assert [row["epoch"] for row in run] == [1, 2] and run[0]["train_loss"] == 2.5
    assert run[1] == dict(run=tmp_path.name, epoch=2, train_loss=1.5, eval_loss=None, eval_top1=20.0)
    panels = curves.draw([run]).axes
    assert [len(axes.lines) for axes in panels] == [2, 1]
    assert panels[0].lines[1].get_xydata().tolist() == [[1, 2.0]]


def test_a_confusion_matrix(tmp_path):
    (tmp_path / "c.csv").write_text(",cat,dog\ncat,3,1\ndog,0,0\n")
    figure, rows = confusion.draw_confusion([str(tmp_path / "c.csv")], None)
    assert rows[1] == {"true": "cat", "predicted": "dog", "count": 1, "share_of_true": 0.25} and len(rows) == 2
    assert figure.axes[0].images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert figure.axes[0].get_title() == "75.00 % of 4 images are right"


@pytest.mark.parametrize(
    "read, text, message",
    [
        (curves.read_run, "", "has no rows"),
        (curves.read_run, "a,b\n1,2\n", "has no column epoch; columns: a, b"),
        (curves.read_run, "epoch,eval_top1\n0,high\n", "eval_top1: 'high' is not a number"),
        (curves.read_run, "epoch,eval_top1\n0\n", "row 1 has more or fewer cells than the header .2."),
        (confusion.read, ",a,b\na,1,2\n", "do not name the same classes"),
        (confusion.read, ",a\na,0.5\n", "class a: '0.5' is not a count"),
    ],
)
def test_tables_that_are_none(tmp_path, read, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=f"t.csv: .*{message}|t.csv: {message}"):
        read(tmp_path / "t.csv")


def test_images_by_name(tmp_path):
    assert [images.open_image(name).size for name in ("china", "flower", "digits/3")] == [(640, 427)] * 2 + [(32, 32)]
    Image.new("L", (9, 5)).save(tmp_path / "b.png")
    image = images.open_image(str(tmp_path / "b.png"))
    assert image.size == (9, 5) and image.mode == "RGB"
    with pytest.raises(ConfigError, match="image: digits/360: the last image is digits/359"):
        images.open_image("digits/360")
    for name in ("digits/x", "chine", str(tmp_path)):
        with pytest.raises(ConfigError, match=f"command line: image: {name}: no such file; give a file, china"):
            own_settings(ImageSettings, {"image": name})
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b.png: not a readable image"):
        images.open_image(str(tmp_path / "b.png"))


def test_an_image_of_a_torchvision_dataset(tmp_path, write_fashion):
    root = str(write_fashion(tmp_path))
    assert images.open_image("torch/fashion_mnist/31", root).size == (28, 28)
    with pytest.raises(ConfigError, match="image: torch/fashion_mnist/32: the last image is torch/fashion_mnist/31"):
        images.open_image("torch/fashion_mnist/32", root)
    assert own_settings(ImageSettings, {"image": "torch/fashion_mnist/3"}).image == "torch/fashion_mnist/3"


def test_an_image_is_shown_whole_but_for_its_longer_edge():
    preprocessing = timm.data.resolve_data_config({"img_size": 64}, pretrained_cfg={"crop_pct": 0.5})
    shot = images.show(own_settings(ImageSettings, {}), preprocessing)
    assert shot.pixels.shape == (64, 64, 3) and shot.pixels.dtype == np.uint8 and shot.tensor.shape == (1, 3, 64, 64)
    whole = np.asarray(images.open_image("china").crop((106, 0, 533, 427)).resize((64, 64)), float)
    assert np.abs(whole - shot.pixels).mean() < 8
    expected = (shot.pixels[5, 7] / 255 - np.array(preprocessing["mean"])) / np.array(preprocessing["std"])
    assert np.allclose(shot.tensor[0, :, 5, 7], expected, atol=1e-5)


def test_labelled_images_are_drawn_by_seed():
    preprocessing = timm.data.resolve_data_config({"img_size": 32}, pretrained_cfg={})
    pixels, targets = images.labelled(Digits("validation"), preprocessing, 5, seed=1)
    again, _ = images.labelled(Digits("validation"), preprocessing, 5, seed=1)
    assert pixels.shape == (5, 3, 32, 32) and len(targets) == 5 and torch.equal(pixels, again)


def test_the_same_figure_is_the_same_file(tmp_path):
    found = {"word": np.random.default_rng(0).normal(size=(2, 2, 2, 2))}
    for suffix in (".png", ".svg"):
        paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
        for path in paths:
            picture.save(positions.draw(found, "t"), path, found)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert np.array_equal(np.load(tmp_path / "a.npz")["word"], found["word"])
