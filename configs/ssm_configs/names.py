"""File names of tuning tables: `<static keys>,device_name=<device>,<dtype key>.json`, in vLLM's spelling."""

import re
from typing import NamedTuple

from .devices import Device
from .spec import OpSpec, Statics
from .specs import get_spec
from .table import TableError


class TableName(NamedTuple):
    """What a table's file name says."""

    statics: dict[str, int]
    device_name: str
    dtype: str


def file_name(spec: OpSpec, device_name: str, table_dtype: str, statics: Statics) -> str:
    """The file name from parts that were checked already."""
    sizes = ",".join(f"{key}={statics[key]}" for key in spec.static_keys)
    return f"{sizes},device_name={device_name},{spec.dtype_key}={table_dtype}.json"


def table_file_name(op: str, *, device: Device, dtype: str, **static: int) -> str:
    """The file name under which `op` looks for a table of this device (its own name, not an alias)."""
    spec = get_spec(op)
    spec.check_statics(static)
    return file_name(spec, device.table_name, spec.table_dtype(dtype), static)


def parse_table_file_name(op: str, name: str) -> TableName:
    """The inverse of `table_file_name`; a name it cannot have produced is a `TableError`."""
    spec = get_spec(op)
    sizes = ",".join(f"{key}=([1-9][0-9]*)" for key in spec.static_keys)
    dtypes = "|".join(map(re.escape, spec.dtypes))
    match = re.fullmatch(rf"{sizes},device_name=([^\s/]+),{spec.dtype_key}=({dtypes})\.json", name)
    if match is None:
        keys = ",".join(f"{key}=<int>" for key in spec.static_keys)
        expected = f"{keys},device_name=<device>,{spec.dtype_key}=<{'|'.join(spec.dtypes)}>.json"
        raise TableError(name, f"not a table name of {op}, expected {expected}")
    *values, device_name, dtype = match.groups()
    return TableName(dict(zip(spec.static_keys, map(int, values), strict=True)), device_name, dtype)
