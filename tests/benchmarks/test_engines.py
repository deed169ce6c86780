"""The table of engines, from what they gave."""

from __future__ import annotations

from benchmarks.studies.engines import DENSE, HEADER, NEW, READ, rows_of


def test_a_row_holds_a_result_against_the_dense_model_of_the_same_round() -> None:
    def told(prefill: float, decode: float, last: int = 3) -> dict[str, object]:
        return {"written": [[1, 2], [3, last]], "prefill": prefill, "decode": decode}

    rounds = [
        {DENSE: told(0.2, 1.0), "cut": told(0.1, 0.5, last=4), "lost": {"error": "ValueError: no such layer\nmore"}},
        {DENSE: told(0.6, 3.0), "cut": told(0.3, 2.0, last=4), "lost": {"error": "ValueError: no such layer\nmore"}},
    ]
    expected = {result: [[1, 2], [3, 3]] for result in (DENSE, "cut", "lost")}
    dense, cut, lost = rows_of("an engine", rounds, expected)
    assert dense == ["an engine", DENSE, "yes", "4 of 4", f"{READ / 0.4:,.0f}", "1.00", f"{NEW / 2:,.0f}", "1.00"]
    # Twice as fast in both rounds; to decode, twice and 1.5 times.
    assert cut == ["an engine", "cut", "yes", "3 of 4", f"{READ / 0.2:,.0f}", "2.00", f"{NEW / 1.25:,.0f}", "1.75"]
    assert lost == ["an engine", "lost", "no: ValueError: no such layer", "", "", "", "", ""]
    assert {len(row) for row in (dense, cut, lost)} == {len(HEADER)}
