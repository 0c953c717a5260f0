"""What a check found, counted as it comes in: a summary for people, JSON for programs."""

from collections import Counter
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from tnt_timm.data.check.images import TINY, Look
from tnt_timm.data.folders import Some, Survey
from tnt_timm.data.loader_processes import size_text

# Kind of finding: what it is -> what it means for a run
PROBLEMS = {
    "missing_split": ("splits that are not there", "train.py needs both"),
    "unreadable": ("unreadable images", "training replaces them by others, and stops at one in validation"),
    "one_split_only": ("classes in one split only", "train.py refuses them, or with a class map never learns them"),
    "empty_class": ("class folders without an image", "train.py refuses them"),
    "stray": ("images beside the class folders", "train.py refuses them"),
    "deep": ("images deeper than a class folder", "train.py refuses them"),
    "unlisted": ("folders that cannot be listed", "train.py refuses them"),
}
WARNINGS = {
    "not_in_class_map": ("images in folders that the class map leaves out", "they are not used"),
    "not_read": ("images passed over for their suffix", "they are not used"),
    "duplicate": ("validation images that are in training as well", "accuracy counts what was learned by heart"),
    "suffix": ("files whose suffix does not fit their content", "harmless: the content counts"),
    "cmyk": ("CMYK images", "converted to RGB"),
    "greyscale": ("greyscale images", "converted to RGB"),
    "palette": ("palette images", "converted to RGB"),
    "sixteen_bit": ("images of 16 bits per channel", "read as 8"),
    "other_mode": ("images in an unusual mode", "converted to RGB, which cuts off values outside 0 to 255"),
    "transparency": ("images with transparent parts", "the colour that lies hidden there is shown"),
    "rotated": ("images that their EXIF data would turn", "they are shown as they are stored"),
    "tiny": (f"images with an edge below {TINY} pixels", "they are enlarged"),
    "pillow_warns": ("images over which Pillow warns", "they are read all the same"),
}
SHOWN = {"problem": 10, "warning": 3}  # names per kind in the summary; the JSON has more


class Finding(NamedTuple):
    place: str  # a file, a folder, or a class
    detail: str = ""


class SplitTally:
    """What was seen of one split.

    Args:
        name: of the split.
        survey: of its folder.
        class_map: target by class, where the classes are not simply those of the folder.
    """

    def __init__(self, name: str, survey: Survey, class_map: Optional[Mapping[str, int]] = None):
        self.name = name
        self.survey = survey
        names = survey.counts if class_map is None else sorted(class_map, key=class_map.get)
        self.classes = {label: survey.counts.get(label, 0) for label in names if label}
        self.num_images = sum(self.classes.values())
        self.checked = 0
        self.num_bytes = 0
        self.formats: Counter = Counter()
        self.modes: Counter = Counter()
        self.edges: Tuple[int, int] = (0, 0)  # the shortest and the longest, in pixels

    def add(self, look: Look) -> None:
        self.checked += 1
        if look.problem:
            return
        self.num_bytes += look.num_bytes
        self.formats[look.format] += 1
        self.modes[look.mode] += 1
        low, high = self.edges
        self.edges = min(look.size) if not high else min(low, *look.size), max(high, *look.size)

    def as_json(self) -> Dict[str, Any]:
        return {
            "folder": str(self.survey.folder),
            "images": self.num_images,
            "checked": self.checked,
            "bytes": self.num_bytes,
            "classes": self.classes,
            "formats": dict(self.formats.most_common()),
            "modes": dict(self.modes.most_common()),
            "edges": list(self.edges),
            "not_read": dict(self.survey.passed_over.most_common()),
        }

    def lines(self) -> Iterator[str]:
        low, high = (f(self.classes.values(), default=0) for f in (min, max))
        images = f"{self.num_images:,} images in {len(self.classes):,} classes ({low:,} to {high:,} in each)"
        yield f"{self.name:<10} {self.survey.folder}: {images}"
        counts = [", ".join(f"{n:,} {what}" for what, n in seen.most_common()) for seen in (self.formats, self.modes)]
        if self.formats:
            edges = f"edges of {self.edges[0]:,} to {self.edges[1]:,} pixels"
            yield f"{'':<10} {';  '.join(counts)};  {edges};  {size_text(self.num_bytes)}"


