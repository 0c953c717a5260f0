"""What the study trains: its networks, and the runs of each, in the order in which they should be made.

A network's learning rate is chosen first, by short runs that are compared on the held-out images. The runs of the study follow,
one per seed. Each is measured once on the test images, which nothing else sees.
"""

import functools
from pathlib import Path
from typing import Iterator, NamedTuple, Optional, Sequence, Tuple

from tnt_timm.settings import config
from tnt_timm.settings.schema import TrainConfig

RATES = (5e-4, 1e-3, 2e-3)  # the grid of learning rates, the same for all
LOWER_RATE, HIGHER_RATE = 2.5e-4, 4e-3  # tried only if the best is at an end of the grid
SEARCH_SEED = 0  # not a seed of the study
SEARCH_SHARE = 0.4  # of the epochs
BATCH_SIZE = 64  # of the configs


class Network(NamedTuple):
    """A network, and the data that it is trained on.

    Attributes:
        name: in file names and in the CSV.
        config: file in configs/fashion/.
        kwargs: model_kwargs that differ from the config's.
        flags: settings of train.py that differ from the config's.
        needs: network whose weights the flag of `source` names: the teacher, or the start of fine-tuning.
        source: that flag.
        data: the dataset.
    """

    name: str
    config: str
    kwargs: Tuple[str, ...] = ()
    flags: Tuple[str, ...] = ()
    needs: str = ""
    source: str = ""
    data: str = "fashion"


