"""Whatever is wrong with an image file is DamagedImage, with a reason of one line, for every kind of dataset."""

import errno
import io
import itertools
import signal
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from tnt_timm.data.check.images import inspect_image
from tnt_timm.data.datasets import Damage, open_dataset
from tnt_timm.data.decoding import MAX_PIXELS, DamagedImage, as_damage, decode, decode_fast, orientation, read_image
from tnt_timm.data.imagenet_sets import LabelledFiles
from tnt_timm.data.stream_samples import StreamedSamples
from tnt_timm.errors import Stopped, UserError

MODES = ("RGB", "L", "P", "RGBA", "1", "I;16", "F", "CMYK")


def written(photograph):
    """Yield the content of an image in each format and mode that Pillow can write and read here."""
    Image.init()
    small = photograph.resize((40, 32))
    deep = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    for format in sorted(Image.SAVE):
        for mode in MODES:
            file = io.BytesIO()
            try:
                (deep if mode == "I;16" else small.convert(mode)).save(file, format)
                decode(io.BytesIO(file.getvalue()))
            except Exception:  # not such a mode in this format; some formats are written only
                continue
            yield file.getvalue()


def mutated(content, random):
    """Yield the content cut off, with changed bytes anywhere or in its head, and with a part of zeros."""
    size = len(content)
    yield content[: random.integers(size)]
    for area, count in ((size, 8), (min(size, 128), 3)):
        broken = bytearray(content)
        for place in random.integers(0, area, count):
            broken[place] = random.integers(256)
        yield bytes(broken)
    start, end = sorted(random.integers(0, size, 2))
    yield content[:start] + bytes(end - start) + content[end:]


@pytest.mark.parametrize("seed", [0])
def test_any_damage_of_any_format(seed, photograph, capfd):
    random, raised, read = np.random.default_rng(seed), 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in written(photograph):
            for broken in mutated(content, random):
                try:
                    assert decode(io.BytesIO(broken)).mode == "RGB"
                    read += 1
                except DamagedImage as error:
                    assert "\n" not in str(error) and len(str(error)) < 400 and "0x" not in str(error)
                    raised += 1
    assert raised > 200 and read > 50
    assert capfd.readouterr() == ("", "")


def jpegs(photograph):
    """Yield JPEGs of each colour space, subsampling, and kind of scan."""
    small = photograph.resize((80, 53))
    for mode, subsampling, progressive, quality in itertools.product(("RGB", "L", "CMYK"), (0, 1, 2), (0, 1), (30, 95)):
        for options in ({}, {"keep_rgb": True}, {"restart_marker_blocks": 3}):
            if "keep_rgb" in options and (mode != "RGB" or subsampling):
                continue
            file = io.BytesIO()
            options = dict(options, subsampling=subsampling, progressive=progressive, quality=quality)
            small.convert(mode).save(file, "JPEG", **options)
            yield file.getvalue()
    file = io.BytesIO()
    small.save(file, "JPEG", subsampling=0)
    content = bytearray(file.getvalue())
    content[content.index(b"\xff\xc0") + 11] = 0x14  # luma in 1x4 blocks, which simplejpeg has no name for
    yield bytes(content)


def outcome(decoder, content):
    """Return the pixels (H, W, 3) or the reason why there are none."""
    try:
        image = decoder(io.BytesIO(content))
    except DamagedImage as error:
        return str(error)
    return np.asarray(image) if isinstance(image, Image.Image) else image.permute(1, 2, 0).numpy()


def test_the_fast_decoder_returns_the_same_pixels_or_reasons(photograph):
    random, damaged, total = np.random.default_rng(0), 0, 0
    for content in (*jpegs(photograph), *written(photograph)):
        for version in (content, content[:-2], *mutated(content, random)):
            slow, fast = outcome(decode, version), outcome(decode_fast, version)
            assert type(slow) is type(fast) and np.array_equal(slow, fast)
            damaged += isinstance(slow, str)
            total += 1
    assert 200 < damaged < 0.7 * total


def folder_with_a_png(write_folders, photograph):
    root = write_folders(train=dict(cat=2))
    photograph.resize((40, 32)).save(root / "train/cat/2.png")
    return root


