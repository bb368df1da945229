"""Text that comes from data (names, config values, what a failed run printed) as each kind of file has to quote it."""

import re
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
    '"': r"\textquotedbl{}", "±": r"$\pm$", "×": r"$\times$",
}  # fmt: skip


def printable(text: str) -> str:
    r"""Escape (as in `\x1b`) control characters, lone surrogates and what changes lines or the writing direction."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """Return the text in one line, printable, with each run of white space as one space."""
    return " ".join(printable(text.replace("\r", " ")).split())


def markdown_text(text: str) -> str:
    """The text as GitHub's Markdown shows it unchanged inside a line: no markup, no HTML, no end of a table's cell."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], *, num_text: int) -> str:
    """A Markdown table of cells that are Markdown; the first `num_text` columns are set left, the others right."""
    rules = [":--" if index < num_text else "--:" for index in range(len(header))]
    cells = [[markdown_text(title) for title in header], rules, *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def markdown_fence(text: str) -> str:
    """The text as a code block, between fences longer than any run of backquotes in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{printable(text)}\n{fence}"


def csv_value(value: object) -> object:
    """The value of a CSV field: a number stays a number; a text that a spreadsheet would run has a ' before it."""
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
    """The text in one line of LaTeX's text mode, every special character quoted."""
    return "".join(_LATEX.get(character, character) for character in one_line(text))
