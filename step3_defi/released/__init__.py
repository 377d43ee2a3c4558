"""What published checkpoints need: the parts of VPP, and the parameter names of the release (Hu et al., 2024)."""
