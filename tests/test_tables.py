"""The comparison of committed tables: what counts as worse, what as better, and how that is said."""

from __future__ import annotations

from pathlib import Path

import pytest

import tables

ROWS = {"kernel": {"here": {"size": 4}, "there": {"size": 5}}}


@pytest.mark.parametrize(
    ("rule", "old", "worse", "same", "better"),
    [
        (tables.more(), 0, 1, 0, -1),
        (tables.more(), 100, 101, 100, 99),
        (tables.more(0.02), 100, 103, 102, 97),
        (tables.more_granules(8), 72, 73, 65, 64),
        (tables.more_granules(8), 80, 88, 73, 72),
        (tables.earlier_in(("none", "mma", "wgmma")), "mma", "none", "mma", "wgmma"),
    ],
)
def test_rules(rule: tables.Rule, old: object, worse: object, same: object, better: object) -> None:
    def changes(new: object) -> tuple[list[str], list[str]]:
        return tables.changes("kernel, here", {"size": old}, {"size": new}, {"size": rule})

    assert changes(worse) == ([f"kernel, here: size {old} -> {worse}"], [])
    assert changes(same) == ([], [])
    assert changes(better) == ([], [f"kernel, here: size {old} -> {better}"])


def test_what_must_not_differ_is_never_better() -> None:
    for new in (3, 5):
        assert tables.changes("k", {"warps": 4}, {"warps": new}, {"warps": tables.differs})[0]
    assert tables.changes("k", {"warps": 4}, {"warps": 4}, {"warps": tables.differs}) == ([], [])


def test_rows_that_one_table_lacks_are_named() -> None:
    assert tables.unmatched(ROWS, {"kernel": ["here", "there"]}) == []
    assert tables.unmatched(ROWS, {"kernel": ["here"]}) == ["kernel, there: in the committed table alone"]
    assert tables.unmatched(ROWS, {"kernel": ["here", "there"], "new": ["here"]}) == [
        "new, here: not in the committed table"
    ]


def test_a_table_comes_back_as_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "DATA", tmp_path)
    tables.save("table.json", "a compiler 1.0", ROWS)
    assert tables.load("table.json") == {"compiler": "a compiler 1.0", "rows": ROWS}
    assert len((tmp_path / "table.json").read_text().splitlines()) == 9  # a line a row


def test_a_page_has_one_region_for_a_table() -> None:
    page = "before\n<!-- table a.json -->\nold\n<!-- /table -->\n<!-- table b.json -->\n<!-- /table -->\n"
    filled = tables.fill(page, "a.json", "new\n")
    assert filled == page.replace("old\n", "\nnew\n\n")
    assert tables.fill(filled, "a.json", "new\n") == filled
    with pytest.raises(ValueError, match=r"c\.json"):
        tables.fill(page, "c.json", "new\n")
