"""One module for each framework, imported only on demand: ``from fused_gopd.integrations import transformers``."""
