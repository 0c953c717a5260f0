"""Names from data in a figure: of any letters, none of which mean a formula or hide a name."""

import pytest

pytest.importorskip("textalloc")
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from tnt_timm.commands.figures import main
from tnt_timm.figures import lettering, picture


@pytest.fixture
def confusion(tmp_path, capsys):
    """Draw the confusion matrix of two classes -> status, stdout, stderr."""

    def confusion(*names):
        table = f',"{names[0]}","{names[1]}"\n"{names[0]}",3,1\n"{names[1]}",1,3\n'
        (tmp_path / "counts.csv").write_bytes(table.encode("utf-8", "surrogateescape"))
        for suffix in (".svg", ".png"):
            status = main(["confusion", str(tmp_path / "counts.csv"), "--output", str(tmp_path / f"picture{suffix}")])
            assert status == 0, capsys.readouterr().err
        return capsys.readouterr()

    return confusion


@pytest.mark.parametrize(
    "names", [("US$1_$5", "a"), ("$_{", "$"), ("caf\udce9", "a\x1b[31m"), ("_a", "__"), ("a\nb", "\\$x$")]
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_any_name_is_drawn(confusion, tmp_path, names):
    out, err = confusion(*names)
    assert err == "" and "notice" not in out
    text = (tmp_path / "picture.svg").read_text()
    assert "\x1b" not in text and (names[0] != "US$1_$5" or "<!-- US$1_$5 -->" in text)
    assert (tmp_path / "picture.csv").exists()


def test_legends_show_names_that_begin_with_an_underscore(tmp_path):
    with picture.style():
        figure = picture.new(3, 2)
        figure.subplots().scatter([1], [1], label="a")
        picture.write_legend(figure, {"_x$1_$": {"color": "red"}, "y": {"color": "blue"}})
        picture.save(figure, tmp_path / "a.png", [{"a": 1}])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_x$1_$", "y"]


@pytest.mark.filterwarnings("error::UserWarning")
def test_missing_letters_are_named_with_a_package(confusion, monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    out, _ = confusion("猫", "a")
    assert (
        "notice: no installed font has 猫, so boxes are drawn; install a font, such as Debian's package fonts-noto-cjk"
        in out
    )


def test_an_installed_font_that_has_the_letters_is_used(confusion, monkeypatch, tmp_path):
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((500, 0)), pen.lineTo((500, 500)), pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord("猫"): "cat"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (500, 0), "cat": (500, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Cats", "styleName": "Regular"})
    font.setupOS2(), font.setupPost()
    font.save(tmp_path / "cats.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(
        font_manager, "findSystemFonts", lambda: [str(tmp_path / "broken.ttf"), str(tmp_path / "cats.ttf")]
    )
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    out, err = confusion("猫", "a")
    assert "notice" not in out and err == ""
    missing = {"猫", "狗"}
    assert lettering._fonts_with(missing) == ["Cats"] and missing == {"狗"}
