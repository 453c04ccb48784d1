"""The records of outputs/reference are read once: many tests take them all, and none changes them."""

from functools import cache
from pathlib import Path

import pytest

import peftbench.records.record
from peftbench.records.record import Record, _read_record

REFERENCE = Path(__file__).resolve().parents[2] / "outputs" / "reference"
read_once = cache(_read_record)


@pytest.fixture(autouse=True)
def keep_records(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(file: Path) -> Record:
        return read_once(file) if REFERENCE in file.parents else _read_record(file)

    monkeypatch.setattr(peftbench.records.record, "_read_record", read)
