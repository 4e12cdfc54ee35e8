"""Where parts come from: folders in published layouts."""
