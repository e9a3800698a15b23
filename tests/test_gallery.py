"""docs/results.md shows what figures/ablations holds."""

import re

from ablations import gallery
from ablations.rows import STUDIES


def test_the_page_equals_what_the_script_writes():
    page = gallery.PAGE.read_text(encoding="utf-8")
    assert page == gallery.with_gallery(page), "run python -m ablations.gallery"


def test_every_study_has_its_remarks_and_no_other_has():
    remarks = gallery.read_remarks((gallery.RESULTS / "remarks.md").read_text(encoding="utf-8"))
    assert remarks.keys() == STUDIES.keys()
    assert all(remarks.values()), "a study without a sentence"


def test_the_gallery_keeps_every_row_and_number_of_a_table():
    table = (gallery.RESULTS / "teachers.md").read_text(encoding="utf-8")
    changed = ("nothing", "teacher previous_epoch", "arch resnet18")
    narrow = gallery.narrow(table)
    assert len(narrow.splitlines()) == len(table.splitlines())
    assert set(re.findall(r"\d+\.\d", narrow)) == set(re.findall(r"\d+\.\d", table))
    assert not any(words in narrow for words in changed), "the column 'changed' stays out"


def test_text_around_the_gallery_stays_as_it_is():
    page = f"before\n\n{gallery.BEGIN}\nold\n{gallery.END}\n\nafter\n"
    written = gallery.with_gallery(page)
    assert written.startswith("before\n\n") and written.endswith("\n\nafter\n")
    assert "\nold\n" not in written
