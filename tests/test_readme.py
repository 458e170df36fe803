"""The README names things that exist."""

import importlib
import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")
TABLE = README.partition("## From the paper to the code")[2].partition("\n## ")[0]
NAMES = re.findall(r"`((?:t5|hypernet|hint|data|train)\.[\w.]+)`", TABLE)


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_each_row_from_the_paper_to_the_code_names_something_that_exists(name):
    module, *attributes = name.split(".")
    found = importlib.import_module(module)
    for attribute in attributes:
        found = getattr(found, attribute)
    assert found is not None


def test_every_row_from_the_paper_to_the_code_names_code():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) >= 20  # the table was found
    assert all(re.search(r"`(t5|hypernet|hint|data|train)\.", row.split("|")[2]) for row in rows)


def test_files_that_the_readme_links_to_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(links) >= 8
    assert [link for link in links if not (Path(__file__).resolve().parents[1] / link).exists()] == []
