"""Texts from data in a figure: names of classes, files and models, which may hold any letter of any script."""

import logging
import unicodedata
from typing import Any, Dict, List, Set

from tnt_timm.console import printable

_logger = logging.getLogger(__name__)
_FIRST = "\u200b"  # invisible; Matplotlib leaves names out of a legend that begin with an underscore
CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH")


def shown(text: str) -> str:
    """Return a text from data as it can be drawn. Line breaks stay."""
    return printable(text, keep="\n")


def legend_name(name: str) -> str:
    """Return a name so that a legend shows it, whatever it begins with. `choose_fonts` makes it the name again."""
    return (_FIRST if name.startswith("_") else "") + shown(name)


def choose_fonts(figure: Any) -> None:
    """Choose installed fonts that have the letters of a figure; log which letters have none."""
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if not text.get_text().isascii()]
    for text in texts:
        text.set_text(text.get_text().replace(_FIRST, ""))
    missing = {letter for text in texts for letter in text.get_text() if not letter.isspace()} - _letters(
        _default_font()
    )
    if not missing:
        return
    families = _fonts_with(missing)
    for text in texts:
        if families:
            text.set_fontfamily([*text.get_fontfamily(), *families])
    if missing:
        some, package = "".join(sorted(missing)[:10]), "fonts-noto-core"
        if any(unicodedata.name(letter, "").startswith(CJK) for letter in missing):
            package = "fonts-noto-cjk"
        _logger.info(
            f"notice: no installed font has {some}, so boxes are drawn; install a font, such as Debian's package {package}"
        )


def _fonts_with(missing: Set[str]) -> List[str]:
    """Return families of installed fonts that have the missing letters, and remove from the set those that were found."""
    from matplotlib import font_manager

    installed: Dict[str, Set[str]] = {path: _letters(path) & missing for path in sorted(font_manager.findSystemFonts())}
    families = []
    while installed:
        path = max(installed, key=lambda path: (len(installed[path] & missing), "regular" in path.lower()))
        if not installed[path] & missing:
            break
        known = len(font_manager.fontManager.ttflist)
        font_manager.fontManager.addfont(path)  # Matplotlib's own list is as old as its cache
        families.append(font_manager.fontManager.ttflist[known].name)
        missing -= installed.pop(path)
    return families


def _default_font() -> str:
    from matplotlib import font_manager

    return font_manager.findfont("DejaVu Sans")  # comes with Matplotlib


def _letters(path: str) -> Set[str]:
    """Return the letters of a font file; none if it is unreadable or has only bitmaps, which Matplotlib cannot scale."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (RuntimeError, OSError):
        return set()
    return set(map(chr, font.get_charmap())) if font.scalable else set()
