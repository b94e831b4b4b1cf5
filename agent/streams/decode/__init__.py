"""From the bytes of a message to samples in columns: one module per payload format, no I/O."""
