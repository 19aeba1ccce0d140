"""The pictures of ``zoext visualize``: what they show is computed in one module and drawn in another."""
