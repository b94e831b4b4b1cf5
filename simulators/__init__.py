"""Sensors, processes, faults and the demo: what stands in for a plant when there is none."""
