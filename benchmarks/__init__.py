"""Side-by-side measurements, one module per question: `python -m benchmarks.NAME [--quick] [--json FILE]`."""
