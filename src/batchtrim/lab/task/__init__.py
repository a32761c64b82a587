"""What is trained on: data sets, their conditions, augmentation and networks."""
