"""submit.py without a cluster: what it would submit, and what it refuses to."""

import shlex
import subprocess
from types import SimpleNamespace

import pytest

from tnt_timm.commands.submit import main
from tnt_timm.settings import shipped

DIGITS = "configs/digits.yaml"
TWO = ["--nodes", "2", "--procs-per-node", "1"]


@pytest.fixture
def submit(template, monkeypatch, capfd):
    """submit.py in this process: arguments -> status, stdout, stderr."""
    monkeypatch.chdir(template.parents[2])
    monkeypatch.setenv("PATH", "/nowhere")  # no sbatch

    def run(*argv):
        status = main(argv)
        out, err = capfd.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


def test_the_script_is_the_template_with_this_job_in_it(submit, template, tmp_path):
    done = submit(DIGITS, "-N", "2", "--gpus-per-node", "a100:8", "-p", "gpu", "--comment=two words", "--exclusive",
                  "--dry-run", "--", "--lr", "1e-3", "--experiment", "it's")  # fmt: skip
    assert done.status == 0, done.err
    options = ["--nodes=2", "--gpus-per-node=a100:8", "-p gpu", "'--comment=two words'", "--exclusive"]
    lines = done.out.splitlines()
    assert [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")][-5:] == options
    assert (
        f"export TNT_TRAIN={shlex.quote(shipped.TRAIN)}" in lines
    )  # train.py of the checkout, or the installed module
    assert any(line.endswith("/configs/digits.yaml --lr 1e-3 --experiment 'it'\"'\"'s'") for line in lines)
    assert [line for line in template.read_text().splitlines() if line not in lines] == [
        "# ---- submit.py writes its options here ----"
    ]
    (tmp_path / "job").write_text(done.out)
    subprocess.run(["/bin/bash", "-n", tmp_path / "job"], check=True)


def test_seeds_become_an_array_of_runs_in_their_own_folders(submit):
    text = submit(DIGITS, *TWO, "--seeds", "1", "42", "--dry-run").out
    assert "\n#SBATCH --array=1,42\n" in text and "\nexport TNT_EXPERIMENT=digits\n" in text


@pytest.mark.parametrize(
    "argv, error",
    [
        (["no.yaml", *TWO], "no.yaml: no such file"),
        ([DIGITS, "--procs-per-node", "1"], "--nodes"),
        ([DIGITS, "--nodes", "0", "--procs-per-node", "1"], "nodes: 0: expected greater than 0"),
        ([DIGITS, "--nodes", "2"], "pass --gpus-per-node, or --procs-per-node to train on CPUs"),
        ([DIGITS, "--nodes", "2", "--gpus-per-node", "a100"], "--gpus-per-node: 'a100': expected a number"),
        ([DIGITS, *TWO, "--gpus-per-node", "2"], "leave out --procs-per-node"),
        ([DIGITS, *TWO, "--seeds", "1", "1"], "--seeds: two runs would have the same seed"),
        ([DIGITS, *TWO, "--seeds", "1", "--", "--seed", "2"], "--seed and --seeds"),
        ([DIGITS, *TWO, "--array=1-3"], "--array: pass --seeds"),
        ([DIGITS, "lr=1", *TWO], "'lr=1': unexpected argument"),
        ([DIGITS, *TWO, "--", "--learning-rate", "1"], "--learning-rate: no such setting"),
        ([DIGITS, *TWO, "--", "--lr", "fast"], "lr: 'fast': expected"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(submit, argv, error):
    done = submit(*argv)
    assert done.status == 2 and error in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


def test_without_slurm_it_says_so(submit):
    done = submit(DIGITS, *TWO)
    assert done.status == 1 and "sbatch: not found" in done.err
