"""The loop over chunks of tokens: matrix products, row operations and buffers."""
