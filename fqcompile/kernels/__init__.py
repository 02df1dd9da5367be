"""The operators that rewritten graphs call, the templates behind them, and how one is picked."""
