"""The files of a split: found in a folder or named by the user, and read one after the other into one table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, concatenate_datasets

from peftbench.tasks.files import READERS, Layout, get_ending, locate_row, read_file, read_parallel_lines
from peftbench.utils.errors import UserError
from peftbench.utils.files import expand_home

# The file stems of a split; any other split is looked for under its own name.
ALIASES = {
    "validation": ("validation", "dev", "valid", "val"),
    "validation_matched": ("validation_matched", "dev_matched", "validation", "dev"),
    "validation_mismatched": ("validation_mismatched", "dev_mismatched"),
}


class FileSet(NamedTuple):
    """Files whose rows follow each other. A file of lines, such as train.en, is a column of the files with its stem."""

    paths: tuple[str, ...]
    used: tuple[str, ...]  # the columns that are needed
    layout: Layout
    nested: tuple[str, ...] = ()  # see `read_file`

    @property
    def name(self) -> str:
        """Return the files' name in messages."""
        return ", ".join(self.paths) if len(self.paths) < 4 else f"{self.paths[0]} and {len(self.paths) - 1} others"

    def read(self) -> Dataset:
        """Read all rows. The errors are those of `read_file`; also, columns must fit those above."""
        tables = [(names, self._read_table(names)) for names in self._group()]
        (first, rows), *others = tables
        if not others:
            return rows
        shared = [name for name in rows.column_names if all(name in table.column_names for _, table in others)]
        for names, table in others:
            for name in set(self.used) & set(shared):
                above, here = rows.features[name], table.features[name]
                if above != here:
                    kinds = [getattr(feature, "names", getattr(feature, "dtype", feature)) for feature in (here, above)]
                    raise UserError(
                        f"{names[0]}: column {name} holds {kinds[0]}, but that of {first[0]} holds {kinds[1]}."
                    )
        for name in self.used:
            has = {names[0]: name in table.column_names for names, table in tables}
            if len({*has.values()}) > 1:
                lacking, having = (next(file for file, it_has in has.items() if it_has is one) for one in (False, True))
                raise UserError(f"{lacking} has no column {name}, which {having} has.")
        if not shared:
            raise UserError(
                f"{others[0][0][0]} and {first[0]} have no column in common; files of a split need the same."
            )
        alike = [name for name in shared if len({str(table.features[name]) for _, table in tables}) == 1]
        return concatenate_datasets([table.select_columns(alike) for _, table in tables])

    def locate(self, row: int) -> str:
        """Return where a row (numbered from 1) is, for messages."""
        *others, last = self._group()
        for names in others:
            count = len(self._read_table(names))
            if row <= count:
                return locate_row(names[0], row, self.layout)
            row -= count
        return locate_row(last[0], row, self.layout)

    def _group(self) -> list[list[str]]:
        """Return the files of each table: one, or those of lines with the same stem."""
        found: dict[str, list[str]] = {}
        for path in self.paths:
            is_column = get_ending(path) not in READERS and get_ending(path)[1:] in self.used
            found.setdefault(_drop_ending(path) if is_column else f"{path}/", []).append(path)
        return list(found.values())

    def _read_table(self, names: Sequence[str]) -> Dataset:
        columns = {get_ending(name)[1:]: name for name in names}
        if not columns.keys() <= set(self.used):
            return read_file(names[0], self.used, self.nested, self.layout)
        if len(columns) < len(names):
            raise UserError(f"{', '.join(names)} are the same column; name each file of lines once.")
        if missing := [name for name in self.used if name not in columns]:
            pair = ",".join([names[0], *(f"{Path(_drop_ending(names[0])).name}.{name}" for name in missing)])
            raise UserError(f"{names[0]} has the lines of one column; name the others too: [{pair}].")
        return read_parallel_lines(columns)


def find_split(data_dir: str, split: str, used: Collection[str] = ()) -> list[str]:
    """Return the file of `split` in the folder `data_dir`, or its files of lines, one for each of the columns `used`.

    Raises UserError if there is none, or more than one.
    """
    folder = expand_home(data_dir)
    if not folder.is_dir():
        raise UserError(
            f"task.data_dir={data_dir} is not a folder; give one with a file for each split, such as {split}.tsv."
        )
    stems, found = _list_stems(split), _list_candidates(folder, split, used)
    if len(found) == 1:
        return [str(file) for file in found[0]]
    remedy = f"+task.data_files.{split}=FILE names the file."
    if found:
        raise UserError(
            f"task.data_dir={data_dir} has {len(found)} files for the {split} split "
            f"({', '.join(files[0].name for files in found)}); {remedy}"
        )
    there = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(there[:12]) + (", ..." if len(there) > 12 else "")
    raise UserError(
        f"task.data_dir={data_dir} has no file for the {split} split: looked for {' or '.join(stems)} with the "
        f"extension {', '.join(READERS)}, and found {listed or 'an empty folder'}; {remedy}"
    )


def has_split(data_dir: str, split: str, used: Collection[str] = ()) -> bool:
    """Return whether the folder `data_dir` has a file for `split`; see `find_split`."""
    return bool(_list_candidates(expand_home(data_dir), split, used))


def list_candidates(data_dir: str, split: str, used: Collection[str] = ()) -> list[str]:
    """Return all files in the folder `data_dir` that may be those of `split`; see `find_split`."""
    return [str(file) for files in _list_candidates(expand_home(data_dir), split, used) for file in files]


def _list_stems(split: str) -> tuple[str, ...]:
    return ALIASES.get(split, (split,))


def _list_candidates(folder: Path, split: str, used: Collection[str]) -> list[list[Path]]:
    """Return the files that may be those of a split: each a table, or a table's files of lines."""
    found = []
    for stem in _list_stems(split):
        found += [[file] for ending in READERS for file in _list_packed(folder / f"{stem}{ending}")]
        lines = [_list_packed(folder / f"{stem}.{name}") for name in used]
        if lines and all(lines):
            found.append([files[0] for files in lines])
    return found


def _list_packed(file: Path) -> list[Path]:
    """Return those of a file and of the same file packed by gzip that exist."""
    return [one for one in (file, file.with_name(f"{file.name}.gz")) if one.is_file()]


def _drop_ending(path: str) -> str:
    """Return the path without the ending that `get_ending` returns, and without .gz."""
    return path.removesuffix(".gz")[: -len(get_ending(path))]
