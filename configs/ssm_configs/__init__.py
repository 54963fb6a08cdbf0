"""Launch configs for the operators of `pallas_ssm` and `triton_ssm`, from tuning tables that both read.

    config = lookup("selective_state_update", twin="triton", device=Device("NVIDIA H200", (9, 0)),
                    dtype="bfloat16", size=64 * 128, headdim=64, dstate=128)
    config["BLOCK_SIZE_M"], config["num_warps"], config.source

`override(...)` pins knobs, `explain(...)` tells where a config came from. The standard library is all this needs.
"""

from .config import Config
from .devices import Device, alias, architecture
from .lookup import Explanation, TableWarning, circumstances, clear_cache, explain, lookup
from .names import TableName, parse_table_file_name, table_file_name
from .overrides import on_override, override, override_token
from .search import ShippedTable, Step, shipped_tables
from .spec import Knob, OpSpec
from .specs import SPECS
from .table import Entry, Table, TableError, read_table, write_table

__all__ = [
    "SPECS",
    "Config",
    "Device",
    "Entry",
    "Explanation",
    "Knob",
    "OpSpec",
    "ShippedTable",
    "Step",
    "Table",
    "TableError",
    "TableName",
    "TableWarning",
    "alias",
    "architecture",
    "circumstances",
    "clear_cache",
    "explain",
    "lookup",
    "on_override",
    "override",
    "override_token",
    "parse_table_file_name",
    "read_table",
    "shipped_tables",
    "table_file_name",
    "write_table",
]
