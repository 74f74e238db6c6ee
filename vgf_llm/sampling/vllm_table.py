"""Old name of :mod:`vgf_llm.engines.vllm_table`, kept for one release: servers are given it by name."""

from vgf_llm.engines.vllm_table import TABLE_SETTING, TableFolder, load_table, save_table

__all__ = ["TABLE_SETTING", "TableFolder", "load_table", "save_table"]
