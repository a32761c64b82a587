"""Data sets, their conditions, augmentation and networks."""
