"""docs/results.md shows what figures/ablations holds."""

import re

from ablations import gallery
from ablations.rows import STUDIES, Row, Study


def test_the_page_equals_what_the_script_writes():
    page = gallery.PAGE.read_text(encoding="utf-8")
    assert page == gallery.with_gallery(page), "run python -m ablations.gallery"


def test_remarks_are_of_studies_and_say_something():
    remarks = gallery.read_remarks((gallery.RESULTS / "remarks.md").read_text(encoding="utf-8"))
    assert remarks.keys() <= STUDIES.keys()
    assert all(remarks.values()), "a heading without a sentence"


def test_a_study_without_a_remark_or_without_results_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "remarks.md").write_text("# What to read\n\n## teachers\nA remark.\n")
    for name in ("teachers", "new"):
        (tmp_path / f"{name}.md").write_text("| row | changed |\n|---|---|\n| one | lr |\n")
    monkeypatch.setattr(gallery, "RESULTS", tmp_path)
    for name in ("new", "never run"):
        monkeypatch.setitem(STUDIES, name, Study("nowhere", {}, (Row("one"),)))
    new = gallery.gallery().partition("### `new`: nowhere\n\n")[2]
    assert "- A remark." in gallery.gallery()
    assert new == "| row |\n| --- |\n| one |\n\n![new](../figures/ablations/new.png)"


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
