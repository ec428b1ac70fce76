"""From the pictures of a plan to batches: loaders, augmentation, targets."""
