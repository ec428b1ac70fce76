"""The runtime: images in, instances out, without torch."""
