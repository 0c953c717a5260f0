"""README's Python blocks run as they stand."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from tnt_timm.models.variants import DISTILLED, VARIANTS

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def title(block: str) -> str:
    return README[: README.index(block)].rpartition("\n## ")[2].partition("\n")[0]


@pytest.fixture
def as_after_the_commands(tmp_path, monkeypatch):
    """What a reader has by then: weights on the Hub (here timm's network, untrained), the release's file, a run."""
    from tnt_timm.models.checkpoints import OFFICIAL

    published = timm.create_model("tnt_s_patch16_224").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(published))
    theirs = {ours: official for official, ours in OFFICIAL.items()}
    release = {".".join(theirs.get(part, part) for part in name.split(".")): value for name, value in published.items()}
    release["inner_pos"] = release["inner_pos"].flatten(2).transpose(1, 2)
    release["outer_tokens"] = torch.zeros(1, 196, 384)
    monkeypatch.chdir(tmp_path)
    torch.save(release, "tnt_s_81.5.pth.tar")
    run = timm.create_model("tnt_ti", img_size=32, num_classes=10, depth=2)
    names = [str(digit) for digit in range(10)]
    timm.models.save_for_hf(run, "output/digits", model_config=dict(label_names=names), safe_serialization=True)


@pytest.mark.parametrize("block", BLOCKS, ids=title)
def test_a_python_block_of_the_readme_runs(block, as_after_the_commands):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def measured(name: str) -> tuple:
    """Parameters, and multiply-adds of one image in billions."""
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9


def test_the_model_table_is_measured():
    rows = re.findall(r"^\| (`tnt_.*?`) \| (.*?) \| (.*?) \|", README, re.MULTILINE)
    found = {}
    for names, parameters, gflops in rows:
        for name, *figures in zip(re.findall(r"tnt_\w+", names), parameters.split(", "), gflops.split(", ")):
            found[name] = figures
    assert set(found) == {*VARIANTS, *DISTILLED}
    for name, (parameters, gflops) in found.items():
        count, cost = measured(name)
        assert (f"{count:,}", f"{cost:.2f}") == (parameters, gflops), name
