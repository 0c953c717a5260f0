"""Config: what is taken, what is refused, and what each refusal says."""

from pathlib import Path

import pytest
import yaml

from tnt_timm.errors import ConfigError
from tnt_timm.settings import config
from tnt_timm.settings.timm_keys import TIMM_KEYS_LEFT_OUT, TIMM_KEYS_WITHOUT_MEANING

REPO = Path(__file__).parents[2]


def flat(*argv):
    return config.flat(config.resolve([str(arg) for arg in argv]).config)


def refusal(*argv) -> str:
    with pytest.raises(ConfigError) as caught:
        config.resolve([str(arg) for arg in argv])
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_order_is_defaults_base_file_command_line(write):
    write("lr: 1\nseed: 1\nepochs: 90\n", "base.yaml")
    child = write("base: base.yaml\nlr: 2\nseed: 2\n", "child.yaml")
    found = flat("--config", child, "--lr", "3")
    assert (found["lr"], found["seed"], found["epochs"], found["opt"]) == (3.0, 2, 90, "adamw")


def test_base_is_looked_for_beside_the_file_and_may_be_based_again(write, tmp_path):
    (tmp_path / "deep").mkdir()
    write("seed: 7\nlr: 1\n", "a.yaml")
    write("base: ../a.yaml\nlr: 2\n", "deep/b.yaml")
    found = flat("--config", write("base: deep/b.yaml\n", "c.yaml"))
    assert (found["seed"], found["lr"], found["experiment"]) == (7, 2.0, "c")


def test_a_file_based_on_itself_is_refused(write):
    write("base: b.yaml\n", "a.yaml")
    assert "based on itself" in refusal("--config", write("base: a.yaml\n", "b.yaml"))


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("1E-3", 1e-3), (".5e-2", 5e-3), ("5e-4", 5e-4), ("1", 1.0)])
def test_numbers_as_people_write_them(write, text, value):
    assert flat("--config", write(f"lr: {text}\n"))["lr"] == value
    assert flat("--lr", text)["lr"] == value


