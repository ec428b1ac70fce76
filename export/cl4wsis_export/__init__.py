"""Export: the Segmenter and its post-processing as one graph, verified and packed into a bundle."""
