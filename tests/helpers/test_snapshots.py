"""The comparison of committed tables: what counts as worse, what as better, and how that is said."""

from __future__ import annotations

from pathlib import Path

import pytest

import snapshots

ROWS = {"kernel": {"here": {"size": 4}, "there": {"size": 5}}}


@pytest.mark.parametrize(
    ("rule", "old", "worse", "same", "better"),
    [
        (snapshots.more(), 0, 1, 0, -1),
        (snapshots.more(), 100, 101, 100, 99),
        (snapshots.more(0.02), 100, 103, 102, 97),
        (snapshots.more_granules(8), 72, 73, 65, 64),
        (snapshots.more_granules(8), 80, 88, 73, 72),
        (snapshots.earlier_in(("none", "mma", "wgmma")), "mma", "none", "mma", "wgmma"),
    ],
)
def test_rules(rule: snapshots.Rule, old: object, worse: object, same: object, better: object) -> None:
    def changes(new: object) -> tuple[list[str], list[str]]:
        return snapshots.changes("kernel, here", {"size": old}, {"size": new}, {"size": rule})

    assert changes(worse) == ([f"kernel, here: size {old} -> {worse}"], [])
    assert changes(same) == ([], [])
    assert changes(better) == ([], [f"kernel, here: size {old} -> {better}"])


def test_what_must_not_differ_is_never_better() -> None:
    for new in (3, 5):
        assert snapshots.changes("k", {"warps": 4}, {"warps": new}, {"warps": snapshots.differs})[0]
    assert snapshots.changes("k", {"warps": 4}, {"warps": 4}, {"warps": snapshots.differs}) == ([], [])


def test_rows_that_one_table_lacks_are_named() -> None:
    assert snapshots.unmatched(ROWS, {"kernel": ["here", "there"]}) == []
    assert snapshots.unmatched(ROWS, {"kernel": ["here"]}) == ["kernel, there: in the committed table alone"]
    assert snapshots.unmatched(ROWS, {"kernel": ["here", "there"], "new": ["here"]}) == [
        "new, here: not in the committed table"
    ]


def test_a_table_comes_back_as_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "DATA", tmp_path)
    snapshots.save("table.json", "a compiler 1.0", ROWS)
    assert snapshots.load("table.json") == {"compiler": "a compiler 1.0", "rows": ROWS}
    assert len((tmp_path / "table.json").read_text().splitlines()) == 9  # a line a row


def test_a_page_has_one_region_for_a_table() -> None:
    page = "before\n<!-- table a.json -->\nold\n<!-- /table -->\n<!-- table b.json -->\n<!-- /table -->\n"
    filled = snapshots.fill(page, "a.json", "new\n")
    assert filled == page.replace("old\n", "\nnew\n\n")
    assert snapshots.fill(filled, "a.json", "new\n") == filled
    with pytest.raises(ValueError, match=r"c\.json"):
        snapshots.fill(page, "c.json", "new\n")
