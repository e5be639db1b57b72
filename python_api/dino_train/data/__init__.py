"""From files to batches: folders, archives and shards of images, decoding, loaders of crops and of whole images."""
