"""Pure tensor → tensor: subspaces, covariances, LoRA algebra, block adapters. No files, no names."""
