"""What an unknown flag was meant to be. Read only after a command line has failed."""

from collections.abc import Iterable
from difflib import get_close_matches

from runtime.release_flags import ANSWERS


def suggestions(message: str, flags: Iterable[str]) -> str:
    """Return words for each flag that argparse's message calls unknown, or "".

    What takes the place of a flag of the release's, or the flag that is spelt nearly so.
    flags: those that there are.
    """
    _, _, unknown = message.partition("unrecognized arguments: ")
    text = ""
    for word in unknown.split():
        flag, _, _ = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in ANSWERS:
            text += f"; instead of the release's {flag}: {ANSWERS[name]}"
            continue
        for meant in get_close_matches(flag, flags, n=1, cutoff=0.7):
            text += f"; did you mean {meant}?"
    return text
