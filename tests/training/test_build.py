"""Which parts the settings choose."""

import pytest

from tnt_timm.data.decoding import decode, decode_fast
from tnt_timm.settings import config
from tnt_timm.training.build import open_data


@pytest.mark.parametrize(
    ("flags", "decoder"),
    [("", decode), ("--augment-on device", decode_fast), ("--augment-on device --no-aug", decode)],
)
def test_only_training_images_are_decoded_fast(flags, decoder, make_folder):
    settings = config.resolve(["--data-dir", str(make_folder()), *flags.split()])[0]
    training, validation, *_ = open_data(settings)
    assert training.decoder is decoder and validation.decoder is decode
