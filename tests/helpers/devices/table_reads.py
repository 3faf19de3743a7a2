# SPDX-License-Identifier: Apache-2.0
"""Notes what the block tables of a hosted engine's steps name, for both model runners."""

from __future__ import annotations

from typing import Any


class TableReads:
    """From now on, of each table that a step of the model may read: ids of blocks that nobody uses any more."""

    def __init__(self, pooled: Any, name: str) -> None:
        self._hosted = pooled.host.models[name]
        self.freed: list[int] = []
        """Ids that a step could read and that no request held."""
        self.hidden = 0
        """Entries of rows that name the null block in front of others."""
        runner = self._hosted.core.model_executor.driver_worker.worker.model_runner
        if hasattr(runner, "block_tables"):
            self._watch_v2(runner.block_tables)
        else:
            for table in runner.input_batch.block_table.block_tables:
                self._watch_v1(table)

    def _watch_v1(self, table: Any) -> None:
        commit = table.commit_block_table

        def commit_block_table(num_reqs: int) -> None:
            commit(num_reqs)
            lengths = table.num_blocks_per_row
            for row, length in zip(table.block_table.gpu[:num_reqs].tolist(), lengths, strict=False):
                self._note(row[: int(length)])

        table.commit_block_table = commit_block_table

    def _watch_v2(self, tables: Any) -> None:
        gather = tables.gather_block_tables

        def gather_block_tables(*args: Any, **kwargs: Any) -> Any:
            gathered = gather(*args, **kwargs)
            for table in gathered:
                for row in table.tolist():
                    self._note(row)
            return gathered

        tables.gather_block_tables = gather_block_tables

    def _note(self, row: list[int]) -> None:
        held = {block.block_id for block in self._hosted.build.pool.used_blocks()}
        self.freed += [block_id for block_id in row if block_id and block_id not in held]
        first = next((column for column, block_id in enumerate(row) if block_id), 0)
        self.hidden += first
