"""Small pure functions from measured values to reported numbers."""
