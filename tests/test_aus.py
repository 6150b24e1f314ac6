"""The AU sets and rates against the numbers of AAR, Table I."""

from __future__ import annotations

import pytest

from aufast.aus import AU_NAMES, AU_SETS, OCCURRENCE_RATES

# The rows of AAR Table I as printed: one column an AU, "-" where the dataset is not trained on it.
TABLE_I = """
          1    2    4    6    7    9   10   12   14   15   17   23   24   25   26
bp4d     21.1 17.1 20.3 46.2 54.9  -  59.4 56.2 46.6 16.9 34.4 16.5 15.2  -    -
disfa     5.0  4.0 15.0  8.1  -   4.3  -   13.2  -    -    -    -    -   27.8  8.9
gft       3.7 13.5  3.7 28.3  -    -  24.6 29.3  3.1 10.7  -   25.0 14.1  -    -
affwild2 11.9  5.1 16.0 26.5 39.9  -  34.5 24.3  -    2.8  -    3.1  2.8 62.8  7.6
"""


@pytest.mark.parametrize("row", TABLE_I.split("\n")[2:-1], ids=lambda row: row.split()[0])
def test_sets_and_rates_are_table_i(row: str) -> None:
    columns = [int(au) for au in TABLE_I.split("\n")[1].split()]
    name, *cells = row.split()
    printed = {au: float(cell) for au, cell in zip(columns, cells, strict=True) if cell != "-"}
    assert OCCURRENCE_RATES[name] == printed
    assert AU_SETS[name] == tuple(printed)


def test_set_sizes() -> None:
    sizes = {name: len(aus) for name, aus in AU_SETS.items()}
    assert sizes == {"bp4d": 12, "disfa": 8, "gft": 10, "affwild2": 12}


def test_every_au_of_a_set_has_a_name() -> None:
    assert set(AU_NAMES) == {au for aus in AU_SETS.values() for au in aus}
