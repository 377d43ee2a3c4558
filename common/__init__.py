"""What at least two of the steps share: data formats, the training loop, artifacts, frozen encoders, programs."""
