"""Reading checkpoints: files, headers, indexes, and the names and module types behind them."""
