"""Where samples come from: one module per kind of source, each behind `port.SampleSource`."""
