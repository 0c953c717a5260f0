"""Collect the findings of a check: a summary for people, JSON for programs."""

from collections import Counter, defaultdict
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional

from tnt_timm.data import class_maps
from tnt_timm.data.check.images import TINY, Inspection
from tnt_timm.data.folders import FirstItems, Survey
from tnt_timm.data.workers import size_text

SHOWN = {"problem": 10, "warning": 3}  # examples per kind in the summary; the JSON has more


class Kind(NamedTuple):
    severity: str  # a "problem" stops or harms training, a "warning" does not
    what: str
    meaning: str  # for training


KINDS = {
    "missing_split": Kind("problem", "missing splits", "train.py needs both"),
    "unreadable": Kind("problem", "unreadable images", "train.py replaces them in training and stops in validation"),
    "one_split_only": Kind(
        "problem", "classes in one split only", "train.py refuses them or, with a class map, skips them"
    ),
    "empty_class": Kind("problem", "class folders without an image", "train.py refuses them"),
    "stray": Kind("problem", "images outside of the class folders", "train.py refuses them"),
    "deep": Kind("problem", "images deeper than the class folders", "train.py refuses them"),
    "single_class": Kind(
        "problem", "splits of a single class", "train.py refuses them: accuracy would always be 100 %"
    ),
    "mistyped": Kind("problem", "class maps with a class that has no images", "train.py refuses them"),
    "unlisted": Kind("problem", "folders that cannot be listed", "train.py refuses them"),
    "not_in_class_map": Kind("warning", "images in folders that the class map does not name", "not used"),
    "not_read": Kind("warning", "files left out because of their suffix", "not used"),
    "hidden": Kind("warning", "hidden images, and folders that are hidden or of the system", "not used"),
    "loop": Kind("warning", "links to a folder above them", "not followed"),
    "duplicate": Kind("warning", "validation images that are also training images", "accuracy counts memorised images"),
    "suffix": Kind("warning", "files whose suffix does not match their content", "harmless: the content counts"),
    "cmyk": Kind("warning", "CMYK images", "converted to RGB"),
    "greyscale": Kind("warning", "greyscale images", "converted to RGB"),
    "palette": Kind("warning", "palette images", "converted to RGB"),
    "sixteen_bit": Kind("warning", "images with 16 bits per channel", "read as 8 bits"),
    "other_mode": Kind("warning", "images in an unusual mode", "converted to RGB"),
    "transparency": Kind("warning", "images with transparent parts", "the hidden colour becomes visible"),
    "rotated": Kind("warning", "images that their EXIF data would rotate", "used as stored"),
    "tiny": Kind("warning", f"images with an edge below {TINY} pixels", "enlarged"),
    "pillow_warns": Kind("warning", "images with a Pillow warning", "used"),
}


class Finding(NamedTuple):
    place: str  # a file, a folder, or a class
    detail: str = ""


