"""Write the gallery in docs/results.md from the results that figures/ablations holds.

    python -m ablations.gallery

Each study gets its table (STUDY.md), its figure (STUDY.png), and its sentences in remarks.md if it
has any.
The column "changed" stays out, since it is wide and the settings stand in ablations/rows.py.
"""
import re
from pathlib import Path

from ablations.rows import STUDIES

REPO = Path(__file__).parent.parent
PAGE = REPO / "docs" / "results.md"
RESULTS = REPO / "figures" / "ablations"
BEGIN = "<!-- gallery: written by python -m ablations.gallery -->"
END = "<!-- end of the gallery -->"
LEFT_OUT = "changed"


def read_remarks(text: str) -> dict[str, list[str]]:
    """Return the sentences under each heading "## study", a line each."""
    remarks = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        study, *lines = part.splitlines()
        remarks[study.strip()] = [line for line in lines if line]
    return remarks


def narrow(table: str) -> str:
    """Return a Markdown table without the column "changed" and without padding."""
    rows = []
    for line in table.splitlines():
        cells = line.strip().strip("|").split("|")
        rows.append([cell.strip() for cell in cells])

    columns = [number for number, name in enumerate(rows[0]) if name != LEFT_OUT]
    rows[1] = ["---"] * len(rows[0])  # the line below the head
    lines = []
    for row in rows:
        kept = [row[number] for number in columns]
        lines.append("| " + " | ".join(kept) + " |")
    return "\n".join(lines)


def section(name: str, remarks: list[str]) -> str:
    """Return one study's part of the page: its table, its warnings, the remarks, its figure."""
    lines = (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    warnings = [line for line in lines if line and not line.startswith("|")]
    parts = [
        f"### `{name}`: {STUDIES[name].where}",
        STUDIES[name].note,
        narrow("\n".join(table)),
        "\n".join(f"- {line}" for line in warnings + remarks),
        f"![{name}](../figures/ablations/{name}.png)",
    ]
    return "\n\n".join(part for part in parts if part)


def gallery() -> str:
    """Return the sections of all studies that have results, in the order of rows.py."""
    remarks = read_remarks((RESULTS / "remarks.md").read_text(encoding="utf-8"))
    sections = []
    for name in STUDIES:
        if (RESULTS / f"{name}.md").exists():  # a new study may not have been run
            sections.append(section(name, remarks.get(name, [])))
    return "\n\n".join(sections)


def with_gallery(page: str) -> str:
    """Return the page with what stands between the two markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{gallery()}\n\n{END}{after}"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_gallery(page), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(REPO)}")


if __name__ == "__main__":
    main()
