"""Each step of the Romanian preparation on sentences worked out by hand; every entry of both character maps."""

from __future__ import annotations

import pytest

from peftbench.metrics.romanian import COMMAS, DIACRITICS, prepare_text, remove_diacritics, replace_cedillas

# (with a cedilla, with a comma below), by their Unicode names
CEDILLAS = [
    ("\N{LATIN CAPITAL LETTER S WITH CEDILLA}", "\N{LATIN CAPITAL LETTER S WITH COMMA BELOW}"),
    ("\N{LATIN SMALL LETTER S WITH CEDILLA}", "\N{LATIN SMALL LETTER S WITH COMMA BELOW}"),
    ("\N{LATIN CAPITAL LETTER T WITH CEDILLA}", "\N{LATIN CAPITAL LETTER T WITH COMMA BELOW}"),
    ("\N{LATIN SMALL LETTER T WITH CEDILLA}", "\N{LATIN SMALL LETTER T WITH COMMA BELOW}"),
]
BARE = [
    ("\N{LATIN CAPITAL LETTER S WITH COMMA BELOW}", "S"),
    ("\N{LATIN SMALL LETTER S WITH COMMA BELOW}", "s"),
    ("\N{LATIN CAPITAL LETTER T WITH COMMA BELOW}", "T"),
    ("\N{LATIN SMALL LETTER T WITH COMMA BELOW}", "t"),
    ("\N{LATIN CAPITAL LETTER A WITH BREVE}", "A"),
    ("\N{LATIN SMALL LETTER A WITH BREVE}", "a"),
    ("\N{LATIN CAPITAL LETTER A WITH CIRCUMFLEX}", "A"),
    ("\N{LATIN SMALL LETTER A WITH CIRCUMFLEX}", "a"),
    ("\N{LATIN CAPITAL LETTER I WITH CIRCUMFLEX}", "I"),
    ("\N{LATIN SMALL LETTER I WITH CIRCUMFLEX}", "i"),
]


@pytest.mark.parametrize(("cedilla", "comma"), CEDILLAS)
def test_a_cedilla_becomes_a_comma_below(cedilla: str, comma: str) -> None:
    assert replace_cedillas(f"a{cedilla}b") == f"a{comma}b"
    assert replace_cedillas(comma) == comma


@pytest.mark.parametrize(("letter", "bare"), BARE)
def test_a_diacritic_goes(letter: str, bare: str) -> None:
    assert remove_diacritics(f"x{letter}y") == f"x{bare}y"


def test_the_maps_have_no_other_entries() -> None:
    assert {chr(key): chr(value) for key, value in COMMAS.items()} == dict(CEDILLAS)
    assert {chr(key): chr(value) for key, value in DIACRITICS.items()} == dict(BARE)
    assert remove_diacritics("Müller, café, Škoda, ş") == "Müller, café, Škoda, ş"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Şi ţara, și țara.", "Si tara , si tara ."),
        ("ŢARĂ ÎN ÂNTÂI", "TARA IN ANTAI"),
        ("„Da”, a spus el.", '" Da " , a spus el .'),
        ('A spus "da," apoi "nu."', 'A spus " da " , apoi " nu " .'),  # Moses' rule for quoted commas and stops
        ("într-o zi, n-a mai venit", "intr-o zi , n-a mai venit"),
        ("costă 3,5 mil. lei (circa 5 %)", "costa 3,5 mil. lei ( circa 5 % )"),
        ("așa… și — gata", "asa ... si - gata"),
        ("un\u00adcuvânt\u200b nou", "un cuvant nou"),  # a soft hyphen and a zero-width space are spaces
        ("10\u00a0000 de euro", "10.000 de euro"),
        ("R&D <b>", "R & D < b >"),  # nothing is escaped
        ("", ""),
    ],
)
def test_sentences_by_hand(text: str, tokens: str) -> None:
    assert prepare_text(text) == tokens