class Report:
    """Everything that a check found.

    Args:
        data_dir: the data set's folder.
    """

    def __init__(self, data_dir: str):
        self.data_dir = data_dir
        self.splits: List[SplitTally] = []
        self.findings: Dict[str, Some[Finding]] = {kind: Some() for kind in (*PROBLEMS, *WARNINGS)}
        self.finished = False
        self.seconds = 0.0

    def add(self, kind: str, place: str, detail: str = "", count: int = 1) -> None:
        self.findings[kind].add(Finding(place, detail), count)

    def survey(self, split: SplitTally, by_map: bool) -> None:
        """Take in what the folder shows from outside.

        Args:
            split: to add.
            by_map: a class map names the classes, so that a folder may lie anywhere.
        """
        self.splits.append(split)
        survey = split.survey
        for folder, reason in survey.unlisted.first:
            self.add("unlisted", folder, reason)
        for suffix, count in survey.passed_over.items():
            self.add("not_read", str(survey.folder), f"{count:,} {suffix}", count)
        if not split.num_images:
            self.add("missing_split", str(survey.folder), "no image of any class")
        if by_map:
            for label, count in survey.counts.items():
                if label in split.classes:
                    continue
                self.add("not_in_class_map", str(survey.folder / label), f"{count:,} images", count)
            return
        for name in survey.empty:
            self.add("empty_class", str(survey.folder / name))
        for kind, found in (("stray", survey.stray), ("deep", survey.deep)):
            for path in found.first:
                self.add(kind, path)
            self.findings[kind].count += found.count - len(found.first)

    def compare_classes(self, by_map: bool) -> None:
        """Name the classes that only one of two splits has images of; by a map, training may have more than validation."""
        for here, there in zip(self.splits, reversed(self.splits)):
            if here is there or (by_map and here is self.splits[0]):
                continue
            for label, count in here.classes.items():
                if count and not there.classes.get(label):
                    self.add("one_split_only", label, f"{count:,} images in {here.name}")

    def look(self, split: SplitTally, path: str, look: Look) -> None:
        """Take in what reading a file showed."""
        split.add(look)
        if look.problem:
            self.add("unreadable", path, look.problem)
        for kind, detail in look.notes:
            self.add(kind, path, detail)

    @property
    def num_images(self) -> int:
        return sum(split.num_images for split in self.splits)

    @property
    def num_checked(self) -> int:
        return sum(split.checked for split in self.splits)

    @property
    def problems(self) -> List[str]:
        """The kinds that would hurt a run."""
        return [kind for kind in PROBLEMS if self.findings[kind].count]

    def verdict(self) -> str:
        """The problems in one line; empty where there is none."""
        return ", ".join(f"{PROBLEMS[kind][0]}: {self.findings[kind].count:,}" for kind in self.problems)

    def as_json(self) -> Dict[str, Any]:
        def listed(kinds: Sequence[str]) -> Dict[str, Any]:
            found = {kind: self.findings[kind] for kind in kinds if self.findings[kind].count}
            return {k: {"count": some.count, "first": [f._asdict() for f in some.first]} for k, some in found.items()}

        targets = list(self.splits[0].classes) if self.splits else []
        return {
            "data_dir": self.data_dir,
            "finished": self.finished,
            "seconds": round(self.seconds, 1),
            "classes": targets,
            "splits": {split.name: split.as_json() for split in self.splits},
            "problems": listed(PROBLEMS),
            "warnings": listed(WARNINGS),
        }

    def lines(self) -> Iterator[str]:
        """The summary."""
        for split in self.splits:
            yield from split.lines()
        for title, kinds in (("problem", PROBLEMS), ("warning", WARNINGS)):
            for kind in kinds:
                yield from self._finding_lines(title, *kinds[kind], self.findings[kind])

    def _finding_lines(self, title: str, what: str, meaning: str, found: Some[Finding]) -> Iterator[str]:
        if not found.count:
            return
        yield f"{title:<10} {what}: {found.count:,} ({meaning})"
        shown = found.first[: SHOWN[title]]
        for place, detail in shown:
            yield f"{'':<12} {place}{f': {detail}' if detail else ''}"
        if len(found.first) > len(shown):
            yield f"{'':<12} ..."


class Twins:
    """Finds validation images whose file is in training as well.

    Args:
        report: to add them to.
        small: the split that is read first. Only its files are remembered, so let it be the smaller one.
    """

    def __init__(self, report: Report, small: SplitTally):
        self.report = report
        self.small = small
        self.validation = report.splits[-1]
        self.seen: Dict[bytes, str] = {}  # content -> a file that has it
        self.more: Counter = Counter()  # content -> how many more files have it

    def look(self, split: SplitTally, path: str, look: Look) -> None:
        """Take in what reading a file showed."""
        content = look.digest
        if content and split is self.small:
            if self.seen.setdefault(content, path) != path:
                self.more[content] += 1
        elif content in self.seen and split is self.validation:
            self.report.add("duplicate", path, f"the same file as {self.seen[content]}")
        elif content in self.seen:  # found for all validation images that have it
            self.report.add(
                "duplicate", self.seen.pop(content), f"the same file as {path}", count=1 + self.more[content]
            )
