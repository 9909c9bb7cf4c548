"""Methods that were measured and gain nothing: known by name as any other, but offered by no help."""
