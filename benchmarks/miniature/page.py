"""Write the study's page with tables, and CSV files beside it: all runs, the sizes of figure 4, and the features."""

import csv
import io
import os
import re
from pathlib import Path
from statistics import median
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence

import plan
from claims import CLAIMS, TRANSFER, Claim, Comparison
from plan import Run, Size
from records import Records
from results import Mean, difference, mean_of, rates, test_accuracies, verdict

from tnt_timm.atomic_files import replace_text
from tnt_timm.console import table

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEMPLATE = Path(__file__).with_name("template.md")
CONCLUSIONS = Path(__file__).with_name("conclusions.md")
COLUMNS = (
    "name network seed lr images epochs held_out_top1 held_out_loss best_epoch test_top1 test_loss test_images".split()
)
COLUMNS += "parameters multiply_adds seconds device instruction_set torch commit".split()


class Cost(NamedTuple):
    """Cost of a network for one image."""

    parameters: int
    multiply_adds: int


class Page:
    """What the study has found.

    Args:
        runs: the runs of the study.
        records: of the finished ones, by name.
        costs: of the networks, by name.
        size: how much is trained.
        features: of the trained pair, from `features.measure_features`.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        records: Records,
        costs: Dict[str, Cost],
        size: Size,
        features: Sequence[Dict[str, Any]] = (),
    ):
        self.runs, self.records, self.costs, self.size = runs, records, costs, size
        self.features = features

    def text(self, pictures: str, docs: str, name: str) -> str:
        """Return the page, as Markdown.

        Args:
            pictures, docs: the folders of pictures and documentation, relative to the page.
            name: of the page, without suffix.
        """
        size, records = self.size, list(self.records.values())
        left = len(self.runs) - len(records)
        summary = self._summary([*CLAIMS, *TRANSFER])
        return TEMPLATE.read_text(encoding="utf-8").format(
            **size._asdict(),
            state=f"\n**Not finished:** {len(records)} of {len(self.runs)} runs are done.\n" if left else "",
            updates=size.images // plan.BATCH_SIZE * size.epochs,
            grid=", ".join(f"{lr:g}" for lr in plan.RATES),
            search_epochs=plan.search_epochs(size.epochs),
            hours=sum(record["seconds"] for record in records) / 3600,
            hardware=listed(f"{record['device']} ({record['instruction_set']})" for record in records),
            versions=listed(f"PyTorch {r['versions']['torch']}, timm {r['versions']['timm']}" for r in records),
            commits=listed(str(record["commit"])[:12] for record in records),
            summary=summary,
            claims="\n".join(map(self._claim, (*CLAIMS, *TRANSFER))),
            resolved=self._resolved(),
            outside=self._outside(),
            conclusions=conclusions(summary),
            features=self._features(),
            pictures=pictures,
            docs=docs,
            name=name,
        )

    def _summary(self, claims: Sequence[Claim]) -> str:
        rows = []
        for claim in claims:
            for at, comparison in enumerate(claim.comparisons):
                rows.append([claim.title if at == 0 else "", *self._compare(claim, comparison)])
        return table(["claim", "difference", "paper", "here, with 95 % interval", "seeds", "verdict"], rows, "markdown")

    def _compare(self, claim: Claim, comparison: Comparison) -> List[str]:
        labels = {row.network: row.label for row in claim.rows}
        found = difference(self.records, comparison.better, comparison.other)
        names = f"{labels[comparison.better]} - {labels[comparison.other]}"
        paper = "" if comparison.paper is None else f"{comparison.paper:+.1f}"
        count = str(found.count) if found else "0"
        return [names, paper, interval(found), count, verdict(found, comparison.paper)]

    def _claim(self, claim: Claim) -> str:
        """Return a section."""
        note = f"\n{claim.note}\n" if claim.note else ""
        return f"## {claim.title}\n\n{claim.paper}\n\n{self._rows(claim)}{note}"

    def _rows(self, claim: Claim) -> str:
        rows = []
        for network, label, paper in claim.rows:
            cost = self.costs[network]
            accuracies = test_accuracies(self.records, network)
            seeds = ", ".join(f"{value:.2f}" for _, value in sorted(accuracies.items()))
            rates_here = ", ".join(f"{lr:g}" for lr in rates(self.records, network))
            published = "" if paper is None else f"{paper:.1f}"
            size = [f"{cost.parameters:,}", f"{cost.multiply_adds / 1e6:.1f}"]
            rows.append([label, *size, rates_here, with_deviation(mean_of(accuracies.values())), seeds, published])
        header = ["network", "parameters", "multiply-adds (M)", "lr", "top-1 (%), mean ± s.d.", "each seed", "paper"]
        return table(header, rows, "markdown")

    def _resolved(self) -> str:
        """Return how small a difference the intervals resolve, as a sentence."""
        found = [difference(self.records, c.better, c.other) for claim in CLAIMS for c in claim.comparisons]
        widths = sorted(each.half_width for each in found if each and each.half_width is not None)
        if not widths:
            return ""
        return f" The median interval on Fashion-MNIST is ± {median(widths):.2f} points."

    def _outside(self) -> str:
        """Return in how many comparisons the paper's difference is outside of the interval, as a sentence."""
        compared = [c for claim in (*CLAIMS, *TRANSFER) for c in claim.comparisons if c.paper is not None]
        found = [(difference(self.records, c.better, c.other), c.paper) for c in compared]
        measured = [(each, paper) for each, paper in found if each and each.half_width is not None]
        if not measured:
            return ""
        count = sum(abs(each.mean - paper) > each.half_width for each, paper in measured)
        return f" In {count} of {len(measured)} comparisons, the interval does not contain the paper's difference."

    def _features(self) -> str:
        """Return the table of the features: a row per block, mean and deviation over the seeds."""
        columns = [("correlation", 1, 3), ("components", 1, 1), ("local", 100, 1), ("words_attended", 1, 1)]
        measured = {"tnt": "TNT", "deit": "DeiT"}
        rows = []
        for block in sorted({row["block"] for row in self.features}):
            cells = []
            for measure, factor, digits in columns:
                for network in measured if measure != "words_attended" else ("tnt",):
                    here = (row for row in self.features if (row["block"], row["network"]) == (block, network))
                    cells.append(with_deviation(mean_of(factor * row[measure] for row in here), digits))
            rows.append([str(block), *cells])
        names = ["correlation", "components (%)", "pixels explained (%)"]
        header = [
            "block",
            *(f"{name}, {network}" for name in names for network in measured.values()),
            "words attended, TNT",
        ]
        return table(header, rows, "markdown") if rows else "Measured when the study ends, or when its time is up.\n"

    def csv(self) -> str:
        """Return a row per finished run, in the order of the plan."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for run in self.runs:
            if record := self.records.get(run.name):
                more = {**self.costs[run.network.name]._asdict(), "torch": record["versions"]["torch"]}
                writer.writerow({**record, **more})
        return text.getvalue()

    def sizes(self) -> Iterator[Dict[str, Any]]:
        """Yield the rows of figure 4: the networks of the first claim, as a table of `scripts/figures.py accuracy-cost`."""
        for network, label, _ in CLAIMS[0].rows:
            found = mean_of(test_accuracies(self.records, network).values())
            if found:
                cost = self.costs[network]
                costs = dict(gmacs=cost.multiply_adds / 1e9, params_m=cost.parameters / 1e6)
                error = "" if found.half_width is None else f"{found.half_width:.3f}"
                yield dict(model=label, top1=f"{found.mean:.3f}", top1_error=error, **costs, source="Fashion-MNIST")


def conclusions(summary: str) -> str:
    """Return the section written by hand if it is about these runs: if the summary has all of its differences."""
    text = CONCLUSIONS.read_text(encoding="utf-8")
    return text if all(number in summary for number in re.findall(r"[+-][\d.]+ ± [\d.]+", text)) else ""


def listed(texts: Iterable[str]) -> str:
    """Return texts without duplicates."""
    return "; ".join(sorted(set(texts))) or "none yet"


def with_deviation(found: Optional[Mean], digits: int = 2) -> str:
    if found is None:
        return "not run yet"
    return f"{found.mean:.{digits}f}" + ("" if found.deviation is None else f" ± {found.deviation:.{digits}f}")


def interval(found: Optional[Mean]) -> str:
    if found is None:
        return "not run yet"
    return f"{found.mean:+.2f}" + ("" if found.half_width is None else f" ± {found.half_width:.2f}")


def write(path: Path, page: Page, pictures: Path) -> Path:
    """Write the page, and beside it the CSV and the table of figure 4. Return the path of this table.

    Raises:
        UserError: a file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    links = (os.path.relpath(folder, path.parent).replace(" ", "%20") for folder in (pictures, DOCS))
    replace_text(path, page.text(*links, path.stem))
    replace_text(path.with_suffix(".csv"), page.csv())
    _write_rows(path.with_name(f"{path.stem}_features.csv"), page.features)
    return _write_rows(path.with_name(f"{path.stem}_sizes.csv"), list(page.sizes()))


def _write_rows(path: Path, rows: Sequence[Dict[str, Any]]) -> Path:
    path.unlink(missing_ok=True)  # perhaps of another study
    if rows:
        replace_text(path, table(list(rows[0]), [[str(value) for value in row.values()] for row in rows], "csv"))
    return path
