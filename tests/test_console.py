"""What reaches the terminal: names of any kind on one line, and streams that are closed or full."""

import subprocess
import sys
from pathlib import Path

import pytest

from tnt_timm import atomic_files
from tnt_timm.console import printable, say, show, table, write_line
from tnt_timm.errors import UserError

REPO = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name, shown",
    [
        ("a\nb", "a\\nb"),
        ("a\tb\r", "a\\tb\\r"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\u202egnp.exe", "a\\u202egnp.exe"),
        ("caf\udce9", "caf\\xe9"),  # not UTF-8
        ("\ud83d", "\\ud83d"),
        ("猫 é 😀 $1_2", "猫 é 😀 $1_2"),
    ],
)
def test_a_name_is_shown_on_one_line(capsys, name, shown):
    assert printable(name) == shown
    say(f"skipped: {name}: why")
    assert capsys.readouterr().out == f"skipped: {shown}: why\n"
    text = table(["image", "class"], [[name, "a"]])
    show(text)
    assert capsys.readouterr().out == text == f"{'image':<{max(5, len(shown))}}  class\n{shown:<5}  a\n"


def test_a_name_in_a_file_keeps_its_bytes(tmp_path):
    text = table(["image"], [["caf\udce9"], ["a\nb"]], "csv")
    atomic_files.replace_text(tmp_path / "x.csv", text)
    assert (tmp_path / "x.csv").read_bytes() == b'image\ncaf\xe9\n"a\nb"\n'
    with pytest.raises(UserError, match=r"y.csv: cannot be written"):
        atomic_files.replace_text(tmp_path / "y.csv", "\ud83d")


def test_whatever_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "x").write_text("old")
    for error in (TypeError, KeyboardInterrupt):

        def write(file, error=error):
            file.write(b"half")
            raise error

        with pytest.raises(error):
            atomic_files.replace(tmp_path / "x", write)
        assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize(
    "command, status",
    [
        ("--print-config | head -1", 0),
        ("--print-config >&-", 0),
        ("--print-config >&- 2>&- <&-", 0),
        ("--print-config > /dev/full", 1),
        ("--help | head -1", 0),
    ],
)
def test_streams(command, status):
    """A reader that has seen enough is no failure; a result that is lost on a full disk is one."""
    program = "import sys; from tnt_timm.commands.train import main; sys.exit(main())"
    line = f"set -o pipefail; '{sys.executable}' -c '{program}' {command}"
    done = subprocess.run(["bash", "-c", line], cwd=REPO, capture_output=True, text=True, timeout=100)
    assert done.returncode == status, done.stderr
    assert done.stderr == "error: stdout: cannot be written: [Errno 28] No space left on device\n" * status


def test_a_line_is_written_in_one_piece():
    """Otherwise the lines of two ranks can end up as one."""
    written = []

    class Stream:
        write = written.append

        def flush(self):
            written.append("flushed")

    write_line("out of luck", Stream())
    assert written == ["out of luck\n", "flushed"]
