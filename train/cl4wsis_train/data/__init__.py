"""Training data: drawn shapes, COCO-format files, image tags, augmentation, targets."""
