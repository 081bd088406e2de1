"""Expert models that label images, on the hosts of training."""
