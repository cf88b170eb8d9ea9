"""What goes beside the weights when a model is saved or published: remote-code shim, model card, upload."""
