"""How rows lie in a file of trends, so that a question for one model and series opens few row groups.

Files hold one UTC day of event time. The rows of each commit are sorted, and compaction keeps their order, so
that the row groups' smallest and largest values rule most of them out; sketches, which take most of the bytes,
are in a column of their own that is not read without need.
"""

from __future__ import annotations

import pyarrow as pa
from deltalake import WriterProperties

ORDER = ("digest", "series", "stream", "device", "bucket")
ROW_GROUP = 65_536
WRITER = WriterProperties(max_row_group_size=ROW_GROUP, compression="ZSTD", compression_level=3)


def sorted_trends(rows: pa.Table) -> pa.Table:
    return rows.sort_by([(name, "ascending") for name in ORDER])
