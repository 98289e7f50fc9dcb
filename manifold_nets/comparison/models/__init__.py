"""The networks that a comparison can name, plain torch modules all of them."""