class SplitTally:
    """Counts of one split.

    Args:
        name: of the split.
        survey: of its folder.
        class_map: target by class, if the classes are not simply those of the folder.
    """

    def __init__(self, name: str, survey: Survey, class_map: Optional[Mapping[str, int]] = None):
        self.name = name
        self.survey = survey
        labels = survey.counts if class_map is None else sorted(class_map, key=class_map.get)
        self.classes = {label: survey.counts.get(label, 0) for label in labels if label}
        self.num_images = sum(self.classes.values())
        self.checked = 0
        self.num_bytes = 0
        self.formats: Counter = Counter()
        self.modes: Counter = Counter()
        self.edges: List[int] = []  # the shortest and the longest so far, in pixels

    def add(self, found: Inspection) -> None:
        self.checked += 1
        if found.problem:
            return
        self.num_bytes += found.num_bytes
        self.formats[found.format] += 1
        self.modes[found.mode] += 1
        edges = (*found.size, *self.edges)
        self.edges = [min(edges), max(edges)]

    def as_json(self) -> Dict[str, Any]:
        return {
            "folder": str(self.survey.folder),
            "images": self.num_images,
            "checked": self.checked,
            "bytes": self.num_bytes,
            "classes": self.classes,
            "formats": dict(self.formats.most_common()),
            "modes": dict(self.modes.most_common()),
            "edges": self.edges or [0, 0],
            "not_read": dict(self.survey.skipped.most_common()),
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
    """Everything that a check found in a dataset.

    Args:
        data_dir: folder of the dataset.
    """

    def __init__(self, data_dir: str):
        self.data_dir = data_dir
        self.splits: List[SplitTally] = []
        self.findings: Dict[str, FirstItems[Finding]] = {kind: FirstItems() for kind in KINDS}
        self.finished = False
        self.seconds = 0.0
        self.first_read: Optional[SplitTally] = None
        self.files_by_digest: Dict[bytes, List[str]] = defaultdict(list)  # of the split that is read first

    def add(self, kind: str, place: str, detail: str = "", count: int = 1) -> None:
        self.findings[kind].add(Finding(place, detail), count)

    def survey(self, split: SplitTally, by_map: bool, is_training: bool) -> None:
        """Add a split, and the findings that need no file to be read.

        Args:
            split: to add.
            by_map: a class map names the classes, so class folders may be anywhere.
            is_training: each class of the map needs images.
        """
        self.splits.append(split)
        survey = split.survey
        for folder, reason in survey.unlisted.first:
            self.add("unlisted", folder, reason)
        for suffix, count in survey.skipped.items():
            self.add("not_read", str(survey.folder), f"{count:,} {suffix}", count)
        for kind, found in (("hidden", survey.hidden), ("loop", survey.loops)):
            self._add_all(kind, found)
        if not split.num_images:
            self.add("missing_split", str(survey.folder), "no image of any class")
        if len(split.classes) == 1:
            self.add("single_class", str(survey.folder), *split.classes)
        if by_map:
            missing, others = class_maps.missing_and_others(split.classes, survey.counts)
            if wrong := class_maps.mistyped(missing, others, survey.folder, is_training):
                self.add("mistyped", *wrong.split(": ", 1))
            for label in others:
                count = survey.counts[label]
                self.add("not_in_class_map", str(survey.folder / label), f"{count:,} images", count)
            return
        for name in survey.empty:
            self.add("empty_class", str(survey.folder / name))
        for kind, found in (("stray", survey.stray), ("deep", survey.deep)):
            self._add_all(kind, found)

    def _add_all(self, kind: str, paths: FirstItems[str]) -> None:
        for path in paths.first:
            self.add(kind, path)
        self.findings[kind].count += paths.count - len(paths.first)

    def compare_classes(self, by_map: bool) -> None:
        """Find classes with images in one split only. With a class map, training may have more than validation."""
        for here, there in zip(self.splits, reversed(self.splits)):
            if here is there or (by_map and here is self.splits[0]):
                continue
            for label, count in here.classes.items():
                if count and not there.classes.get(label):
                    self.add("one_split_only", label, f"{count:,} images in {here.name}")

    def add_image(self, split: SplitTally, path: str, found: Inspection) -> None:
        """Add the findings of reading a file. Read the smaller split first: its digests are kept in memory."""
        split.add(found)
        if found.problem:
            self.add("unreadable", path, found.problem)
            return
        for kind, detail in found.notes:
            self.add(kind, path, detail)
        self.first_read = self.first_read or split
        if split is self.first_read:
            self.files_by_digest[found.digest].append(path)
        elif split is self.splits[-1] and found.digest in self.files_by_digest:
            self.add("duplicate", path, f"the same file as {self.files_by_digest[found.digest][0]}")
        elif split is not self.splits[-1]:
            for twin in self.files_by_digest.pop(found.digest, ()):
                self.add("duplicate", twin, f"the same file as {path}")

    @property
    def num_images(self) -> int:
        return sum(split.num_images for split in self.splits)

    @property
    def num_checked(self) -> int:
        return sum(split.checked for split in self.splits)

    def kinds(self, severity: str) -> Dict[str, FirstItems[Finding]]:
        """Return what was found of a severity, "problem" or "warning"."""
        return {k: found for k, found in self.findings.items() if found.count and KINDS[k].severity == severity}

    def verdict(self) -> str:
        """Return the problems in one line, empty if there is none."""
        return ", ".join(f"{KINDS[kind].what}: {found.count:,}" for kind, found in self.kinds("problem").items())

    def as_json(self) -> Dict[str, Any]:
        def listed(severity: str) -> Dict[str, Any]:
            found = self.kinds(severity)
            return {k: {"count": some.count, "first": [f._asdict() for f in some.first]} for k, some in found.items()}

        return {
            "data_dir": self.data_dir,
            "finished": self.finished,
            "seconds": round(self.seconds, 1),
            "classes": list(self.splits[0].classes) if self.splits else [],
            "splits": {split.name: split.as_json() for split in self.splits},
            "problems": listed("problem"),
            "warnings": listed("warning"),
        }

    def lines(self) -> Iterator[str]:
        """Yield the summary."""
        for split in self.splits:
            yield from split.lines()
        for kind, found in self.findings.items():
            if not found.count:
                continue
            severity, what, meaning = KINDS[kind]
            yield f"{severity:<10} {what}: {found.count:,} ({meaning})"
            for place, detail in found.first[: SHOWN[severity]]:
                yield f"{'':<12} {place}{f': {detail}' if detail else ''}"
            if len(found.first) > SHOWN[severity]:
                yield f"{'':<12} ..."
