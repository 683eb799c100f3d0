"""What knows nothing of models: files, stores, progress, memory, hosts, statistics. Nothing here imports another package."""
