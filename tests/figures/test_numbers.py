"""The numbers behind feature maps, t-SNE, positions, curves and confusion."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tnt_timm.data.digits import Digits
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.figures import confusion, curves, features, images, picture, positions, tsne


def test_feature_maps_are_the_blocks_outputs(tnt, image):
    found = features.feature_maps(tnt, image, [3, 1], "t")
    assert [maps.shape for maps in found] == [(24, 3, 2)] * 2
    words, sentences = tnt.blocks[0](*tnt.embed(image))
    assert np.allclose(found[1].reshape(24, 6), sentences[0, 1:].T.detach().numpy(), atol=1e-5)


def test_twelve_maps_by_seed(tnt, image):
    one, same, other = (features.draw_maps(tnt, image, None, "t", "t", seed) for seed in (0, 0, 1))
    assert one.blocks == [1, 3] and all(maps.shape == (12, 3, 2) for maps in one.maps)
    assert np.array_equal(one.channels, same.channels) and not np.array_equal(one.channels, other.channels)
    assert len(set(one.channels[0])) == 12


def test_blocks_of_the_paper():
    assert features.check_blocks(None, 12, "t") == [1, 6, 12]
    assert features.check_blocks(None, 1, "t") == [1]


def test_the_head_reads_the_class_token(tnt, image):
    found = features.head_features(tnt, torch.cat([image] * 3), "t", batch_size=2)
    assert np.allclose(found, tnt.forward_features(image)[:, 0].detach().numpy().repeat(3, 0), atol=1e-5)


def test_tsne_is_a_function_of_its_seed():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(20, 4, 2)), rng.normal(size=(20, 4, 2)) + 20])
    one, same = (tsne.embed("t", "", rows, 5, 3).points for _ in range(2))
    assert one.shape == (40, 2) and np.array_equal(one, same)
    own, other = (np.linalg.norm(half - half.mean(0), axis=1).max() for half in (one[:20], one[20:]))
    assert np.linalg.norm(one[:20].mean(0) - one[20:].mean(0)) > max(own, other)  # two heaps stay two
    with pytest.raises(ConfigError, match="perplexity: 40: must be below the number of points, 40"):
        tsne.embed("t", "", rows, 40, 0)
    with pytest.raises(UserError, match="t: 3 points for t-SNE, which needs 4"):
        tsne.embed("t", "", rows[:3], None, 0)
    with pytest.raises(UserError, match=r"t: maps of one pixel, .*; raise --img-size"):
        tsne.embed("t", "", rows[:, :1, :1], None, 0)
    with pytest.raises(UserError, match="t: some features are not finite numbers"):
        tsne.embed("t", "", np.where(rows > 20, np.nan, rows), None, 0)


def test_perplexity_and_scale_are_said():
    few, many = (np.random.default_rng(0).normal(size=(count, 5)) for count in (16, 100))
    clouds = [tsne.embed(name, "", rows, None, 7) for name, rows in (("few", few), ("many", many))]
    assert tsne.how(clouds[:1], 7) == "perplexity 5, seed 7"
    assert tsne.how(clouds, 7) == "perplexity 5 and 30, seed 7, one scale for all panels"
    left, right = tsne.draw(clouds, None, "c").axes
    assert np.ptp(left.get_xlim()) == pytest.approx(np.ptp(right.get_xlim()))
    assert np.ptp(left.get_ylim()) == pytest.approx(np.ptp(right.get_ylim()))
    assert left.get_aspect() == right.get_aspect() == 1
    for axes, cloud in zip((left, right), clouds):
        for (low, high), values in zip((axes.get_xlim(), axes.get_ylim()), cloud.points.T):
            assert low < values.min() and values.max() < high


@pytest.mark.parametrize("name, unit", [("tnt_ti", "block"), ("deit_tiny_patch16_224", "block"),
    ("resnet18", "stage"), ("pvt_v2_b0", "stage"), ("efficientnet_b0", "stage")])  # fmt: skip
def test_blocks_or_stages(name, unit):
    model = timm.create_model(name, device="meta")
    assert features.unit_of(model) == unit
    with pytest.raises(ConfigError, match=f"blocks: 99: n has {unit}s 1 to {features.depth_of(model)}"):
        features.feature_maps(model, torch.empty(1, 3, 224, 224), [99], "n")


def test_similarity_of_positions(tnt):
    found = positions.similarities(tnt, "t")
    assert found["sentence"].shape == (3, 2, 3, 2) and found["word"].shape == (4, 4, 4, 4)
    a, b = tnt.patch_pos[0, 1 + 2 * 2 + 1], tnt.patch_pos[0, 1 + 1]
    expected = torch.cosine_similarity(a, b, dim=0).item()
    assert found["sentence"][2, 1, 0, 1] == pytest.approx(expected, abs=1e-5)
    a, b = tnt.pixel_pos[0, :, 3, 0], tnt.pixel_pos[0, :, 1, 2]
    assert found["word"][3, 0, 1, 2] == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-5)
    assert positions.similarities(timm.create_model("deit_tiny_patch16_224", img_size=32), "d").keys() == {"sentence"}
    with pytest.raises(UserError, match="r: has no learned positions"):
        positions.similarities(timm.create_model("resnet18"), "r")


def test_a_summary_becomes_curves(tmp_path):
    (tmp_path / "summary.csv").write_text("epoch,train_loss,eval_loss,eval_top1,lr\n0,2.5,2.0,10,0.1\n1,1.5,,20,0.1\n")
    run = curves.read_run(tmp_path)
    assert run.epochs == [1, 2] and run.columns["train_loss"] == [2.5, 1.5] and run.columns["eval_loss"] == [2.0, None]
    assert curves.numbers([run])[1] == {
        "run": tmp_path.name, "epoch": 2, "train_loss": 1.5, "eval_loss": None, "eval_top1": 20.0
    }  # fmt: skip
    panels = curves.draw([run]).axes
    assert [len(axes.lines) for axes in panels] == [2, 1]
    assert panels[0].lines[1].get_xydata().tolist() == [[1, 2.0]]


def test_a_confusion_matrix(tmp_path):
    (tmp_path / "c.csv").write_text(",cat,dog\ncat,3,1\ndog,0,0\n")
    matrix = confusion.read(tmp_path / "c.csv")
    assert matrix.counts.tolist() == [[3, 1], [0, 0]] and matrix.shares.tolist() == [[0.75, 0.25], [0, 0]]
    assert matrix.accuracy == 75
    assert confusion.numbers(matrix)[1] == {"true": "cat", "predicted": "dog", "count": 1, "share_of_true": 0.25}


@pytest.mark.parametrize(
    "read, text, message",
    [
        (curves.read_run, "", "is empty"),
        (curves.read_run, "a,b\n1,2\n", "has no column epoch; columns: a, b"),
        (curves.read_run, "epoch,eval_top1\n0,high\n", "eval_top1: 'high' is not a number"),
        (curves.read_run, "epoch,eval_top1\n0\n", "line 2: 1 cells where the header has 2"),
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
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    found = images.images_in(tmp_path)
    assert [images.open_image(path).size for path in found] == [(3, 2), (9, 5)]
    assert images.open_image(found[1]).mode == "RGB"
    for name in ("digits/360", "digits/x", "chine"):
        with pytest.raises(ConfigError, match=f"image: {name}: "):
            images.open_image(name)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a.png: not a readable image"):
        images.open_image(str(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images right in this folder"):
        images.images_in(tmp_path / "empty")


def test_an_image_is_shown_whole_but_for_its_longer_edge():
    preprocessing = timm.data.resolve_data_config({"img_size": 64}, pretrained_cfg={"crop_pct": 0.5})
    shot = images.show(images.open_image("china"), preprocessing)
    assert shot.pixels.shape == (64, 64, 3) and shot.pixels.dtype == np.uint8 and shot.tensor.shape == (1, 3, 64, 64)
    whole = np.asarray(images.open_image("china").crop((106, 0, 533, 427)).resize((64, 64)), float)
    assert np.abs(whole - shot.pixels).mean() < 8
    expected = (shot.pixels[5, 7] / 255 - np.array(preprocessing["mean"])) / np.array(preprocessing["std"])
    assert np.allclose(shot.tensor[0, :, 5, 7], expected, atol=1e-5)


def test_labelled_images_are_drawn_by_seed():
    preprocessing = timm.data.resolve_data_config({"img_size": 32}, pretrained_cfg={})
    pixels, targets, left_out = images.labelled(Digits("validation"), preprocessing, 5, seed=1)
    again, *_ = images.labelled(Digits("validation"), preprocessing, 5, seed=1)
    assert pixels.shape == (5, 3, 32, 32) and len(targets) == 5 and torch.equal(pixels, again) and not left_out


def test_the_same_figure_is_the_same_file(tmp_path):
    found = {"word": np.random.default_rng(0).normal(size=(2, 2, 2, 2))}
    for suffix in (".png", ".svg"):
        paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
        for path in paths:
            picture.save(positions.draw(found, "t", "c"), path, positions.numbers(found))
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert np.array_equal(np.load(tmp_path / "a.npz")["word_similarity"], found["word"])
