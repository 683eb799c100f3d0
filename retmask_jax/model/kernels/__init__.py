"""Attention kernels, one file each; `model.attention` chooses among them."""
