"""Questions to the tables: one description, pruned by what Delta knows of each file, answered by DuckDB or Dask."""
