"""What a model says of images that have no label: images.py finds and reads them, prediction.py names what is on them."""
