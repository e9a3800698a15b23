"""What a misspelt flag was meant to be. Read only after a command line has failed."""

from collections.abc import Iterable
from difflib import get_close_matches


def suggestions(message: str, flags: Iterable[str]) -> str:
    """Return a question for each flag that argparse's message calls unknown, or "".

    flags: those that there are.
    """
    _, _, unknown = message.partition("unrecognized arguments: ")
    text = ""
    for word in unknown.split():
        for flag in get_close_matches(word, flags, n=1, cutoff=0.7):
            text += f"; did you mean {flag}?"
    return text
