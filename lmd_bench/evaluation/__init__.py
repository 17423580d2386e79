"""Measures images: two folders of anyone's, or what trained methods fill. The metrics themselves are in `metrics`."""
