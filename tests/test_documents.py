"""What the documents say of themselves: citation, dates, links, named files, and pages that programs write."""

import json
import re
from datetime import date
from pathlib import Path

import pytest
import yaml

import mimae
from mimae.benchmarks.report import write_page
from mimae.drills.catalogue import drills
from mimae.drills.report import page_of
from mimae.replication.plan import SCALES
from mimae.replication.records import Records
from mimae.replication.report import HEAD, description

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
PAGE_IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_there(page: Path, target: str) -> bool:
    """Whether a relative link of a page leads to a file, and to a heading if it names one."""
    path, _, anchor = target.partition("#")
    linked = page.parent / path if path else page
    return linked.exists() and (not anchor or anchor in anchors(linked))


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not is_there(page, target)] == []


def test_a_link_to_no_file_or_no_heading_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One heading\n\n## And `another`: it\n")
    assert is_there(page, "page.md#one-heading")
    assert is_there(page, "#and-another-it")
    assert not is_there(page, "#a-third")
    assert not is_there(page, "none.md")


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_files_of_this_project_that_a_page_names_exist(page):
    """In backticks, by their path from the root, such as `data/order.py`."""
    named = set(re.findall(r"`((?:[a-z_]+/)+[\w.]+\.(?:py|yaml))`", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_sections_of_the_log_are_dated_and_newest_first():
    headings = re.findall(r"^## (.+)$", (DOCS / "LOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    dates = [date.fromisoformat(heading.partition(": ")[0]) for heading in headings]
    assert len(dates) > 10
    assert dates == sorted(dates, reverse=True)


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == mimae.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["message"]
    assert citation["title"].startswith("mimae")
    assert citation["authors"] == [{"name": "The mimae authors"}]
    (paper,) = citation["references"]
    assert paper["title"] == "Learning Mask Invariant Mutual Information for Masked Image Modeling"
    assert [author["family-names"] for author in paper["authors"]] == ["Huang", "Ma", "You", "Xu"]
    assert paper["year"] == 2025
    assert paper["url"] == "https://arxiv.org/abs/2502.19718"


def test_the_changelog_names_this_version():
    assert mimae.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_page_of_the_benchmarks_is_what_the_program_writes(tmp_path):
    write_page(DOCS / "performance", tmp_path / "page.md")
    assert (DOCS / "performance.md").read_text(encoding="utf-8") == (tmp_path / "page.md").read_text(encoding="utf-8")


def test_the_page_of_the_drills_is_what_the_program_writes():
    outcomes = json.loads((DOCS / "reliability.json").read_text(encoding="utf-8"))
    assert (DOCS / "reliability.md").read_text(encoding="utf-8") == page_of(outcomes, len(drills()))


def test_the_page_of_the_replication_is_introduced_as_the_program_does():
    page = (DOCS / "replication.md").read_text(encoding="utf-8")
    assert page.startswith(HEAD)
    for scale in SCALES.values():
        assert description(scale, Records(DOCS / "replication" / f"{scale.name}.jsonl")) in page
