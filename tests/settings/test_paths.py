"""Paths with ~ and variables: expanded for every setting that is a path, in files and on the command line."""

import importlib
import typing

import pytest

from tnt_timm.errors import ConfigError
from tnt_timm.settings import config, paths
from tnt_timm.settings.paths import expand


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("EMPTY", "")


@pytest.mark.parametrize(
    "text, path",
    [
        ("~", "/home/me"),
        ("~/runs", "/home/me/runs"),
        ("$SCRATCH/x", "/scratch/x"),
        ("${SCRATCH}s/$SCRATCH", "/scratchs//scratch"),
        ("local-dir:~/x", "local-dir:/home/me/x"),
        ("hfds/$SCRATCH/x", "hfds//scratch/x"),
        *((same, same) for same in ("", "a/~/b", "./~", "tnt_s", "digits/0-4", "hf-hub:timm/x", "a$", "100 $ bills")),
        *((same, same) for same in ("https://x.org/~me/$NOWHERE", "s3://a/$b", "pipe:cat ~/x/$NOWHERE")),
    ],
)
def test_expansion(text, path):
    assert expand(text) == path


UNKNOWN = {"$NOWHERE/x": "$NOWHERE", "a/${NOWHERE}": "${NOWHERE}", "$EMPTY/x": "$EMPTY", "US$1": "$1"}


@pytest.mark.parametrize("text, name", UNKNOWN.items())
def test_an_unknown_variable_is_an_error_unless_a_file_has_this_name(text, name, tmp_path):
    with pytest.raises(ValueError, match="environment variable") as caught:
        expand(text)
    assert f" {name} is not set" in str(caught.value)
    (tmp_path / text).mkdir(parents=True)
    assert expand(text) == text


def test_an_unknown_home_folder_is_an_error():
    with pytest.raises(ValueError, match="no home folder ~nobody-of-this-name is known"):
        expand("~nobody-of-this-name/x")


KEYS = "model pretrained_path initial_checkpoint data_dir dataset class_map kd_model_name output resume".split()


@pytest.mark.parametrize("key", KEYS)
def test_training_settings_are_expanded_in_files_and_on_the_command_line(key, tmp_path):
    prefix = "local-dir:" if key in ("model", "kd_model_name") else ""
    (tmp_path / "a.yaml").write_text(f"{key}: {prefix}~/x\nexperiment: run-$SCRATCH_ID\n")
    with pytest.raises(
        ConfigError, match=r"a.yaml: experiment: run-\$SCRATCH_ID: the environment variable \$SCRATCH_ID"
    ):
        config.resolve(["--config", "a.yaml"])
    (tmp_path / "a.yaml").write_text(f"{key}: {prefix}~/x\n")
    flag = "--" + key.replace("_", "-")
    for argv in (["--config", "a.yaml"], [flag, f"{prefix}$HOME/x"]):
        assert config.flat(config.resolve(argv).config)[key] == f"{prefix}/home/me/x"
    with pytest.raises(ConfigError, match=rf"command line: {key}: .*\$NOWHERE is not set"):
        config.resolve([flag, f"{prefix}$NOWHERE/x"])


def test_the_paths_of_configs_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("seed: 7\n")
    (tmp_path / "b.yaml").write_text("base: ~/a.yaml\ndata: $SCRATCH/data\n")
    found = config.flat(config.resolve(["--config", "~/b.yaml"]).config)
    assert (found["seed"], found["data_dir"]) == (7, "/scratch/data")
    (tmp_path / "b.yaml").write_text("base: $NOWHERE/a.yaml\n")
    with pytest.raises(ConfigError, match=r"b.yaml: base: .*\$NOWHERE is not set"):
        config.resolve(["--config", "~/b.yaml"])


def test_a_job_on_another_machine_may_have_more_variables():
    with paths.for_another_machine():
        assert config.resolve(["--data-dir", "$NOWHERE/x"]).config.data.data_dir == "$NOWHERE/x"


PATHS = {
    "benchmark": "models output",
    "check": "dir data_dir class_map output",
    "complexity": "models output",
    "export": "input output",
    "predict": "source images output",
    "submit": "config",
    "validate": "path checkpoint results_file confusion_matrix",
    "validate_all": "models results_file",
}


@pytest.mark.parametrize("command", PATHS)
def test_paths_of_the_other_commands_are_expanded(command, tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    fields = importlib.import_module(f"tnt_timm.commands.{command}").Settings
    for name in PATHS[command].split():
        several = typing.get_origin(fields.model_fields[name].annotation) is list
        needed = {key: 1 if key == "nodes" else ["x"] if key in ("models", "images") else "x"
                  for key, field in fields.model_fields.items() if field.is_required()}  # fmt: skip
        value = "$SCRATCH/x"
        found = getattr(config.own_settings(fields, {**needed, name: [value] if several else value}), name)
        assert found == ([f"{tmp_path}/x"] if several else f"{tmp_path}/x")


def test_an_output_file_is_no_folder(tmp_path):
    from tnt_timm.commands.complexity import Settings

    with pytest.raises(ConfigError, match=r"output: .*is a folder; add the name of a file"):
        config.own_settings(Settings, {"output": str(tmp_path)})


@pytest.mark.parametrize(
    "name", [".", "..", "a/b", " ", "a\nb", "a\x1bb", "\udce9", "x" * 256, "猫" * 86, "~", "$NOWHERE"]
)
def test_an_experiment_is_the_name_of_a_folder(name):
    with pytest.raises(ConfigError, match="experiment"):
        config.resolve(["--experiment", name])


@pytest.mark.parametrize(
    "argv, name",
    [
        (["--experiment", ""], "tnt_s"),
        (["--experiment", "", "--config", "tnt_b"], "tnt_b"),
        (["--model", "hf-hub:timm/vit_x"], "vit_x"),
        (["--model", "local-dir:/a/b/"], "b"),
        (["--experiment", "...a b猫"], "...a b猫"),
    ],
)
def test_the_default_experiment(argv, name):
    assert config.resolve(argv).config.run.experiment == name


@pytest.mark.parametrize("name", ["image", "output"])
def test_paths_of_figures_are_expanded(name, tmp_path, monkeypatch):
    from tnt_timm.figures.attention import AttentionSettings

    monkeypatch.setenv("SCRATCH", str(tmp_path))
    (tmp_path / "x.png").write_text("")
    found = config.own_settings(AttentionSettings, {name: "$SCRATCH/x.png"})
    assert getattr(found, name) == f"{tmp_path}/x.png"


@pytest.mark.parametrize(
    "command, argv", [("figures", ["curves", "$NOWHERE/x", "--output", "a.png"]), ("validate_all", ["a.txt"])]
)
def test_paths_that_no_schema_has_are_expanded(command, argv, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("$NOWHERE/x\n")
    more = [] if command == "figures" else ["--results-file", "r.csv", "--data-dir", "."]
    assert importlib.import_module(f"tnt_timm.commands.{command}").main([*argv, *more]) == 2
    assert "$NOWHERE/x: the environment variable $NOWHERE is not set" in capsys.readouterr().err
