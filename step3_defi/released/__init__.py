"""VPP's parts and the official release's names, for checkpoints that others published (Table 1; Hu et al., 2024)."""
