"""Writing: shards, the staging folder that becomes the output, side files, the receipt and the model card."""
