"""Attention kernels, one file each, and how devices share a call; `model.attention` chooses among the kernels."""
