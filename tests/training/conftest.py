"""A small run on a folder of images, in this process."""

import pytest


@pytest.fixture
def train(run_train, make_folder, tiny, tmp_path):
    """Trains the tiny model on the folder; returns outcome and run folder."""
    data = make_folder()

    def train(*argv, name="run", status=0):
        out = run_train(data, *tiny, "--output", tmp_path / "out", "--experiment", name, *argv)
        assert out.status == status, out.err
        return out, tmp_path / "out" / name

    return train
