"""The data registry and the claims file, read through `importlib.resources`."""
