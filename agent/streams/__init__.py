"""source -> window -> features -> model -> actions -> publish."""
