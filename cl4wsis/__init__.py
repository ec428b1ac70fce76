"""Teach an instance-segmentation model new classes from image tags, and deploy every step as one graph.

Nothing here imports torch: this package holds the words that training, export and runtime share.
"""

__version__ = "0.1.0"
