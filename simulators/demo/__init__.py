"""The main job end to end, driven only through the command line and the Python client, as a user would."""
