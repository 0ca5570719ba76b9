"""A model, a plan and rows -> a trained adapter, with its timings and the checks that make it believable."""
