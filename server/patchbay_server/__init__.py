"""The Patchbay service: verifies intervention graphs and runs them inside a real model."""
