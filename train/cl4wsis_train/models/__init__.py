"""The Segmenter, the auxiliary decoder and the affinity refinement."""
