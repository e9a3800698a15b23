"""What an unknown flag was meant to be. Read only after a command line has failed."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from runtime.release_flags import ANSWERS

SYNONYMS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "weights": "pretrained_weights",
    "data": "data_path",
    "data_dir": "data_path",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "gpu": "device",
    "resume": "output_dir",  # a run found there is continued
}
DASHES = "-\N{EN DASH}\N{EM DASH}"  # a web page or a word processor makes one of two hyphens
LONGEST_WORD = 200  # characters of a value in a message


def explained(message: str, flags: Iterable[str]) -> str:
    """Return argparse's message, with a number of 5,000 digits cut, and with suggestions."""
    cut = re.sub(rf"(\S{{{LONGEST_WORD}}})\S+", r"\1 ...", message)
    if re.search(r"expected \d+ arguments", message):
        cut += "; numbers stand apart, as in 0.4 1.0"
    return cut + suggestions(message, flags)


def suggestions(message: str, flags: Iterable[str]) -> str:
    """Return words for each flag that argparse's message calls unknown, or "".

    What takes the place of a flag of the release's, or the flag that is spelt nearly so.
    flags: those that there are.
    """
    known = {plain(flag) for flag in flags if flag.startswith("--")} - {"local_rank"}
    _, _, unknown = message.partition("unrecognized arguments: ")
    text = ""
    words = unknown.split()
    if words and words[0][0] not in DASHES:  # else it may be the value of an unknown flag
        text += f"; {words[0]} follows no flag: one value with spaces wants quotes"
    for word in words:
        if word[0] not in DASHES:
            continue
        flag, _, _ = word.partition("=")
        name = plain(flag)
        if name in ANSWERS:
            text += f"; instead of the release's {flag}: {ANSWERS[name]}"
            continue
        if name.startswith("no_") and name[3:] in known:
            text += f"; did you mean --{name[3:]} false?"
            continue
        meant = nearest(name, known)
        if meant:
            text += f"; did you mean --{meant}?"
    return text


def plain(flag: str) -> str:
    """Return a flag's name without its dashes: --data-path is meant as --data_path."""
    return flag.lstrip(DASHES).replace("-", "_")


def nearest(name: str, known: set[str]) -> str:
    """Return the known name that is most like this one, or "".

    One that it is the start of, the shortest, comes before one that is spelt nearly so.
    """
    if SYNONYMS.get(name) in known:
        return SYNONYMS[name]
    if len(name) > 1:
        begun = sorted(one for one in known if one.startswith(name))
        if begun:
            return min(begun, key=len)
    return "".join(get_close_matches(name, known, n=1, cutoff=0.7))
