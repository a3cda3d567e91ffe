"""How many instructions the native kernels run per vocabulary entry: not more than the committed table says."""

from __future__ import annotations

import warnings

import pytest

import native_counts
import snapshots
from native_counts import ACCEPT, ISAS, RULES

TABLE = snapshots.load(native_counts.TABLE)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> snapshots.Rows:
    reason = native_counts.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return native_counts.measure(tmp_path_factory.mktemp("count"))


def require_same_compiler() -> None:
    if native_counts.version() != TABLE["compiler"]:
        pytest.skip(
            f"{native_counts.TABLE} was made by {TABLE['compiler']}, this is {native_counts.version()}, whose counts "
            "cannot be compared with it"
        )


def test_no_kernel_runs_more_instructions_than_committed(measured: snapshots.Rows) -> None:
    missing = snapshots.unmatched(TABLE["rows"], measured)
    assert not missing, "\n".join([*missing, ACCEPT])
    require_same_compiler()
    found = [
        snapshots.changes(f"{case}, {isa}", TABLE["rows"][case][isa], row, RULES)
        for case, by_isa in measured.items()
        for isa, row in by_isa.items()
    ]
    worse = [line for lines, _ in found for line in lines]
    better = [line for _, lines in found for line in lines]
    assert not worse, "\n".join(["instructions per vocabulary entry:", *worse, ACCEPT])
    if better:
        warnings.warn("\n".join(["better than the committed table:", *better]), stacklevel=1)


def test_tables_of_another_compiler_are_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_counts, "version", lambda: "g++ 1.0")
    with pytest.raises(pytest.skip.Exception, match=r"this is g\+\+ 1\.0, whose counts cannot be compared"):
        require_same_compiler()


def test_the_counts_are_those_of_the_loops(measured: snapshots.Rows) -> None:
    """More work is more instructions, a wider vector is fewer."""
    for case, row in measured.items():
        for quantity in RULES:
            assert 0 < 1.5 * row["avx2"][quantity] < row["baseline"][quantity], (case, quantity)
    for isa in ISAS:
        one, two, three = (
            measured[case][isa]["statistics"]
            for case in ("sampled float32", "reverse_kl float32, without a reference", "reverse_kl float32")
        )
        assert one < two < three < measured["jsd float32"][isa]["statistics"]


def test_the_flags_are_those_of_the_build() -> None:
    flags = native_counts.production_flags()
    assert {*ISAS} <= set(flags)
    assert "-ffp-contract=fast" in flags["baseline"]
    assert "-mavx2" in flags["avx2"]


def test_the_page_shows_the_committed_table() -> None:
    page = snapshots.PAGE.read_text()
    assert page == snapshots.fill(page, native_counts.TABLE, native_counts.page(TABLE)), ACCEPT