@pytest.mark.parametrize(
    ("name", "split", "length"),
    [
        ("", "train", 3),
        ("torch/image_folder", "train", 3),
        ("torch/image_folder", "train[1:]", 2),
        ("torch/oxford_iiit_pet", "train", 6),
    ],
)
def test_files_are_read_with_the_given_decoder(name, split, length, write_folders, write_pets, photograph, tmp_path):
    pets = name == "torch/oxford_iiit_pet"
    root = write_pets(tmp_path) if pets else folder_with_a_png(write_folders, photograph)
    slow, fast = (open_dataset(name, str(root), split, True, decoder=decoder) for decoder in (decode, decode_fast))
    assert len(fast) == length
    for index in range(length):
        image, target = fast.load(index)
        assert image.dtype == torch.uint8 and target == slow.load(index)[1]
        assert np.array_equal(image.permute(1, 2, 0), slow.load(index)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_read_with_the_given_decoder(workers, write_shards, training_loader, device_recipe):
    root = write_shards(train=[5, 5])
    found = []
    for decoder in (decode, decode_fast):
        stream = open_dataset("wds/set", str(root), "train", True, batch_size=3, decoder=decoder)
        loader = training_loader(stream, batch_size=4, batches_per_epoch=2, workers=workers, **device_recipe)
        found.append(torch.stack([batch.images for batch in loader.epoch(0)]))
    assert torch.equal(*found)


@pytest.mark.parametrize("size", [(1, 1), (1001, 1), (17, 9), (640, 427)])
def test_the_fast_decoder_keeps_the_limits_of_shape(size, photograph):
    file = io.BytesIO()
    photograph.resize(size).save(file, "JPEG")
    slow, fast = outcome(decode, file.getvalue()), outcome(decode_fast, file.getvalue())
    assert np.array_equal(slow, fast)
    assert isinstance(slow, str) == (size == (1001, 1))


def test_the_fast_decoder_refuses_a_bomb(photograph):
    file = io.BytesIO()
    photograph.save(file, "JPEG")
    content = bytearray(file.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 65000, 65000)
    with pytest.raises(DamagedImage, match="decompression bomb"):
        decode_fast(io.BytesIO(bytes(content)))


RAISED = [AssertionError(), RuntimeError("no such\nframe"), NotImplementedError("x"), KeyError(320), IndexError("i")]
RAISED += [
    ZeroDivisionError("z"),
    OSError("image file is truncated"),
    RecursionError("r"),
    TypeError("t"),
    ValueError(),
]


def folders(root, _):
    return open_dataset("", str(root), "train", True)


def listed_files(root, _):
    return LabelledFiles([(str(root / "train/cat/0.jpg"), 0)])


def torchvision_folders(root, _):
    return open_dataset("torch/image_folder", str(root), "train", True)


def hugging_face(root, tmp_path):
    datasets = pytest.importorskip("datasets")
    content = (root / "train/cat/0.jpg").read_bytes()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
    rows = datasets.Dataset.from_dict(dict(image=[dict(bytes=content, path=None)], label=[0]), features=features)
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet/train-00000.parquet")
    return open_dataset(f"hfds/{tmp_path}/parquet", str(tmp_path / "cache"), "train", False)


@pytest.fixture
def make(write_folders, tmp_path):
    """make(source, content) -> a dataset of one image, whose file has that content."""

    def make(source, content):
        root = write_folders(train=dict(cat=1))
        (root / "train/cat/0.jpg").write_bytes(content)
        return source(root, tmp_path)

    return make


def png(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def broken_decoder(monkeypatch):
    """broken_decoder(error): decoding a PNG raises it."""

    def break_it(error):
        def load(self):
            raise error

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)

    return break_it


@pytest.mark.parametrize("source", [folders, listed_files, torchvision_folders, hugging_face])
def test_each_source_decodes_in_the_same_way(source, make, broken_decoder):
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    data = make(source, png(deep))
    assert np.array_equal(np.asarray(data.load(0)[0])[..., 0], deep >> 8)
    for error in RAISED:
        broken_decoder(error)
        with pytest.raises(DamagedImage) as caught:
            data.load(0)
        assert str(caught.value) and "\n" not in str(caught.value)
        assert data.name(0)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), Stopped(signal.SIGTERM), UserError("one line")])
