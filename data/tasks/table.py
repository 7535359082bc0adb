"""Rows of a data set's parquet files, decoded one at a time."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from data.tasks.draw import Draw
from data.tasks.task import TaskError
from data.text.files import whole_all
from data.text.parquet import open_parquet, read_batches

if TYPE_CHECKING:
    import pyarrow

BATCH = 1 << 14  # rows decoded at a time


class Table:
    """The rows of the files in `folder` that match `pattern`: the first `size` after a shuffle that is always the same.

    Columns stay in Arrow's memory (about the size of the text); a row becomes Python objects when it is asked for.
    Raises DataError for files that are missing, damaged, or lack one of `columns`.
    """

    def __init__(self, folder: Path | None, pattern: str, columns: list[str], size: int | None):
        import pyarrow

        if folder is None:
            raise TaskError(f"this task reads {pattern} of a data set: name it in the mixture as `dataset: NAME`")
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise DataError(f"{folder}: there is no {pattern}; add it to the data set's files in conf/datasets.yaml")
        tables = [_read(path, columns) for path in paths]
        self._table = pyarrow.concat_tables(tables, promote_options="permissive")
        self._where = folder / pattern
        order = Draw(pattern.partition("*")[0]).order(self._table.num_rows)
        self._order = order[:size]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self._table.slice(self._order[i], 1)
        try:
            return row.to_pylist()[0]
        except UnicodeDecodeError:
            pass
        try:
            return {name: whole_all(_as_binary(row[name])) for name in row.column_names}
        except UnicodeDecodeError:
            raise DataError(f"{self._where}: row {self._order[i] + 1} holds text that is not UTF-8.") from None


def _as_binary(column: "pyarrow.ChunkedArray") -> Any:
    """The only value of a column, with its texts still encoded."""
    import pyarrow

    def binary(of: "pyarrow.DataType") -> "pyarrow.DataType":
        if pyarrow.types.is_string(of):
            return pyarrow.binary()
        if pyarrow.types.is_large_string(of):
            return pyarrow.large_binary()
        if pyarrow.types.is_struct(of):
            return pyarrow.struct([of.field(i).with_type(binary(of.field(i).type)) for i in range(of.num_fields)])
        if pyarrow.types.is_list(of):
            return pyarrow.list_(of.value_field.with_type(binary(of.value_type)))
        return of

    (chunk,) = column.chunks
    return chunk.view(binary(chunk.type)).to_pylist()[0]


def _read(path: Path, columns: list[str]) -> "pyarrow.Table":
    import pyarrow

    file = open_parquet(path)
    missing = set(columns) - set(file.schema_arrow.names)
    if missing:
        raise DataError(f"{path}: there is no column {', '.join(sorted(missing))}")
    schema = pyarrow.schema([file.schema_arrow.field(column) for column in columns])
    return pyarrow.Table.from_batches((batch.select(columns) for batch in read_batches(path, columns, BATCH)), schema)
