"""Published checkpoints, of UniVLA and of the release, as models of this step."""
