"""Escape text from data (names, config values, output of a failed run) for each kind of file."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

# What a browser, a terminal or an XML parser takes for more than a character: controls except tab and line feed, halves of
# surrogate pairs, and characters that end a line or change the writing direction.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# A spreadsheet takes a field that begins with one of these for a formula.
_FORMULA = re.compile(r"\s*[=+\-@]|[\t\r\n]")
# Not between word characters, as in val_kd_loss: there an underscore is only itself.
_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"{\ttfamily\char34}", "`": r"\textasciigrave{}", "±": r"$\pm$", "×": r"$\times$",
    "√": r"$\surd$",
}  # fmt: skip
# What pdfLaTeX sets without a package beside ASCII and letters with an accent above.
_LATEX_KNOWS = frozenset("ßÆæØøŁłŒœı–—‘’“”…€§©®™°µ·¡¿")
_OGONEK = "\u0328"
# Where a long word may be broken: behind what joins its parts, else every so many characters.
_PIECES = re.compile(r"[^/,=(._-]{1,16}[/,=(._-]?|[/,=(._-]")
# Two of these become one sign in LaTeX's text fonts.
_LIGATURES = re.compile(r"([-,'])(?=\1)")


def printable(text: str) -> str:
    r"""Escape (as in `\x1b`) control characters, lone surrogates and what changes lines or the writing direction."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """Return the text in one line, printable, with each run of white space as one space."""
    return " ".join(printable(text.replace("\r", " ")).split())


def markdown_text(text: str) -> str:
    """Escape text so that GitHub's Markdown shows it unchanged in a line: no markup, no HTML, no end of a table cell."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], *, num_text: int) -> str:
    """Format a Markdown table of Markdown cells; the first `num_text` columns are left-aligned, the others right-aligned."""
    rules = [":--" if index < num_text else "--:" for index in range(len(header))]
    cells = [[markdown_text(title) for title in header], rules, *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def markdown_fence(text: str) -> str:
    """Format the text as a code block whose fences are longer than any run of backquotes in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{printable(text)}\n{fence}"


def csv_value(value: object) -> object:
    """Return the value of a CSV field: a number stays a number; a text that a spreadsheet would run gets a leading '."""
    if not isinstance(value, str) or is_number(value):
        return value
    return f"'{printable(value)}" if _FORMULA.match(value) else printable(value)


def is_number(text: str) -> bool:
    """Return whether the text is a number as JSON or Python writes it."""
    try:
        float(text)
    except ValueError:
        return False
    return not text[:1].isspace()


def latex_text(text: str) -> str:
    """Escape the text for one line of LaTeX's text mode; characters that pdfLaTeX lacks are written as U+4E2D."""
    whole = unicodedata.normalize("NFC", one_line(text))
    return _LIGATURES.sub(r"\1{}", "".join(map(_latex_character, whole)))


def latex_breakable(text: str) -> str:
    """Like `latex_text`, with places in long words where a line may break."""
    words = (_PIECES.findall(word) if len(word) > 20 else [word] for word in one_line(text).split())
    return " ".join(r"\allowbreak{}".join(map(latex_text, pieces)) for pieces in words)


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    base, *marks = list(unicodedata.normalize("NFD", character))
    is_letter = base.isascii() and marks and _OGONEK not in marks
    return character if character.isascii() or is_letter or character in _LATEX_KNOWS else f"U+{ord(character):04X}"
