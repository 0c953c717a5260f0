"""README and docs: the Python blocks run as they stand, the model table is measured, and every link leads somewhere.

The commands are in test_readme_commands.py.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from tnt_timm.models.variants import DISTILLED, PYRAMIDS, VARIANTS

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text()
PAGES = [
    REPO / "README.md",
    REPO / "CONTRIBUTING.md",
    REPO / "benchmarks/README.md",
    *sorted((REPO / "docs").glob("*.md")),
]
BLOCKS = [
    (page.name, block) for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]


@pytest.fixture
def as_after_the_commands(tmp_path, monkeypatch):
    """What a reader has by then: weights on the Hub (here timm's network, untrained), the release's file, a run."""
    from tnt_timm.models.official_tnt import OFFICIAL

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
    for folder in ("output/digits", "exported"):
        timm.models.save_for_hf(run, folder, model_config=dict(label_names=names), safe_serialization=True)


@pytest.mark.parametrize("page, block", BLOCKS, ids=[name for name, _ in BLOCKS])
def test_a_python_block_runs(page, block, as_after_the_commands):
    exec(compile(block, page, "exec"), {"__name__": "readme"})


def anchors(page: Path) -> set:
    """What `#...` may follow a link to the page, as GitHub makes it from the headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page):
    links = re.findall(
        r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    )
    for path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(REPO) and target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|configs|benchmarks|scripts)/[\w/.-]+)`", "".join(
    page.read_text() for page in PAGES)))))  # fmt: skip
def test_paths_that_are_named_are_there(path):
    assert (REPO / path).exists()


def measured(name: str) -> tuple:
    """Parameters, and multiply-adds of one image in billions."""
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9


def test_the_model_table_is_measured():
    rows = re.findall(r"^\| (`(?:pyramid_)?tnt_.*?`) \| (.*?) \| (.*?) \|", README, re.MULTILINE)
    found = {}
    for names, parameters, gflops in rows:
        for name, *figures in zip(re.findall(r"\w*tnt_\w+", names), parameters.split(", "), gflops.split(", ")):
            found[name] = figures
    assert set(found) == {*VARIANTS, *DISTILLED, *PYRAMIDS}
    for name, (parameters, gflops) in found.items():
        count, cost = measured(name)
        assert (f"{count:,}", f"{cost:.2f}") == (parameters, gflops), name


def test_a_row_of_variants_is_a_model_that_trains(tmp_path):
    """CONTRIBUTING's own row, in a copy of the package."""
    (row,) = re.findall(r"`(\"tnt_xs\": dict\(.*?\),)`", (REPO / "CONTRIBUTING.md").read_text())
    shutil.copytree(REPO / "tnt_timm", tmp_path / "tnt_timm", ignore=shutil.ignore_patterns("__pycache__"))
    variants = tmp_path / "tnt_timm" / "models" / "variants.py"
    table = "VARIANTS: Dict[str, Dict[str, Any]] = {\n"
    variants.write_text(variants.read_text().replace(table, f"{table}    {row}\n"))
    argv = (
        "--config configs/digits.yaml --model tnt_xs --model-kwargs depth=1 -b 256 --epochs 1 --warmup-epochs 0".split()
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from tnt_timm.commands.train import main; sys.exit(main())",
        ]
        + [*argv, "--workers", "0", "--device", "cpu", "--output", str(tmp_path / "output")],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "model      tnt_xs, " in done.stdout and "done: best" in done.stdout


def test_the_results_are_those_of_the_study():
    """Each row of the README's table: the paper's figure and ours stand in one row of the study's page."""
    rows = re.findall(r"^\| .* \| (\+[\d.]+)[^|]* \| (\S+ ± [\d.]+) \|$", README, re.MULTILINE)
    summary = (REPO / "benchmarks/miniature.md").read_text()
    assert len(rows) == 6
    for paper, ours in rows:
        assert f"| {paper} | {ours} |" in summary


def test_the_conclusions_are_those_of_the_study():
    """Their differences stand in the summary; otherwise the page would be written without them."""
    conclusions = (REPO / "benchmarks/miniature/conclusions.md").read_text()
    summary, _, rest = (REPO / "benchmarks/miniature.md").read_text().partition(conclusions)
    numbers = re.findall(r"([+-][\d.]+ ± [\d.]+)", conclusions)
    assert rest and len(numbers) > 5 and all(number in summary for number in numbers)
