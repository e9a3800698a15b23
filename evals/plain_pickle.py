"""Pickles of plain values, read without running code from them: the ground truth of the retrieval benchmarks.

A pickle is a program: it may call any function by its name. Here the names it may call are those that NumPy writes for
numbers and arrays, and each of them is a function of this file.
"""
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from runtime.commandline import InputError, brief


class Refused(pickle.UnpicklingError):
    """The pickle asks for something that is no plain value."""


class PlainDtype:
    """Stands for np.dtype: booleans, numbers and text of a fixed width, whose bytes are no addresses of objects."""

    def __init__(self, code: str, *_):
        if not re.fullmatch(r"[biufSU][1-9]\d*", code):
            raise Refused(f"holds an array of {code}")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class PlainArray(np.ndarray):
    """An array whose contents a pickle fills in afterwards."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, values = state
        super().__setstate__((version, shape, dtype.numpy, is_fortran, values))


NAMES = {  # what pickles of bytes and arrays call, by the last part of its name: NumPy's modules were renamed
    "dtype": PlainDtype,
    "ndarray": None,  # an argument of _reconstruct
    "_reconstruct": lambda *_: PlainArray(0),
    "_frombuffer": lambda values, dtype, shape, order: np.frombuffer(values, dtype.numpy).reshape(shape, order=order),
    "scalar": lambda dtype, value: np.frombuffer(value, dtype.numpy)[0],
    "encode": lambda text, _: text.encode("latin1"),
    "bytes": lambda: b"",
}


def with_plain_keys(load: Callable, keys: slice) -> Callable:
    """The unpickler's own load, refused unless these of its stack, which it hashes, are text or numbers.

    To hash a tuple of tuples of tuples, each twice the same, can take for ever.
    """
    def checked(self: "PlainUnpickler") -> None:
        if not all(isinstance(key, (str, bytes, int, float, np.generic)) for key in self.stack[keys]):
            raise Refused("holds keys that are neither text nor numbers")
        load(self)
    return checked


class PlainUnpickler(pickle._Unpickler):
    """Python's own unpickler (C's reserves as much memory as the file claims) with nothing to call but NAMES."""

    dispatch = pickle._Unpickler.dispatch | {code[0]: with_plain_keys(load, keys) for code, load, keys in (
        (pickle.SETITEM, pickle._Unpickler.load_setitem, slice(-2, -1)),
        (pickle.SETITEMS, pickle._Unpickler.load_setitems, slice(None, None, 2)),
        (pickle.DICT, pickle._Unpickler.load_dict, slice(None, None, 2)),
        (pickle.ADDITEMS, pickle._Unpickler.load_additems, slice(None)),
        (pickle.FROZENSET, pickle._Unpickler.load_frozenset, slice(None)))}

    def find_class(self, module: str, name: str):
        if module.partition(".")[0] in ("numpy", "_codecs", "__builtin__", "builtins") and name in NAMES:
            return NAMES[name]
        raise Refused(f"holds code or objects ({module}.{name})")


def read_plain_pickle(path: str | Path):
    """The file's lists, dicts, text, numbers and arrays of numbers; raises InputError that says what is wrong."""
    if not os.path.isfile(path):
        raise InputError(f"no pickle at {str(path)!r}: check the path")
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file, encoding="latin1").load()
    except Refused as error:
        raise InputError(f"{str(path)!r} {brief(error)} beside plain values, which are never run: use another copy of "
                         "it") from None
    except Exception as error:  # what a torn or hostile pickle raises can be anything
        raise InputError(f"{str(path)!r} cannot be read as a pickle ({brief(error)}): use another copy of it") from None
