"""Expert models that label images, run on the training hosts."""