def test_what_is_not_the_files_fault_is_no_damage(error, make, broken_decoder):
    data = make(folders, png(np.zeros((8, 8), np.uint8)))
    broken_decoder(error)
    with pytest.raises(type(error)):
        data.load(0)


def test_a_stream_decodes_in_the_same_way(write_shards, plain_transform, broken_decoder):
    root = write_shards(validation=[2])
    data = open_dataset("wds/set", str(root), "validation", False)
    assert [sample[3] for sample in StreamedSamples(data, plain_transform, None, 0, 1)] == [[], []]
    for error in RAISED:
        broken_decoder(error)
        samples = list(StreamedSamples(data, plain_transform, None, 0, 1))
        assert len(samples) == 2
        for *_, (damage,) in samples:
            assert isinstance(damage, Damage) and "set-validation-000.tar: 0000" in damage.name and damage.reason


def test_a_stream_of_16_bit_images(tmp_path, write_shards, plain_transform):
    import tarfile

    root = write_shards(validation=[1])
    deep = np.full((16, 16), 40_000, np.uint16)
    with tarfile.open(root / "set-validation-000.tar", "w") as tar:
        for name, content in (("0.png", png(deep)), ("0.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    data = open_dataset("wds/set", str(root), "validation", False)
    ((image, target, _, damage),) = StreamedSamples(data, plain_transform, None, 0, 1)
    assert (set(np.unique(image)), target, damage) == ({40_000 >> 8}, 1, [])


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_the_check_reports_the_same_reason(error, tmp_path, broken_decoder):
    path = tmp_path / "0.png"
    path.write_bytes(png(np.zeros((8, 8), np.uint8)))
    broken_decoder(error)
    with pytest.raises(DamagedImage) as caught:
        read_image(path)
    assert inspect_image(str(path)).problem == str(caught.value)


def test_a_missing_file_is_damage(tmp_path):
    with pytest.raises(DamagedImage, match="No such file or directory"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(DamagedImage, match="Is a directory"):
        read_image(tmp_path)


# ---- large images


def claiming(width, height):
    """A PNG of 50 bytes that claims a size."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\x10IDAT"


@pytest.mark.parametrize("width, height", [(60_000, 60_000), (MAX_PIXELS // 1000 + 1, 1000)])
def test_a_decompression_bomb_is_refused_before_it_takes_memory(width, height):
    with pytest.raises(DamagedImage, match="more than 536,870,912 pixels"):
        decode(io.BytesIO(claiming(width, height)))


def test_an_honest_image_of_14_000_by_14_000_pixels_is_read(monkeypatch, recwarn):
    monkeypatch.setattr("tnt_timm.data.decoding.to_rgb", lambda image: image.size)  # it takes a gigabyte
    assert decode(io.BytesIO(claiming(14_000, 14_000))) == (14_000, 14_000)
    assert decode(io.BytesIO(claiming(20_000, 20_000))) == (20_000, 20_000)
    assert not recwarn.list


def test_an_image_that_memory_cannot_hold_is_damage():
    with pytest.raises(DamagedImage, match="more memory than there is"), as_damage():
        raise MemoryError


def test_a_shortage_of_the_machine_is_no_damage(monkeypatch):
    monkeypatch.setattr("tnt_timm.data.decoding.ORDINARY", 2**62)  # there is not even memory for an ordinary image
    with pytest.raises(UserError, match="out of memory"), as_damage():
        raise MemoryError
    with pytest.raises(UserError, match="ulimit -n"), as_damage():
        raise OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(RuntimeError, match="killed by signal"), as_damage():  # torch raises it wherever the process is
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def test_a_png_with_much_metadata_is_read():
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("XML", "<history/>" * 300_000, zip=True)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    assert decode(file).size == (8, 8)


# ---- EXIF


@pytest.mark.parametrize("written, expected", [(None, 1), (0, 1), (1, 1), (6, 6), (8, 8), (9, 1), (65535, 1)])
def test_orientation(written, expected):
    exif, file = Image.Exif(), io.BytesIO()
    if written is not None:
        exif[0x112] = written
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    with Image.open(file) as image:
        assert orientation(image) == expected
