"""The paper's claims on tiny models: ``fused-gopd reproduce``."""
