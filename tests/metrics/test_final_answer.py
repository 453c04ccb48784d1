"""What a text concludes with: against the rules of GSM8K's and LLM-Adapters' own scripts."""

from __future__ import annotations

import random
import re

import pytest

from peftbench.metrics.final_answer import find_choice, find_final_number
from peftbench.metrics.measure import measure


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", 72),
        ("#### 1,200", 1200),
        ("#### $18.00 a day, not 17", 18),
        ("#### 5 #### -6", -6),
        ("It is 3, no, 4.", 4),
        ("The answer is .5", 0.5),
        ("#### none, though 7", 7),
        ("no number", None),
        ("7 ####", None),
    ],
)
def test_the_number_at_the_end(text: str, number: float | None) -> None:
    assert find_final_number(text) == number


def test_a_marked_number_is_that_of_gsm8k() -> None:
    """Its script takes what follows the mark, without commas, as text; ours is a number."""
    draw = random.Random(1)
    for _ in range(300):
        number = draw.choice([draw.randint(-2000, 2000), round(draw.uniform(-50, 50), 2)])
        text = f"First {draw.randint(1, 99)}, then {draw.random():.3f}.\n#### {number:,}"
        found = re.search(r"#### (\-?[0-9\.\,]+)", text)
        assert found is not None and find_final_number(text) == float(found[1].replace(",", ""))


def test_the_choice_is_the_first_that_is_named() -> None:
    """The script of LLM-Adapters looks for the choices of one set, and takes the first."""
    sets = {
        "boolq": ["true", "false"],
        "piqa": ["solution1", "solution2"],
        "siqa": [f"answer{number}" for number in range(1, 6)],
        "hellaswag": [f"ending{number}" for number in range(1, 5)],
        "winogrande": ["option1", "option2"],
    }
    draw = random.Random(1)
    for words in sets.values():
        for _ in range(50):
            text = " ".join(draw.choices(["the correct answer is", "or", *words], k=draw.randint(0, 4)))
            found = re.findall("|".join(words), text.strip())
            assert find_choice(text) == (found[0] if found else None)


def test_scores() -> None:
    ours = ["#### 3", "so 4 of them", "nothing", "5"]
    assert measure("final_number", ours, ["#### 3.0", "#### 4", "#### 0", ["#### 6", "#### 5"]]).scores == {
        "final_number": 75.0
    }
    assert measure("choice", ["it is true", "solution2", ""], ["the correct answer is true", "solution1", "true"]) == (
        {"choice": pytest.approx(100 / 3)},
        {},
    )