class Size(NamedTuple):
    """How much is trained."""

    images: int  # training images of Fashion-MNIST
    held_out: int  # the last images of its training split
    epochs: int
    seeds: int

    def of(self, network: "Network") -> Tuple[int, int]:
        """Return the training images and epochs of a network. MNIST has more images than digits, and gets half the epochs."""
        if network.data == "fashion":
            return self.images, self.epochs
        return (1200, self.epochs) if network.data == "digits" else (2000, max(2, -(-self.epochs // 2)))


class Run(NamedTuple):
    """A training run.

    Attributes:
        lr: of a search; None if the search is to choose it.
        flags: of train.py, without seed, learning rate and output.
        test_split: to measure on at the end, empty in a search.
        needs: name of the run whose weights it needs, if any.
        images, epochs: how much it trains.
        place: flags that say where its data is.
    """

    name: str
    network: Network
    seed: int
    lr: Optional[float]
    flags: Tuple[str, ...]
    test_split: str
    needs: str
    images: int
    epochs: int
    place: Tuple[str, ...]


TOKEN = ("--model", "tnt_s_distilled", "--kd-distill-type", "token", "--kd-token-distill-type", "hard")
LOGIT = ("--kd-distill-type", "logit")
NETWORKS = (
    Network("tnt", "tnt"),
    Network("deit", "deit"),
    Network("tnt_small", "tnt_small"),
    Network("deit_small", "deit_small"),
    Network("tnt_se", "tnt", ("se=true",)),
    Network("tnt_positions_none", "tnt", ("pos_embed=none",)),
    Network("tnt_positions_sentence", "tnt", ("pos_embed=sentence",)),
    Network("tnt_positions_word", "tnt", ("pos_embed=word",)),
    Network("tnt_inner_2", "tnt", ("inner_blocks=[1,3]",)),
    Network("tnt_inner_1", "tnt", ("inner_blocks=[1]",)),
    Network("tnt_inner_0", "tnt", ("inner_blocks=[]",)),
    Network("tnt_heads_1", "tnt", ("num_heads_inner=1",)),
    Network("tnt_heads_4", "tnt", ("num_heads_inner=4",)),
    # As in the paper, M x C is the same for all. Words of one pixel are three wide, which two heads do not divide.
    Network("tnt_words_64", "tnt", ("first_stride=1", "inner_dim=3", "num_heads_inner=1")),
    Network("tnt_words_4", "tnt", ("first_stride=4", "inner_dim=48")),
    Network("tnt_small_token", "tnt_small", (), TOKEN, "tnt", "--kd-model-name"),
    Network("tnt_small_logit", "tnt_small", (), LOGIT, "tnt", "--kd-model-name"),
)
# Fine-tuned at one and a half times the size, as 384 is to 224 pixels, and trained from scratch on the same images
LARGER = ("--img-size", "48", "--hflip", "0")
DIGITS = ("--dataset", "digits", "--train-split", "train[:1200]", "--val-split", "train[1200:]")
MNIST = ("--dataset", "folder", "--train-split", "train", "--val-split", "held_out")
TRANSFER = tuple(
    Network(f"{name}_on_{data}{suffix}", name, (), (*LARGER, *flags), start, "--pretrained-path" if start else "", data)
    for data, flags in (("digits", DIGITS), ("mnist", MNIST))
    for name in ("tnt", "deit")
    for suffix, start in (("", name), ("_scratch", ""))
)
TEST_SPLIT = {"fashion": "test", "digits": "validation", "mnist": "test"}


def final_name(network: str, seed: int) -> str:
    return f"{network}-seed{seed}"


def search_name(network: str, lr: float) -> str:
    return f"{network}-lr{lr:g}"


def search_epochs(epochs: int) -> int:
    """Return the length of the runs that choose a learning rate: more than the one epoch of warm-up."""
    return max(2, round(SEARCH_SHARE * epochs))


def settings(network: Network) -> TrainConfig:
    """Return the resolved settings of a network, at the learning rate and seed of its config."""
    return config.resolve([*architecture(network), *network.flags]).config


@functools.cache
def architecture(network: Network) -> Tuple[str, ...]:
    """Return the flags for config and model_kwargs. A flag replaces all kwargs of the config, so they are repeated."""
    flags = ("--config", f"fashion/{network.config}")
    if not network.kwargs:
        return flags
    base = config.resolve(flags).config.network.model_kwargs
    changed = {given.partition("=")[0] for given in network.kwargs}
    kept = (f"{key}={value}" for key, value in base.items() if key not in changed)
    return (*flags, "--model-kwargs", *kept, *network.kwargs)


class Plan:
    """All runs of the study.

    Args:
        size: how much is trained.
        output: folder of the runs.
        data_flags: flags of train.py that say where Fashion-MNIST is.
    """

    def __init__(self, size: Size, output: Path, data_flags: Sequence[str] = ()):
        self.size, self.output, self.data_flags = size, output, data_flags

    def runs(self) -> Iterator[Run]:
        """Yield the most useful runs first: a study that is cut short has searched every rate and then has few seeds."""
        seeds = range(1, self.size.seeds + 1)
        yield from (search for network in NETWORKS for search in self._searches(network))
        yield from (self._final(network, seed) for seed in seeds for network in NETWORKS)
        yield from (search for network in TRANSFER for search in self._searches(network))
        yield from (self._final(network, seed) for seed in seeds for network in TRANSFER)

    def _searches(self, network: Network) -> Iterator[Run]:
        epochs = search_epochs(self.size.of(network)[1])
        for lr in (*RATES, LOWER_RATE, HIGHER_RATE):
            yield self._run(search_name(network.name, lr), network, SEARCH_SEED, lr, epochs)

    def _final(self, network: Network, seed: int) -> Run:
        run = self._run(final_name(network.name, seed), network, seed, None, self.size.of(network)[1])
        return run._replace(test_split=TEST_SPLIT[network.data])

    def _run(self, name: str, network: Network, seed: int, lr: Optional[float], epochs: int) -> Run:
        images, _ = self.size.of(network)
        flags = [*architecture(network), *network.flags, "--epochs", str(epochs)]
        if network.data == "fashion":
            flags += ["--train-split", f"train[:{images}]", "--val-split", f"train[-{self.size.held_out}:]"]
        if network.data == "mnist":
            flags += ["--data-dir", str(self.output / "mnist")]
        needs = final_name(network.needs, max(seed, 1)) if network.needs else ""  # a search uses the weights of seed 1
        if needs:
            prefix = "local-dir:" if network.source == "--kd-model-name" else ""
            flags += [network.source, f"{prefix}{self.output / needs}"]
        place = tuple(self.data_flags) if network.data == "fashion" else ()
        return Run(name, network, seed, lr, tuple(flags), "", needs, images, epochs, place)