@pytest.mark.parametrize(
    "text, parts",
    [
        ("weigth_decay: 0.3", ["weigth_decay", "no such setting", "weight_decay"]),
        ("epochs: ten", ["epochs", "'ten'", "whole number"]),
        ("epochs: 1.5", ["epochs", "1.5", "whole number"]),
        ("epochs: true", ["epochs", "True", "whole number"]),
        ("batch_size: -4", ["batch_size", "-4", "greater than 0"]),
        ("batch_size: [4, 5]", ["batch_size", "[4, 5]", "whole number"]),
        ('amp: "false"', ["amp", "'false'", "true or false"]),
        ("amp: 1", ["amp", "true or false"]),
        ("lr: [1]", ["lr", "number"]),
        ("lr: .inf", ["lr", "finite"]),
        ('lr: "1e-3"', ["lr", "'1e-3'", "number"]),
        ("model: tnt_x", ["model", "tnt_x", "tnt_s"]),
        ("model: 3", ["model", "'3'", "no such model"]),
        ("amp_dtype: half", ["amp_dtype", "half", "float16"]),
        ("scale: [0.5]", ["scale", "2 items"]),
        ("scale: [0.9, 0.1]", ["scale", "range"]),
        ("scale: [0.1, big]", ["scale[1]", "'big'", "number"]),
        ("mixup: 0.8\nbatch_size: 5", ["batch_size", "5", "even"]),
        ("hflip: 1.5", ["hflip", "1.5", "less than or equal to 1"]),
        ("lr: 1\nlr: 2", ["lr", "twice", "lines 1 and 2"]),
        ("- lr\n- 2", ["key: value", "list"]),
        ("", ["empty"]),
        ("# only a comment\n", ["empty"]),
        ("lr: 'unclosed", ["not valid YAML"]),
        ("base: [a, b]", ["base", "one YAML file"]),
        ("base: nowhere.yaml", ["nowhere.yaml", "no such file"]),
        ("interpolation: cubic", ["interpolation", "cubic", "bicubic"]),
        ("mean: [0.5]", ["mean", "3 items"]),
        ("std: [1, 0, 1]", ["std[1]", "greater than 0"]),
        ("opt: adamx", ["opt", "adamx", "perhaps you meant adam"]),
        ("cutmix_minmax: [0.8, 0.2]", ["cutmix_minmax", "range"]),
        ("model_kwargs: {depth: 1, depth: 2}", ["depth", "twice"]),
        ("model_kwargs: {img_size: 7}", ["model_kwargs", "img_size", "setting of its own"]),
        ("{a: 1}: 2", ["line 1", "expected a name"]),
        ("lr: \0", ["not valid YAML"]),
        ("experiment: a/b", ["experiment", "a/b"]),
        ("freeze: all", ["freeze", "'all'", "backbone"]),
        ("freeze: backbone", ["freeze", "random", "pretrained_path"]),
        ("freeze: -1\npretrained: true", ["freeze", "number of blocks"]),
        ("model_ema_window: 2\nmodel_ema_decay: 0.9", ["model_ema_window", "model_ema_decay", "null"]),
        ("model_ema_window: 0", ["model_ema_window", "greater than 0"]),
        ("bce_loss: true", ["bce_loss", "not available"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(write, text, parts):
    said = refusal("--config", write(text))
    assert all(part in said for part in parts), said
    assert ".yaml" in said


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--weigth-decay", "0.3"], ["--weigth-decay", "--weight-decay"]),
        (["--epochs", "ten"], ["epochs", "'ten'", "whole number"]),
        (["--epochs"], ["--epochs", "expected one argument"]),
        (["-b", "-4"], ["batch_size", "-4"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--model", "resnet5O"], ["model", "resnet50"]),
        (["folder", "another"], ["'another'"]),
        (["--model-kwargs", "depth"], ["--model-kwargs", "'depth'", "name=value"]),
        (["--opt-kwargs", "=3"], ["name=value"]),
        (["--model-kwargs", "a=1", "a=2"], ["a is given twice"]),
        (["--amp", "true"], ["'true'", "switch"]),
        (["--min-lr", "-1e-3"], ["min_lr", "-0.001", "greater than or equal to 0"]),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_refused_in_one_line(argv, parts):
    said = refusal(*argv)
    assert all(part in said for part in parts), said


def test_the_message_names_the_layer_that_was_wrong(write):
    write("epochs: many\n", "base.yaml")
    child = write("base: base.yaml\nlr: 1\n", "child.yaml")
    assert "base.yaml: epochs" in refusal("--config", child)
    assert "command line: lr" in refusal("--config", child, "--epochs", 3, "--lr", "fast")


def test_timm_spellings():
    found = flat(
        "/data", "-b", "4", "-vb", "6", "-j", "0", "--batch_size=8", "--dr", "0.5", "--torchcompile", "--no-amp"
    )
    assert (found["data_dir"], found["batch_size"], found["validation_batch_size"]) == ("/data", 8, 6)
    assert (found["workers"], found["decay_rate"], found["torchcompile"], found["amp"]) == (0, 0.5, "inductor", False)
    assert flat("--torchcompile", "eager")["torchcompile"] == "eager"
    assert flat("--model-kwargs", "depth=2", "se=true", "x=a")["model_kwargs"] == {"depth": 2, "se": True, "x": "a"}
    assert flat("--no-aug")["no_aug"] is True and flat()["no_aug"] is False
    assert flat("--model-ema")["model_ema"] is True and flat("--no-model-ema")["model_ema"] is False
    assert flat("--experiment", "007")["experiment"] == "007"


def test_official_command_line_is_the_tnt_s_recipe(official):
    """Every setting equals configs/tnt_s.yaml's, but for the names of the model and the output and what is spelled out."""
    official, ours = flat("/data", *official), flat("--config", REPO / "configs/tnt_s.yaml", "--data-dir", "/data")
    assert official.pop("output") == "OUT" and ours.pop("output") == "output"
    assert official.pop("model") == "tnt_s_patch16_224" and ours.pop("model") == "tnt_s"
    assert official.pop("experiment") == "tnt_s_patch16_224" and ours.pop("experiment") == "tnt_s"
    for key, value in {"crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}.items():
        assert ours.pop(key) == value and not official.pop(key)  # not given: the model's, which are these
    assert official == ours


@pytest.mark.parametrize("path", sorted((REPO / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_resolves_to_itself_when_printed_and_given_back(path, tmp_path):
    resolved = config.resolve(["--config", str(path)]).config
    (tmp_path / "printed.yaml").write_text(config.to_yaml(resolved))
    assert config.resolve(["--config", str(tmp_path / "printed.yaml")]).config == resolved


@pytest.mark.parametrize("path", sorted((REPO / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_says_command_arithmetic_cost_and_result(path):
    header = path.read_text().split("\n\n")[0]
    assert f"--config configs/{path.relative_to(REPO / 'configs')}" in path.read_text()
    for word in ("Batch:", "global batch", "Expected:", "Cost:"):
        assert word in header or word in path.read_text(), word


def test_awkward_values_survive_the_round_trip(tmp_path):
    argv = [
        "--experiment",
        "a: b # c",
        "--wandb-tags",
        "yes",
        "1",
        "--model-kwargs",
        "x=null",
        "y=[1, 2]",
        "--lr",
        "1e-8",
    ]
    resolved = config.resolve(argv).config
    (tmp_path / "printed.yaml").write_text(config.to_yaml(resolved))
    assert config.resolve(["--config", str(tmp_path / "printed.yaml")]).config == resolved


def test_a_timm_users_recipe_file_works(write):
    """timm's args.yaml holds all of its flags; those that are off mean nothing, those without meaning are named."""
    keys = {key: values[0] for key, values in TIMM_KEYS_LEFT_OUT.items()}
    keys |= dict.fromkeys(TIMM_KEYS_WITHOUT_MEANING, 1) | {
        "lr": 5e-4,
        "model": "resnet18",
        "aug_repeats": 0,
        "aa": None,
    }
    resolved = config.resolve(["--config", str(write(yaml.safe_dump(keys)))])
    assert resolved.config.schedule.lr == 5e-4 and resolved.config.network.model == "resnet18"
    assert {notice.split()[1] for notice in resolved.notices} == TIMM_KEYS_WITHOUT_MEANING
    assert not set(config.GROUP_OF) & (set(TIMM_KEYS_LEFT_OUT) | TIMM_KEYS_WITHOUT_MEANING)


def test_the_arguments_that_timm_itself_saves_work(write):
    """args.yaml as timm's train.py writes it with nothing but a model and a data folder given."""
    saved = (Path(__file__).parent / "timm_args.yaml").read_text()
    resolved = config.resolve(["--config", str(write(saved)), "--lr", "0.1"]).config
    assert resolved.network.model == "resnet50" and resolved.schedule.cooldown_epochs == 0
    assert resolved.optimizer.opt == "sgd" and resolved.augmentation.aug_repeats == 0
    positional = saved.replace("data: null", "data: /here").replace("data_dir: /data", "data_dir: null")
    assert flat("--config", write(positional))["data_dir"] == "/here" and resolved.data.data_dir == "/data"
    assert flat("--config", write(saved.replace("aug_repeats: 0", "aug_repeats: 3.0")))["aug_repeats"] == 3


def test_the_config_is_frozen():
    resolved = config.resolve([]).config
    with pytest.raises(Exception, match="frozen"):
        resolved.schedule.lr = 3.0


def test_help_is_grouped_and_complete(capsys):
    with pytest.raises(SystemExit) as done:
        config.resolve(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for group in config.GROUPS.values():
        assert f"\n{group.__doc__}:\n" in text
    for key in config.GROUP_OF:
        assert "--" + key.replace("_", "-") in text
