"""The objective per token: everything that has no vocabulary axis. Import from the modules.

They take the statistics that the row operations leave per token and return losses, advantages, gradient coefficients,
weights and reductions. Plain PyTorch on vectors; nothing here synchronises with the device.
"""
